"""JSON that means the same to every reader: no duplicate keys, no NaN, a bounded size."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from npt_fast.checkpoint.source_file import SourceFile
from npt_fast.errors import CheckpointError

MAX_BYTES = 100_000_000
"""Of any document: the limit that the safetensors format sets for its header."""

# An empty list takes 3 bytes here and 64 in memory. A tensor in a safetensors header takes three
# objects and lists, and at least 55 bytes.
_MANY_CONTAINERS = 400_000
_BYTES_PER_CONTAINER = 16


def parse_object(data: bytes, where: str, *, floats: bool = True) -> dict[str, Any]:
    """A JSON object from UTF-8 bytes.

    Args:
        data: the document.
        where: file, for messages.
        floats: whether numbers with a fraction or exponent are allowed.

    Raises:
        CheckpointError: not UTF-8, not JSON, not an object, duplicate keys, NaN or infinity.
    """

    def fail(problem: str) -> CheckpointError:
        return CheckpointError(f"{where}: {problem}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            counts = Counter(name for name, _ in pairs)
            raise fail(f"key {counts.most_common(1)[0][0]!r:.80} occurs twice")
        return found

    def refuse(text: str) -> Any:
        raise fail(f"the number {text:.40} is not allowed here")

    containers = data.count(b"{") + data.count(b"[")
    if containers > _MANY_CONTAINERS + len(data) // _BYTES_PER_CONTAINER:
        raise fail("too many objects and lists; refused")
    try:
        parsed = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=unique,
            parse_constant=refuse,
            parse_float=float if floats else refuse,
        )
    except (ValueError, RecursionError) as error:
        raise fail(f"not valid JSON: {error!s:.120}") from None
    if not isinstance(parsed, dict):
        raise fail("not a JSON object")
    return parsed


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a small file of a checkpoint.

    Raises:
        CheckpointError: as `parse_object`, or the file is unreadable or over 100 MB.
    """
    file = SourceFile.of(path)
    if file.size > MAX_BYTES:
        raise CheckpointError(
            f"{path}: {file.size:,} bytes of JSON; more than {MAX_BYTES:,} are refused"
        )
    return parse_object(file.read(0, file.size), str(path))


def dump(value: dict[str, Any]) -> bytes:
    """The bytes we write: indented, UTF-8, keys in the given order, a newline at the end."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace")  # a path that is not Unicode becomes \\udcxx
