"""JSON of two kinds, bounded in size.

What must mean the same to every reader is UTF-8 without duplicate keys, NaN or infinity; so is all
that we write. The small files beside the weights are other people's: Windows editors add a byte
order mark or write UTF-16, and Python's json writes NaN and Infinity. These are read too.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from npt_fast.checkpoint import file_kind
from npt_fast.checkpoint.source_file import SourceFile
from npt_fast.errors import CheckpointError

MAX_BYTES = 100_000_000
"""Of any document: the limit that the safetensors format sets for its header."""

# An empty list takes 3 bytes here and 64 in memory. A tensor in a safetensors header takes three
# objects and lists, and at least 55 bytes.
_MANY_CONTAINERS = 400_000
_BYTES_PER_CONTAINER = 16
_MAX_DEPTH = 100  # of other people's files: what is read is walked by recursion later


def parse_object(data: bytes, where: str, *, floats: bool = True) -> dict[str, Any]:
    """A JSON object from UTF-8 bytes.

    Args:
        data: the document.
        where: file, for messages.
        floats: whether numbers with a fraction or exponent are allowed.

    Raises:
        CheckpointError: not UTF-8, not JSON, not an object, duplicate keys, NaN or infinity, a
            number that no float can hold.
    """
    refuse = _refuse_number(where)
    return _parse(data, "utf-8", where, refuse, _float(where) if floats else refuse)


def parse_foreign(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object that somebody else wrote: UTF-8, 16 or 32, NaN and infinity as Python has them.

    Raises:
        CheckpointError: not JSON, not an object, duplicate keys, a number that no float can hold,
            nested too deep, or over 100 MB.
    """
    _check_size(len(data), where)
    try:
        parsed = _parse(data, json.detect_encoding(data), where, float, _float(where))
    except CheckpointError:
        if kind := file_kind.recognise(data[: file_kind.HEAD]):
            raise CheckpointError(f"{where}: is {kind}") from None
        raise
    level: list[Any] = [parsed]
    for _ in range(_MAX_DEPTH):
        inner = (i.values() if isinstance(i, dict) else i for i in level)
        level = [item for items in inner for item in items if isinstance(item, (dict, list))]
    if level:
        raise CheckpointError(f"{where}: not usable: it is nested more than {_MAX_DEPTH} deep")
    return parsed


def _parse(
    data: bytes,
    encoding: str,
    where: str,
    constant: Callable[[str], Any],
    number: Callable[[str], Any],
) -> dict[str, Any]:
    def fail(problem: str) -> CheckpointError:
        return CheckpointError(f"{where}: {problem}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            counts = Counter(name for name, _ in pairs)
            raise fail(f"key {counts.most_common(1)[0][0]!r:.80} occurs twice")
        return found

    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise fail(f"not valid JSON: not {encoding} from byte {error.start} on") from None
    containers = text.count("{") + text.count("[")
    if containers > _MANY_CONTAINERS + len(data) // _BYTES_PER_CONTAINER:
        raise fail("too many objects and lists; refused")
    try:
        parsed = json.loads(
            text,
            object_pairs_hook=unique,
            parse_constant=constant,
            parse_float=number,
        )
    except RecursionError:
        raise fail("not valid JSON: nested too deep") from None
    except ValueError as error:
        raise fail(f"not valid JSON: {error!s:.120}") from None
    if not isinstance(parsed, dict):
        raise fail("not a JSON object")
    return parsed


def _refuse_number(where: str) -> Callable[[str], Any]:
    def refuse(text: str) -> Any:
        raise CheckpointError(f"{where}: the number {text:.40} is not allowed here")

    return refuse


def _float(where: str) -> Callable[[str], float]:
    """`float`, except that a number does not become infinity, or 0, for want of exponents."""

    def convert(text: str) -> float:
        value = float(text)
        vanished = not value and text.lower().partition("e")[0].strip("-.0")
        if math.isinf(value) or vanished:
            raise CheckpointError(f"{where}: the number {text:.40} does not fit a 64-bit float")
        return value

    return convert


def _check_size(size: int, where: str) -> None:
    if size > MAX_BYTES:
        raise CheckpointError(
            f"{where}: {size:,} bytes of JSON; more than {MAX_BYTES:,} are refused"
        )


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a small file that npt_fast wrote.

    Raises:
        CheckpointError: as `parse_object`, or the file is unreadable or over 100 MB.
    """
    return parse_object(_read(path), str(path))


def read_foreign(path: Path) -> dict[str, Any]:
    """The JSON object in a small file of a checkpoint, whoever wrote it.

    Raises:
        CheckpointError: as `parse_foreign`, or the file is unreadable.
    """
    return parse_foreign(_read(path), str(path))


def _read(path: Path) -> bytes:
    file = SourceFile.of(path)
    _check_size(file.size, str(path))
    return file.read(0, file.size)


def dump(
    value: dict[str, Any], where: str = "a JSON document", *, allow_nan: bool = False
) -> bytes:
    """The bytes we write: indented, UTF-8, keys in the given order, a newline at the end.

    Args:
        value: what to write.
        where: file, for messages.
        allow_nan: write NaN and infinity as Python does; only `parse_foreign` reads them.

    Raises:
        ValueError: a number is not finite.
        CheckpointError: over 100 MB, which could not be read again.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=allow_nan) + "\n"
    data = text.encode("utf-8", "backslashreplace")  # a path that is not Unicode becomes \\udcxx
    _check_size(len(data), where)
    return data
