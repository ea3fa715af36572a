"""Read and write safetensors headers; the data of written files can start at any page offset.

The reader refuses everything that two implementations could understand differently. This includes
files that the safetensors library accepts: with duplicate names, unknown fields, 64-bit offsets
that wrap around, or misaligned data.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from npt_fast.checkpoint import file_kind
from npt_fast.checkpoint.dtypes import BY_NAME, DType
from npt_fast.checkpoint.source_file import SourceFile
from npt_fast.checkpoint.strict_json import MAX_BYTES, parse_object
from npt_fast.checkpoint.tensor_entry import Record, TensorEntry
from npt_fast.errors import CheckpointError
from npt_fast.schema import is_text

_MAX_NAME_BYTES = 4096
_MAX_RANK = 64
_LIMIT = 1 << 63


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """An opened safetensors file.

    Attributes:
        entries: tensors by name, in file order.
        metadata: strings from ``__metadata__``.
        header: place of the length prefix and the header.
    """

    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    header: Record


def read_safetensors(file: SourceFile, limit: int = MAX_BYTES) -> SafetensorsFile:
    """Read the header of a safetensors file, but no tensor data.

    Args:
        file: file to read.
        limit: maximum size of the header in bytes.

    Raises:
        CheckpointError: the file is not a safetensors file, can be understood in more than one
            way, or has a header over the limit.
    """

    def fail(problem: str) -> CheckpointError:
        return CheckpointError(f"{file.path}: {problem}")

    with file.open() as fd:
        head = file.read_at(fd, 0, min(file.size, file_kind.HEAD))
        if not file_kind.may_be_safetensors(head):
            raise fail(f"not a safetensors file: it is {file_kind.describe(head)}")
        (length,) = struct.unpack_from("<Q", head)
        if length > file.size - 8:
            raise fail(
                f"a header of {length} bytes in a file of {file.size}; truncated: "
                "copy or download it again"
            )
        if length > limit:
            raise fail(f"a header of {length:,} bytes; at most {limit:,} are read")
        header = file.read_at(fd, 8, length)
    if not header.rstrip(b" ").endswith(b"}"):
        raise fail("its header is not a JSON object; not a safetensors file")
    # a header has no fractions; 1.0 for a size is taken by some readers only
    described = parse_object(header, f"{file.path}: header", floats=False)
    metadata = described.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(map(is_text, chain(metadata, metadata.values()))):
        raise fail("its __metadata__ must map strings to strings of valid Unicode")

    data_start = 8 + length
    entries = []
    for name, fields in described.items():
        dtype, shape, begin, end = _tensor_fields(name, fields, fail)
        if math.prod(shape) * dtype.bits != 8 * (end - begin):
            raise fail(f"{name}: {end - begin} bytes do not fit {dtype.name} {list(shape)}")
        if (data_start + begin) % max(dtype.bits // 8, 1):
            raise fail(f"{name}: its data is not aligned to its type; save the file again")
        entries.append((begin, end, name, dtype, shape))
    entries.sort(key=lambda entry: entry[:2])
    reached = 0
    found: dict[str, TensorEntry] = {}
    for begin, end, name, dtype, shape in entries:
        if begin != reached:
            raise fail(f"{name}: its data leaves a hole or overlaps another tensor's")
        reached = end
        found[name] = TensorEntry(name, dtype, shape, file, data_start + begin)
    if data_start + reached != file.size:
        raise fail(
            f"{file.size} bytes, {data_start + reached} described; truncated or extended: "
            "copy or download it again"
        )
    if data_start % 8:
        raise fail("its data does not begin at a multiple of 8 bytes; save the file again")
    return SafetensorsFile(found, metadata, Record(file, 0, data_start))


def _tensor_fields(name: str, fields: Any, fail: Any) -> tuple[DType, tuple[int, ...], int, int]:
    shown = f"{name!r:.80}"
    printable = name and not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in name)
    if not printable or ".." in name.replace("\\", "/").split("/"):
        raise fail(f"the tensor name {shown} is not usable")
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise fail(f"the tensor name {shown} is not valid Unicode") from None
    if size > _MAX_NAME_BYTES:
        raise fail(f"the tensor name {shown}... is too long")
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise fail(f"{shown}: must have exactly dtype, shape and data_offsets")
    dtype_name = fields["dtype"] if isinstance(fields["dtype"], str) else "of a wrong type"
    dtype = BY_NAME.get(dtype_name)
    if dtype is None or not dtype.safetensors:
        raise fail(f"{shown}: unknown dtype {dtype_name:.40}")
    shape, offsets = fields["shape"], fields["data_offsets"]
    if not _are_counts(shape) or len(shape) > _MAX_RANK:
        raise fail(f"{shown}: malformed shape")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise fail(f"{shown}: malformed data_offsets")
    return dtype, tuple(shape), offsets[0], offsets[1]


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < _LIMIT for v in values)


def build_header(
    tensors: Iterable[tuple[str, DType, tuple[int, ...], int, int]],
    metadata: Mapping[str, str],
    alignment: int,
    phase: int,
) -> bytes:
    """Length prefix and header, padded so that the data begins at `phase` modulo `alignment`.

    Args:
        tensors: name, type, shape, first byte and byte after the last of each tensor; bytes are
            counted from the start of the data.
        metadata: strings for ``__metadata__``.
        alignment: power of two.
        phase: multiple of 8 below `alignment`.

    Raises:
        CheckpointError: the header exceeds what the format allows.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    for name, dtype, shape, begin, end in tensors:
        header[name] = {"dtype": dtype.name, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    # the format allows spaces behind the header
    text += b" " * ((phase - 8 - len(text)) % alignment)
    if len(text) > MAX_BYTES:
        raise CheckpointError(
            f"a safetensors header of {len(text):,} bytes for {len(header) - 1:,} tensors; the "
            f"format allows {MAX_BYTES:,}: choose a smaller --max_shard_size, or --format pt"
        )
    return struct.pack("<Q", len(text)) + text
