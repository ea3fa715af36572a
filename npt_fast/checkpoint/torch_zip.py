"""The zip container of a ``.pt`` file, read strictly.

`torch.save` writes an uncompressed zip: ``<root>/data.pkl`` describes the object, and every storage
is a stored member ``<root>/data/<key>``. Zip readers disagree about duplicates, prefixes and
overlaps, so that one file can have two meanings. This reader accepts only files that have the same
meaning for every reader. It also keeps the CRC-32 of every record, which torch writes and never
checks.
"""

from __future__ import annotations

import math
import re
import struct
import zlib
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from npt_fast.checkpoint import file_kind
from npt_fast.checkpoint.source_file import SourceFile
from npt_fast.checkpoint.tensor_entry import Record, TensorEntry
from npt_fast.checkpoint.torch_pickle import MAX_PICKLE_BYTES, decode
from npt_fast.checkpoint.torch_symbols import StorageRef, TensorRef
from npt_fast.errors import CheckpointError

LOCAL = struct.Struct("<4sHHHHHIIIHH")
CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
END = struct.Struct("<4sHHHHIIH")
END64_LOCATOR = struct.Struct("<4sIQI")
END64 = struct.Struct("<4sQHHIIQQQQ")
_MAX_32 = 0xFFFFFFFF
_MAX_ENTRY = 4096  # bytes per member in the directory: torch writes 80, long names need 1,100
_FOLDER = 0x10  # bit of the external attributes
_HARMLESS_FLAGS = 0x0808  # sizes also follow the data; names are UTF-8
# allowed content of torch's small members; with another byte order, tensors would be misread
_SMALL_MEMBERS = {
    "version": rb"[1-9]|10",
    "byteorder": rb"little",
    ".format_version": rb"[0-9]{1,4}",
    ".storage_alignment": rb"[1-9][0-9]{0,5}",
    ".data/serialization_id": rb"[ -~]{0,100}",
}
_MEMBER = re.compile(r"[^/\\\x00-\x1f\x7f]{1,255}(/[^/\\\x00-\x1f\x7f]{1,255}){1,3}")


class Members:
    """The members of a zip by name, without the root folder of their names.

    Every tensor has a member, so that there can be 370,000: they are kept as rows of arrays.

    Attributes:
        file: the zip file.
        offsets: first byte of each member's data.
        sizes: number of bytes of each member.
        crcs: CRC-32 of each member; 0 if none was recorded.
    """

    def __init__(self, file: SourceFile) -> None:
        self.file = file
        self.offsets = array("Q")
        self.sizes = array("Q")
        self.crcs = array("L")
        self._storages = array("q")  # row of data/0, data/1, ...; -1 if there is no such member
        self._others: dict[str, int] = {}

    @property
    def hold_storages(self) -> bool:
        return len(self._storages) > 0 or any(name.startswith("data/") for name in self._others)

    def append(self, name: str, offset: int, size: int, crc: int) -> bool:
        """Add a member; returns False, and adds nothing, if its name exists already."""
        number = self._number(name)
        if self._row(name, number) >= 0:
            return False
        row = len(self.offsets)
        if number is None or number > 2 * row + 100:  # torch counts up; other numbers cost memory
            self._others[name] = row
        else:
            self._storages.extend([-1] * (number + 1 - len(self._storages)))
            self._storages[number] = row
        self.offsets.append(offset)
        self.sizes.append(size)
        self.crcs.append(crc)
        return True

    def get(self, name: str) -> Record | None:
        row = self._row(name, self._number(name))
        if row < 0:
            return None
        return Record(self.file, self.offsets[row], self.sizes[row], self.crcs[row])

    def _row(self, name: str, number: int | None) -> int:
        if number is not None and number < len(self._storages) and self._storages[number] >= 0:
            return self._storages[number]
        return self._others.get(name, -1)

    @staticmethod
    def _number(name: str) -> int | None:
        digits = name.removeprefix("data/")
        plain = digits.isdecimal() and len(digits) < 10 and len(digits) + 5 == len(name)
        return int(digits) if plain and (digits[0] != "0" or digits == "0") else None


@dataclass(frozen=True, slots=True)
class TorchZip:
    """An opened ``.pt`` file.

    Attributes:
        file: the file.
        content: object that was saved, with a `TensorRef` for every tensor.
        members: all members of the zip.
        pickled: place of the pickle that describes `content`.
    """

    file: SourceFile
    content: Any
    members: Members
    pickled: Record

    @property
    def header(self) -> Record:
        """The bytes that describe the content: the pickle, or the whole file without tensors."""
        whole = Record(self.file, 0, self.file.size)
        return self.pickled if self.members.hold_storages else whole

    def entry(self, name: str, ref: TensorRef) -> TensorEntry:
        """The tensor that a reference means, with its place in the file.

        Args:
            name: name for the tensor.
            ref: reference from `content`.

        Raises:
            CheckpointError: the tensor reaches outside its storage, or repeats elements.
        """
        file = self.file
        record = self.members.get(f"data/{ref.storage.key}")
        where = f"{file.path}: {name}"
        assert record is not None, "read_torch_zip has looked for it"
        itemsize = ref.dtype.itemsize
        extent = first = 0
        if math.prod(ref.shape):
            first = ref.offset
            span = (s * (n - 1) for n, s in zip(ref.shape, ref.strides, strict=True))
            extent = 1 + sum(span)
        if (first + extent) * itemsize > record.nbytes:
            raise CheckpointError(f"{where}: reaches outside its storage")
        strides = _strides_if_needed(ref, where)
        if strides is None and math.prod(ref.shape) * itemsize == record.nbytes:
            return TensorEntry(name, ref.dtype, ref.shape, file, record.offset, record.crc32)
        offset = record.offset + first * itemsize
        # no CRC of its own: the record's covers more than this tensor, or another order
        return TensorEntry(name, ref.dtype, ref.shape, file, offset, 0, strides, record)


def _strides_if_needed(ref: TensorRef, where: str) -> tuple[int, ...] | None:
    dense = dense_strides(ref.shape)
    relevant = [
        (stride, size, step)
        for stride, size, step in zip(ref.strides, ref.shape, dense, strict=True)
        if size > 1
    ]
    if not math.prod(ref.shape) or all(stride == step for stride, _, step in relevant):
        return None
    # every stride must step over all that shorter ones reach, or elements repeat: with strides of
    # 0, a record of 4 bytes could stand for terabytes
    reach = 0
    for stride, size, _ in sorted(relevant):
        if stride <= reach:
            raise CheckpointError(f"{where}: its strides {ref.strides} overlap; save a clone()")
        reach += stride * (size - 1)
    return ref.strides


def dense_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides of a contiguous tensor, in elements."""
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return tuple(strides)


def read_torch_zip(file: SourceFile) -> TorchZip:
    """Read the directory and the pickle of a ``.pt`` file, but no tensor data.

    Raises:
        CheckpointError: the file is from torch before 1.6, is a zip with more than one meaning, or
            holds more than plain data and tensors.
    """
    members, pickled, data = read_members(file)

    def check_record(storage: StorageRef) -> None:  # also of unused storages, which torch reads
        record = members.get(f"data/{storage.key}")
        if record is None:
            raise CheckpointError(f"{file.path}: record data/{storage.key:.40} is missing")
        expected = storage.numel * (storage.dtype.itemsize if storage.dtype else 1)
        if record.nbytes != expected:
            raise CheckpointError(
                f"{file.path}: record data/{storage.key:.40} has {record.nbytes} bytes, "
                f"{expected} expected"
            )

    content = decode(data, f"{file.path}: data.pkl", check_record)
    return TorchZip(file, content, members, pickled)


def read_members(file: SourceFile) -> tuple[Members, Record, bytes]:
    """The members of a ``.pt`` file, the place of its pickle, and the bytes of the pickle.

    Raises:
        CheckpointError: like `read_torch_zip`, except that the pickle is not decoded.
    """
    with file.open() as fd:
        members = _read_directory(file, fd)
        pickled = members.get("data.pkl")
        if members.get("constants.pkl"):
            raise CheckpointError(f"{file.path}: a TorchScript archive; not a checkpoint")
        if pickled is None:
            raise CheckpointError(f"{file.path}: holds no data.pkl; not a torch checkpoint")
        if pickled.nbytes > MAX_PICKLE_BYTES:
            raise CheckpointError(
                f"{file.path}: a data.pkl of {pickled.nbytes:,} bytes; "
                f"more than {MAX_PICKLE_BYTES:,} are refused"
            )
        for small, allowed in _SMALL_MEMBERS.items():
            member = members.get(small)
            if member is None and small != "version":
                continue  # older versions of torch write `version` only
            value = file.read_at(fd, member.offset, min(member.nbytes, 128)) if member else b""
            if not re.fullmatch(allowed, value.strip(b"\n")):
                raise CheckpointError(f"{file.path}: {small} is {value!r}; cannot be read")
        data = file.read_at(fd, pickled.offset, pickled.nbytes)
    # 0: saved without sums (design.md#file-readers)
    if pickled.crc32 and zlib.crc32(data) != pickled.crc32:
        raise CheckpointError(f"{file.path}: data.pkl is damaged (CRC-32 differs)")
    return members, pickled, data


def _read_directory(file: SourceFile, fd: int) -> Members:
    """All members of a zip, after all checks that need only its directory and local headers."""

    def fail(problem: str) -> CheckpointError:
        return CheckpointError(f"{file.path}: {problem}")

    head = file.read_at(fd, 0, min(file.size, file_kind.HEAD))
    if not head.startswith(b"PK\x03\x04"):
        raise fail(f"not a zip-format torch file: it is {file_kind.describe(head)}")
    start, size, total, end = _locate_directory(file, fd, fail)
    # no bytes between the directory and its end record, and no entry shorter than its fixed part
    if start + size != end or not CENTRAL.size <= size / max(total, 1) <= _MAX_ENTRY:
        raise fail("its zip directory is malformed")
    directory = file.read_at(fd, start, size)
    if b"/data.pkl" not in directory and b"/constants.pkl" not in directory:
        raise fail(f"not a torch file: it is {file_kind.describe_zip(directory)}")
    members = Members(file)
    headers_at = array("Q")
    folded: set[str] = set()  # torch ignores case when it looks up names
    root = ""
    position = 0
    for _ in range(total):
        if position + CENTRAL.size > size:
            raise fail("its zip directory is malformed")
        (
            magic, _, _, flags, method, _, _, crc, packed, nbytes, name_length, extra_length,
            comment_length, disk, _, attributes, header_at,
        ) = CENTRAL.unpack_from(directory, position)  # fmt: skip
        if magic != b"PK\x01\x02" or disk:
            raise fail("its zip directory is malformed")
        position += CENTRAL.size
        raw_name = directory[position : position + name_length]
        extra = directory[position + name_length : position + name_length + extra_length]
        position += name_length + extra_length + comment_length
        try:
            name = raw_name.decode("ascii")
        except UnicodeDecodeError:
            raise fail(f"a member has the odd name {raw_name!r:.80}; refused") from None
        if not _MEMBER.fullmatch(name) or ".." in name.split("/"):
            raise fail(f"a member has the odd name {name!r:.80}; refused")
        own_root, _, name = name.partition("/")
        root = root or own_root
        if own_root != root:
            raise fail("members under more than one root; refused")
        if attributes & _FOLDER:
            raise fail(f"member {name} is marked as a folder; torch would not read it, refused")
        if flags & ~_HARMLESS_FLAGS:
            raise fail(f"member {name} is encrypted or unusual (flags {flags:#x}); refused")
        if method:
            raise fail(f"member {name} is compressed; torch.save never compresses, refused")
        nbytes, packed, header_at = _wide_fields(extra, nbytes, packed, header_at, fail)
        if packed != nbytes:
            raise fail(f"member {name} has two different sizes; refused")
        if header_at + LOCAL.size > start:
            raise fail(f"member {name} lies outside the file")
        local = LOCAL.unpack(file.read_at(fd, header_at, LOCAL.size))
        local_name = file.read_at(fd, header_at + LOCAL.size, local[9])
        # zip readers go by one header or by the other
        if local_name != raw_name or not _agrees(local, flags, crc, nbytes):
            raise fail(f"member {name} is described in two different ways; refused")
        offset = header_at + LOCAL.size + local[9] + local[10]
        if offset + nbytes > start:
            raise fail(f"member {name} reaches outside the file; truncated?")
        lower = name.lower()
        new = members.append(name, offset, nbytes, crc) and lower not in folded
        if not new or (lower != name and members.get(lower)):
            raise fail(f"member {name} occurs twice; refused")
        if lower != name:
            folded.add(lower)
        headers_at.append(header_at)
    if position != size:
        raise fail("its zip directory is malformed")
    if not headers_at:
        raise fail("an empty zip; not a torch checkpoint")
    # in file order: members that overlap could mean two things at once
    reached = 0
    for row in sorted(range(len(headers_at)), key=headers_at.__getitem__):
        if headers_at[row] < reached or (not reached and headers_at[row]):
            raise fail(
                f"the member at byte {headers_at[row]} overlaps another, or follows foreign bytes; "
                "refused"
            )
        reached = members.offsets[row] + members.sizes[row]
    return members


def _agrees(local: tuple[Any, ...], flags: int, crc: int, nbytes: int) -> bool:
    """Whether the local header of a member agrees with the directory."""
    magic, _, local_flags, method, _, _, local_crc, packed, size, _, _ = local
    if magic != b"PK\x03\x04" or method or (local_flags ^ flags) & ~_HARMLESS_FLAGS:
        return False
    # a local header may lack sizes and CRC if they follow the data, and sizes if they need 64 bits
    later = local_flags & 0x08
    crc_agrees = local_crc == crc or (later and not local_crc)
    sizes_agree = all(
        value in (nbytes, _MAX_32) or (later and not value) for value in (packed, size)
    )
    return bool(crc_agrees and sizes_agree)


def _locate_directory(
    file: SourceFile, fd: int, fail: Callable[[str], CheckpointError]
) -> tuple[int, int, int, int]:
    """Offset, size and entry count of the central directory, and the offset of its end record."""
    end_at = max(file.size - END.size, 0)
    magic, disk, start_disk, here, total, size, start, comment = END.unpack(
        file.read_at(fd, end_at, file.size - end_at).ljust(END.size, b"\0")
    )
    # no comment: it could hold another end record, which other zip readers would find first
    if magic != b"PK\x05\x06" or comment or disk or start_disk or here != total:
        raise fail(
            "does not end with a zip directory; truncated, or followed by other data: "
            "copy or download it again"
        )
    # a zip64 file has a locator directly before the end record, and its record before the locator
    locator_at = end_at - END64_LOCATOR.size
    wide = False
    if locator_at >= END64.size:
        magic, disk, end64_at, disks = END64_LOCATOR.unpack(
            file.read_at(fd, locator_at, END64_LOCATOR.size)
        )
        wide = magic == b"PK\x06\x07"
    if not wide:
        return start, size, total, end_at
    if disk or disks != 1 or end64_at + END64.size != locator_at:
        raise fail("its zip64 directory is malformed")
    magic, record_size, _, _, disk, start_disk, here64, total64, size64, start64 = END64.unpack(
        file.read_at(fd, end64_at, END64.size)
    )
    agrees = all(
        narrow in (value, limit)
        for narrow, value, limit in (
            (total, total64, 0xFFFF),
            (size, size64, _MAX_32),
            (start, start64, _MAX_32),
        )
    )
    if magic != b"PK\x06\x06" or record_size != END64.size - 12 or not agrees:
        raise fail("its zip64 directory is malformed")
    if disk or start_disk or here64 != total64:
        raise fail("its zip64 directory is malformed")
    return start64, size64, total64, end64_at


def _wide_fields(
    extra: bytes, nbytes: int, packed: int, header_at: int, fail: Callable[[str], CheckpointError]
) -> tuple[int, int, int]:
    """The three sizes, with those that need 64 bits taken from the zip64 extra field."""
    fields = [nbytes, packed, header_at]
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, position)
        body = extra[position + 4 : position + 4 + length]
        position += 4 + length
        if kind == 1:  # zip64: one value for each field that is full, in this order
            missing = [i for i, value in enumerate(fields) if value == _MAX_32]
            if len(body) < 8 * len(missing):
                raise fail("a zip64 field is malformed")
            for slot, index in enumerate(missing):
                (fields[index],) = struct.unpack_from("<Q", body, 8 * slot)
            break
    return fields[0], fields[1], fields[2]
