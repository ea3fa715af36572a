"""The origin of a modulation: plain data that can be saved, and its description in a line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from npt_fast.schema import Kind, is_plain

_DEEPEST = 64  # levels of nesting; strict_json stops at 100
_LARGEST = 3 << 20  # bytes as JSON in the header of a file, which may have 4 MiB
_LONGEST = 1000  # characters of a description


def _can_be_saved(origin: Any) -> bool:
    # is_plain first: json.dumps would write a shared part once per path to it, endlessly in a cycle
    if not isinstance(origin, Mapping) or not is_plain(origin, _DEEPEST, _LARGEST):
        return False
    text = json.dumps(origin, ensure_ascii=False)
    return len(json.dumps(text, ensure_ascii=False).encode()) <= _LARGEST


ORIGIN = Kind(
    "a mapping of texts, finite numbers, true, false, null, lists and mappings, at most "
    f"{_DEEPEST} deep and {_LARGEST:,} bytes long",
    _can_be_saved,
)
"""The form that an origin must have to be saved."""


def describe(origin: Mapping[str, Any]) -> str:
    """Describe an origin in a line of at most 1,000 characters; "unknown" if it says nothing."""
    pieces: list[str] = []
    try:
        for piece in _pieces(origin):  # lazily: 30 times m + m have 2^30 pieces
            pieces.append(piece)
            if sum(map(len, pieces)) > _LONGEST:
                return "".join(pieces)[: _LONGEST - 1] + "…"
        return "".join(pieces)
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError):
        return "unknown"  # an origin from a file may hold anything


def _pieces(origin: Mapping[str, Any]) -> Iterator[str]:
    if "text" in origin:
        positions = origin.get("positions") or []
        where = f"mean of {len(positions)} tokens" if len(positions) > 1 else f"at {positions}"
        yield f"{json.dumps(origin['text'][:_LONGEST], ensure_ascii=False)} {where}"
    elif "sum" in origin:
        for number, part in enumerate(origin["sum"]):
            yield " + (" if number else "("
            yield from _pieces(part)
            yield ")"
    elif "factor" in origin:
        yield f"{origin['factor']:g} * ("
        yield from _pieces(origin["of"])
        yield ")"
    elif "mean" in origin:
        for number, part in enumerate(origin["mean"]):
            yield ", " if number else "mean of "
            yield from _pieces(part)
    elif "compressed" in origin:
        yield from _pieces(origin["compressed"])
        yield f", compressed to an error of {origin['error']:.1e}"
    else:
        yield origin.get("summary", "unknown")


def bounded(origin: Mapping[str, Any]) -> Mapping[str, Any]:
    """The origin itself if it can be saved, otherwise its description."""
    return origin if ORIGIN.fits(origin) else {"summary": describe(origin)}
