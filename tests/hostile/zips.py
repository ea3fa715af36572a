"""A writer of zip and ``.pt`` files that lies on request."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tests.hostile.pickles import PIECES, VALID, Case

LOCAL = "<4sHHHHHIIIHH"
CENTRAL = "<4sHHHHHHIIIHHHHHII"


@dataclass(frozen=True)
class Member:
    """One zip member; `local` and `central` replace fields of its two headers.

    Attributes:
        hole: number of zero bytes after the data, which take no disk space.
        before: foreign bytes before the local header.
        embedded: whether the data of the previous member ends with the local header, so that it is
            not written again.
    """

    name: str
    data: bytes = b""
    hole: int = 0
    before: bytes = b""
    embedded: bool = False
    local: Mapping[str, Any] = field(default_factory=dict)
    central: Mapping[str, Any] = field(default_factory=dict)

    def fields(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        size = len(self.data) + self.hole
        true = {
            "magic": None, "name": self.name.encode(), "flags": 0, "method": 0, "extra": b"",
            "crc": 0 if self.hole else zlib.crc32(self.data), "packed": size, "size": size,
            "comment": b"", "disk": 0, "attributes": 0, "at": None,
        }  # fmt: skip
        assert changes.keys() <= true.keys()
        return {**true, **changes}

    def local_header(self) -> bytes:
        f = self.fields(self.local)
        numbers = (20, f["flags"], f["method"], 0, 0, f["crc"], f["packed"], f["size"])
        sizes = (len(f["name"]), len(f["extra"]))
        header = struct.pack(LOCAL, f["magic"] or b"PK\3\4", *numbers, *sizes)
        return header + f["name"] + f["extra"]

    def central_header(self, at: int) -> bytes:
        f = self.fields(self.central)
        numbers = (20, 20, f["flags"], f["method"], 0, 0, f["crc"], f["packed"], f["size"])
        sizes = (len(f["name"]), len(f["extra"]), len(f["comment"]))
        place = (f["disk"], 0, f["attributes"], at if f["at"] is None else f["at"])
        header = struct.pack(CENTRAL, f["magic"] or b"PK\1\2", *numbers, *sizes, *place)
        return header + f["name"] + f["extra"] + f["comment"]


def write_zip(
    path: Path,
    members: Iterable[Member],
    *,
    prefix: bytes = b"",
    shift: int = 0,
    between: bytes = b"",
    tail: bytes = b"",
    end: Mapping[str, Any] | None = None,
    wide: Mapping[str, Any] | None = None,
) -> None:
    """Write a zip; `end` and `wide` replace fields of its end records.

    Args:
        path: path of the file.
        members: members, in order.
        prefix: foreign bytes at the start.
        shift: number that is added to all recorded offsets.
        between: foreign bytes between the directory and the end records.
        tail: foreign bytes at the end.
        end: fields of the end record: disk, here, total, size, start, comment.
        wide: the same fields of the zip64 end record, and at and disks; None writes no such record.
    """
    directory = []
    with open(path, "wb") as file:
        file.write(prefix)
        for member in members:
            header = member.local_header()
            at = file.tell() - len(header)
            if not member.embedded:
                at = file.tell() + len(member.before)
                file.write(member.before + header)
            file.write(member.data)
            file.seek(member.hole, os.SEEK_CUR)
            directory.append(member.central_header(at + shift))
        start, size, total = file.tell(), sum(map(len, directory)), len(directory)
        file.write(b"".join(directory) + between)
        true = {
            "disk": 0, "here": total, "total": total, "size": size, "start": start + shift,
            "comment": b"", "at": file.tell() + shift, "disks": 1, "record_size": 44,
        }  # fmt: skip
        if wide is not None:
            w = {**true, **wide}
            places = (w["here"], w["total"], w["size"], w["start"])
            file.write(struct.pack("<4sQHHII", b"PK\6\6", w["record_size"], 45, 45, 0, w["disk"]))
            file.write(struct.pack("<QQQQ", *places))
            file.write(struct.pack("<4sIQI", b"PK\6\7", 0, w["at"], w["disks"]))
        e = {**true, **(end or {})}
        places = (e["disk"], 0, e["here"], e["total"], e["size"], e["start"], len(e["comment"]))
        file.write(struct.pack("<4sHHHHIIH", b"PK\5\6", *places) + e["comment"] + tail)


ROOT = "archive"


def write_pt(
    directory: Path,
    *,
    pickle: bytes = VALID,
    change: Mapping[str, Mapping[str, Any]] | None = None,
    drop: str = "",
    first: Iterable[Member] = (),
    last: Iterable[Member] = (),
    edit: Callable[[bytes], bytes] | None = None,
    **lies: Any,
) -> Path:
    """Write a ``.pt`` file in the layout of `torch.save`, except for the given changes.

    Args:
        directory: directory to write to.
        pickle: content of data.pkl.
        change: attributes of `Member` to replace, by the member's name without the root.
        drop: name of a member to leave out.
        first: members before the ordinary ones.
        last: members after the ordinary ones.
        edit: function that changes the bytes of the finished file.
        lies: further arguments of `write_zip`.
    """
    contents = {"data.pkl": pickle, "byteorder": b"little"}
    contents |= {f"data/{number}": piece for number, piece in enumerate(PIECES)}
    contents |= {"version": b"3\n"}
    members = []
    for name, content in contents.items():
        fields: dict[str, Any] = {"name": f"{ROOT}/{name}", "data": content}
        if name != drop:
            members.append(Member(**{**fields, **(change or {}).get(name, {})}))
    path = directory / "npt_weights.pt"
    write_zip(path, [*first, *members, *last], **lies)
    if edit:
        path.write_bytes(edit(path.read_bytes()))
    return path


def extra(name: str, content: bytes = b"", **fields: Any) -> Member:
    """Another member under the root."""
    return Member(f"{ROOT}/{name}", content, **fields)


def write_file(directory: Path, content: bytes, name: str = "npt_weights.pt") -> Path:
    path = directory / name
    path.write_bytes(content)
    return path


def pt_adder(cases: list[Case]) -> Callable[..., None]:
    """A function that adds to `cases` a case of that name, which `write_pt` writes."""

    def pt(name: str, **how: Any) -> None:
        cases.append((name, partial(write_pt, **how)))

    return pt
