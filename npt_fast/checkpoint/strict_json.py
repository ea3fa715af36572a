"""Read and write JSON, with limits on size, nesting and numbers.

Files that every reader must understand alike, and all files that we write, are strict: UTF-8
without duplicate keys, NaN or infinity. Small files beside the weights can be written by other
programs, and less strict: Windows editors add a byte order mark or write UTF-16, and Python's json
writes NaN and Infinity. `parse_foreign` reads these too.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from npt_fast.checkpoint import file_kind
from npt_fast.checkpoint.source_file import SourceFile
from npt_fast.errors import CheckpointError

MAX_BYTES = 100_000_000
"""Limit of any document in bytes; the safetensors format sets it for its header."""
MAX_SMALL = 4 << 20
"""Limit in bytes of a file that does not grow with the number of tensors; parsed, it may take 30
times this memory."""

# An empty list takes 3 bytes here and 64 in memory. A tensor in a safetensors header takes three
# objects and lists, and at least 55 bytes.
_MANY_CONTAINERS = 400_000
_BYTES_PER_CONTAINER = 16
_MAX_DEPTH = 100  # later code recurses into the content; Python's limit is 1,000 calls
_MAX_INTEGER = 1 << 127  # smaller ones fit a float and, in 16 bytes, the pickle that a merge writes
# 2^127 has 39 digits
_ODD_INTEGER = re.compile(r"-0(?![.0-9eE])|[0-9]{39}")


def parse_object(data: bytes, where: str, *, floats: bool = True) -> dict[str, Any]:
    """Parse a JSON object from UTF-8 bytes.

    Args:
        data: bytes of the document.
        where: name of the file, for messages.
        floats: whether numbers with a fraction or exponent are allowed.

    Raises:
        CheckpointError: the document is not UTF-8, not JSON, not an object, nested more than 100
            deep, or has duplicate keys, NaN, infinity, the integer -0, a number that no float can
            hold, or an integer of more than 127 bits.
    """
    refuse = _refuse_number(where)
    return _parse(
        data, "utf-8", where, refuse, _float(where) if floats else refuse, _integer(where)
    )


def parse_foreign(data: bytes, where: str, limit: int = MAX_SMALL) -> dict[str, Any]:
    """Parse a JSON object that another program may have written.

    It may be UTF-8, UTF-16 or UTF-32, and may contain NaN and Infinity, as Python writes them.

    Args:
        data: bytes of the document.
        where: name of the file, for messages.
        limit: maximum size in bytes.

    Raises:
        CheckpointError: the document is not JSON, not an object, nested more than 100 deep, over
            the limit, or has duplicate keys, a number that no float can hold, or an integer of more
            than 127 bits.
    """
    _check_size(len(data), where, limit)
    integer = _integer(where, minus_zero=True)
    try:
        return _parse(data, json.detect_encoding(data), where, float, _float(where), integer)
    except CheckpointError:
        if kind := file_kind.recognise(data[: file_kind.HEAD]):
            raise CheckpointError(f"{where}: is {kind}") from None
        raise


def _parse(
    data: bytes,
    encoding: str,
    where: str,
    constant: Callable[[str], Any],
    number: Callable[[str], Any],
    integer: Callable[[str], int],
) -> dict[str, Any]:
    def fail(problem: str) -> CheckpointError:
        return CheckpointError(f"{where}: {problem}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        # json would keep the last of equal keys in silence, other readers the first
        found = dict(pairs)
        if len(found) != len(pairs):
            counts = Counter(name for name, _ in pairs)
            raise fail(f"key {counts.most_common(1)[0][0]!r:.80} occurs twice")
        return found

    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise fail(f"not valid JSON: not {encoding} from byte {error.start} on") from None
    # counted before parsing, which would build them all
    containers = text.count("{") + text.count("[")
    if containers > _MANY_CONTAINERS + len(data) // _BYTES_PER_CONTAINER:
        raise fail("too many objects and lists; refused")
    try:
        parsed = json.loads(
            text,
            object_pairs_hook=unique,
            parse_constant=constant,
            parse_float=number,
            # a header of 200,000 tensors has a million integers: check them only if one looks odd
            parse_int=integer if _ODD_INTEGER.search(text) else None,
        )
    except RecursionError:
        raise fail("not valid JSON: nested too deep") from None
    except ValueError as error:
        raise fail(f"not valid JSON: {error!s:.120}") from None
    if not isinstance(parsed, dict):
        raise fail("not a JSON object")
    level: list[Any] = [parsed]
    for _ in range(_MAX_DEPTH):
        inner = (i.values() if isinstance(i, dict) else i for i in level)
        level = [item for items in inner for item in items if isinstance(item, (dict, list))]
    if level:
        raise fail(f"not usable: it is nested more than {_MAX_DEPTH} deep")
    return parsed


def _refuse_number(where: str) -> Callable[[str], Any]:
    def refuse(text: str) -> Any:
        raise CheckpointError(f"{where}: the number {text:.40} is not allowed here")

    return refuse


def _float(where: str) -> Callable[[str], float]:
    """A converter like `float` that refuses numbers which would overflow or underflow."""

    def convert(text: str) -> float:
        value = float(text)
        # 1e-400 becomes 0.0
        vanished = not value and text.lower().partition("e")[0].strip("-.0")
        if math.isinf(value) or vanished:
            raise CheckpointError(f"{where}: the number {text:.40} does not fit a 64-bit float")
        return value

    return convert


def _integer(where: str, *, minus_zero: bool = False) -> Callable[[str], int]:
    """A converter like `int` that refuses numbers that a float or another reader cannot hold."""

    def convert(text: str) -> int:
        value = int(text)
        if abs(value) >= _MAX_INTEGER or (text == "-0" and not minus_zero):
            raise CheckpointError(f"{where}: the number {text:.40} is not allowed here")
        return value

    return convert


def _check_size(size: int, where: str, limit: int) -> None:
    if size > limit:
        raise CheckpointError(f"{where}: {size:,} bytes of JSON; more than {limit:,} are refused")


def read_object(path: Path) -> dict[str, Any]:
    """Read the JSON object of a small file that npt_fast wrote.

    Raises:
        CheckpointError: as in `parse_object`; or the file cannot be read, or is over 4 MiB.
    """
    return parse_object(_read(path, MAX_SMALL), str(path))


def read_foreign(path: Path, limit: int = MAX_SMALL) -> dict[str, Any]:
    """Read the JSON object of a file that another program may have written.

    Raises:
        CheckpointError: as in `parse_foreign`, or the file cannot be read.
    """
    return parse_foreign(_read(path, limit), str(path), limit)


def _read(path: Path, limit: int) -> bytes:
    file = SourceFile.of(path)
    _check_size(file.size, str(path), limit)
    return file.read(0, file.size)


def dump(
    value: dict[str, Any],
    where: str = "a JSON document",
    *,
    allow_nan: bool = False,
    limit: int = MAX_SMALL,
) -> bytes:
    """Bytes of a JSON file: UTF-8, indented, keys in the given order, a newline at the end.

    Args:
        value: content of the file.
        where: name of the file, for messages.
        allow_nan: whether to write NaN and Infinity as Python does; only `parse_foreign` reads
            them.
        limit: maximum size in bytes that the file's reader accepts.

    Raises:
        ValueError: a number is not finite, and `allow_nan` is False.
        CheckpointError: the file's reader would refuse the bytes.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=allow_nan) + "\n"
    data = text.encode("utf-8", "backslashreplace")  # a path that is not Unicode becomes \\udcxx
    _check_size(len(data), where, limit)
    if allow_nan:
        parse_foreign(data, where, limit)
    else:
        parse_object(data, where)
    return data
