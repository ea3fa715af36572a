"""Checkpoints in ``.pt`` files whose zip is malicious or broken, and files that are no zip."""

from __future__ import annotations

import struct
import zlib
from functools import partial
from pathlib import Path
from typing import Any

from tests.hostile.pickles import (
    COMMAND,
    DATA,
    EMPTY_TUPLE,
    PIECES,
    PROTO,
    STOP,
    SYSTEM,
    VALID,
    Case,
    call,
    storage,
    tensor,
    weights,
)
from tests.hostile.zips import ROOT, Member, extra, pt_adder, write_file, write_zip

CASES: list[Case] = []
pt = pt_adder(CASES)


# the zip: compression, encryption, names
def _deflated(content: bytes) -> dict[str, Any]:
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = compressor.compress(content) + compressor.flush()
    header = {"method": 8, "packed": len(packed), "size": len(content), "crc": zlib.crc32(content)}
    return {"data": packed, "local": header, "central": header}


_ENCRYPTED = {"flags": 1}
pt("deflated-data-pkl", change={"data.pkl": _deflated(VALID)})
pt("deflated-data", change={"data/0": _deflated(PIECES[0])})
pt("deflated-bomb", change={"data.pkl": _deflated(VALID + b"\0" * (64 << 20))})
pt("method-stored-in-local-only", change={"data/0": {"central": {"method": 8}}})
pt("method-stored-in-directory-only", change={"data/0": {"local": {"method": 8}}})
pt("encrypted", change={"data/0": {"local": _ENCRYPTED, "central": _ENCRYPTED}})
pt("encrypted-by-directory-only", change={"data/0": {"central": _ENCRYPTED}})
pt("encrypted-by-local-only", change={"data/0": {"local": _ENCRYPTED}})
pt("strongly-encrypted", change={"data/0": {"central": {"flags": 0x2041}}})
pt("two-roots", first=[Member("other/data.pkl", VALID)])
pt("two-roots-reversed", last=[Member("other/data.pkl", VALID)])
pt("member-duplicate-pickle", last=[extra("data.pkl", weights(tensor(storage("1"))))])
pt("member-duplicate-data", last=[extra("data/0", PIECES[1])])
pt("member-duplicate-by-case", last=[extra("DATA.PKL", VALID)])
pt("member-duplicate-data-by-case", last=[extra("Data/0", PIECES[1])])
for _name, _member in {
    "absolute": "/etc/passwd", "drive": "C:\\x", "parent": f"{ROOT}/../x",
    "backslash": f"{ROOT}\\x",
    "backslash-inside": f"{ROOT}/data\\7", "parent-first": "../x/y", "nul": f"{ROOT}/data/7\0",
    "newline": f"{ROOT}/data/7\nOK", "not-ascii": f"{ROOT}/data/\u00b7", "empty": "",
    "root-only": ROOT, "folder": f"{ROOT}/", "empty-part": f"{ROOT}//x", "long": "a/" + "x" * 300,
    "deep": f"{ROOT}/" + "a/" * 50 + "b", "escape": f"{ROOT}/\x1b[2J",
}.items():  # fmt: skip
    pt(f"member-name-{_name}", last=[Member(_member)])
pt("member-name-not-utf8", last=[extra("x", central={"name": b"archive/\xff"})])
pt("member-names-differ", change={"data/0": {"local": {"name": b"archive/data/7"}}})
pt("member-names-differ-in-length", change={"data/0": {"local": {"name": b"archive/data/00"}}})
pt("member-names-differ-in-case", change={"data/0": {"local": {"name": b"archive/Data/0"}}})
# with the MS-DOS attribute of a folder, torch 2.13 reads no data and returns uninitialized memory
pt("member-marked-as-a-folder", change={"data/0": {"central": {"attributes": 0x10}}})
pt("member-torchscript", last=[extra("constants.pkl", PROTO + EMPTY_TUPLE + STOP)])
pt("no-data-pkl", drop="data.pkl")
pt("no-data-record", drop="data/0")
pt("no-version", drop="version")
pt("version-0", change={"version": {"data": b"0\n"}})
pt("version-11", change={"version": {"data": b"11\n"}})
pt("version-text", change={"version": {"data": b"three\n"}})
pt("version-empty", change={"version": {"data": b""}})
pt("byteorder-big", change={"byteorder": {"data": b"big"}})
pt("byteorder-unknown", change={"byteorder": {"data": b"middle"}})
pt("byteorder-empty", change={"byteorder": {"data": b""}})

# the zip: places and sizes
pt("crc-of-data-pkl", change={"data.pkl": {"central": {"crc": 1}}})
pt("data-too-short", change={"data/0": {"data": DATA[:60]}})
pt("data-too-long", change={"data/0": {"data": DATA[:68]}})
pt("data-empty", change={"data/0": {"data": b""}})
pt("size-smaller-in-directory", change={"data/0": {"central": {"size": 60, "packed": 60}}})
pt("size-larger-in-directory", change={"data/0": {"central": {"size": 68, "packed": 68}}})
pt("size-differs-from-packed", change={"data/0": {"central": {"packed": 60}}})
pt("crc-differs-in-local", change={"data/0": {"local": {"crc": 1}}})
pt("size-differs-in-local", change={"data/0": {"local": {"size": 60, "packed": 60}}})
pt("size-beyond-the-file", change={"data/2": {"central": {"size": 1 << 30, "packed": 1 << 30}}})
pt("size-4-gib", change={"data/2": {"central": {"size": 0xFFFFFFFF, "packed": 0xFFFFFFFF}}})
pt("size-into-the-directory", change={"version": {"central": {"size": 40, "packed": 40}}})
pt("pickle-size-zero", change={"data.pkl": {"central": {"size": 0, "packed": 0, "crc": 0}}})
_MAX = {"size": 0xFFFFFFFF, "packed": 0xFFFFFFFF}
for _name, _wide_extra in {
    "2-63": struct.pack("<HHQQ", 1, 16, 1 << 63, 1 << 63),
    "2-64": struct.pack("<HHQQ", 1, 16, (1 << 64) - 1, (1 << 64) - 1),
    "sizes-differ": struct.pack("<HHQQ", 1, 16, 64, 60),
    "cut": struct.pack("<HHQ", 1, 16, 64),
    "empty": struct.pack("<HH", 1, 0),
    "missing": b"",
    "other-kind": struct.pack("<HHQQ", 2, 16, 64, 64),
}.items():
    pt(f"zip64-extra-{_name}", change={"data/0": {"central": {**_MAX, "extra": _wide_extra}}})
pt("zip64-extra-offset-beyond", change={"data/0": {"central": {
    "at": 0xFFFFFFFF, "extra": struct.pack("<HHQ", 1, 8, 1 << 62),
}}})  # fmt: skip
pt("header-beyond-the-file", change={"data/0": {"central": {"at": 1 << 30}}})
pt("header-in-the-directory", edit=lambda raw: raw.replace(
    struct.pack("<I", 0) + b"archive/data.pkl",
    struct.pack("<I", raw.index(b"PK\1\2")) + b"archive/data.pkl",
))  # fmt: skip
pt("header-not-a-header", change={"data/0": {"central": {"at": 7}}})
pt("header-without-magic", change={"data/0": {"local": {"magic": b"PK\3\5"}}})
pt("header-shared", change={"data/1": {"central": {"at": 0, "name": b"archive/data.pkl"}}})
pt("header-extra-outside", edit=lambda raw: raw.replace(
    b"\x0f\0\0\0archive/version", b"\x0f\0\xff\xffarchive/version"
))  # fmt: skip
_INNER = Member(f"{ROOT}/data/1", PIECES[1], embedded=True)


def _overlapping(directory: Path) -> Path:
    """The last bytes of data/0 are the header of data/1."""
    header = _INNER.local_header()
    outer = Member(f"{ROOT}/data/0", DATA[: 64 - len(header)] + header)
    rest = [extra("data/2", PIECES[2]), extra("version", b"3\n")]
    path = directory / "npt_weights.pt"
    write_zip(path, [extra("data.pkl", VALID), outer, _INNER, *rest])
    return path


CASES.append(("members-overlap", _overlapping))
pt("prefix", prefix=b"MZ" + b"\0" * 62)
pt("prefix-not-counted", prefix=b"MZ" + b"\0" * 62, shift=-64)
pt("prefix-that-is-a-header", prefix=Member("x", b"hidden").local_header() + b"hidden")
pt("first-member-not-at-the-start", prefix=b"PK\3\4" + b"\0" * 60)
pt("offsets-shifted", shift=4)
pt("comment", end={"comment": b"hello"})
pt("comment-length-without-comment", edit=lambda raw: raw[:-2] + b"\5\0")
pt("tail-newline", tail=b"\n")
pt("tail-zeros", tail=b"\0" * 22)
pt("tail-second-zip", edit=lambda raw: raw + raw)
pt("foreign-bytes-after-the-directory", between=b"\0" * 8)
pt("disk-1", end={"disk": 1})
pt("disk-1-of-a-member", change={"data/0": {"central": {"disk": 1}}})
pt("directory-magic", change={"data/0": {"central": {"magic": b"PK\1\3"}}})
pt("directory-beyond-the-file", end={"start": 1 << 30})
pt("directory-at-0", end={"start": 0})
pt("directory-size-4-gib", end={"size": 0xFFFFFFFF})
pt("count-zero", end={"here": 0, "total": 0})
pt("count-too-small", end={"here": 5, "total": 5})
pt("count-too-large", end={"here": 7, "total": 7})
pt("count-65535", end={"here": 0xFFFF, "total": 0xFFFF})
pt("count-differs", end={"here": 5})
SATURATED = {"here": 0xFFFF, "total": 0xFFFF, "size": 0xFFFFFFFF, "start": 0xFFFFFFFF}
for _name, _lie in {
    "count-2-40": {"here": 1 << 40, "total": 1 << 40}, "count-zero": {"here": 0, "total": 0},
    "count-differs": {"here": 5}, "size-2-63": {"size": 1 << 63}, "start-2-63": {"start": 1 << 63},
    "start-0": {"start": 0}, "record-elsewhere": {"at": 0}, "record-beyond": {"at": 1 << 62},
    "record-longer": {"record_size": 1 << 40}, "two-disks": {"disks": 2}, "disk-1": {"disk": 1},
}.items():  # fmt: skip
    pt(f"zip64-end-{_name}", wide=_lie, end=SATURATED)
pt("zip64-end-contradicts-end", wide={}, end={"here": 5, "total": 5})
pt("zip64-end-missing", end=SATURATED)


def _crowded(directory: Path) -> Path:
    """The largest number of directory entries that the limit allows, all for one member."""
    member = Member("a/b")
    count = (8 << 20) // len(member.central_header(0))
    raw = member.local_header() + member.central_header(0) * count
    places = (count, count, count * len(member.central_header(0)), len(member.local_header()))
    raw += struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, *places)
    raw += struct.pack("<4sIQI", b"PK\6\7", 0, len(raw) - 56, 1)
    saturated = (0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
    return write_file(directory, raw + struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, *saturated, 0))


CASES.append(("one-member-listed-170000-times", _crowded))
pt("directory-of-9-mib", last=[extra(f"x{n}", central={"comment": b"c" * 60_000})
                               for n in range(160)])  # fmt: skip

# not a zip, or not all of one
_LEGACY = (
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}q\0(X\x10\0\0\0"
    b"protocol_sizeq\1M\xe9\x03u." + VALID
)
_TAR = (b"storages".ljust(257, b"\0") + b"ustar  \0").ljust(512, b"\0") + b"\0" * 1024
for _name, _content in {
    "empty-file": b"", "one-byte": b"P", "only-an-end-record": b"PK\5\6" + b"\0" * 18,
    "legacy-pickle": _LEGACY, "bare-pickle": PROTO + call(SYSTEM, COMMAND) + STOP, "tar": _TAR,
    "gzip": b"\x1f\x8b\x08" + b"\0" * 100, "zeros": b"\0" * 4096, "text": b"version https://git-lfs",
    "seven-zip": b"7z\xbc\xaf\x27\x1c" + b"\0" * 100,
}.items():  # fmt: skip
    CASES.append((f"file-{_name}", partial(write_file, content=_content)))
for _cut in (4, 30, 100, -1, -22, -60, -400):
    pt(f"file-cut-at-{_cut}", edit=lambda raw, cut=_cut: raw[:cut])
pt("file-without-its-first-byte", edit=lambda raw: raw[1:])
pt("file-half-zeros", edit=lambda raw: raw[: len(raw) // 2].ljust(len(raw), b"\0"))
