"""Where a modulation comes from, as plain data: what it may be, and how it reads in a line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from npt_fast.schema import Kind, is_plain

_DEEPEST, _LARGEST = 64, 3 << 20  # of an origin: mappings in one another, bytes in a file's header
_LONGEST = 1000  # characters of a description


def _can_be_saved(origin: Any) -> bool:
    # measured before it is written out, which follows every path to what is shared
    if not isinstance(origin, Mapping) or not is_plain(origin, _DEEPEST, _LARGEST):
        return False
    text = json.dumps(origin, ensure_ascii=False)
    return len(json.dumps(text, ensure_ascii=False).encode()) <= _LARGEST


ORIGIN = Kind(
    "a mapping of texts, finite numbers, true, false, null, lists and mappings, at most "
    f"{_DEEPEST} deep and {_LARGEST:,} bytes long",
    _can_be_saved,
)
"""What an origin must be, so that it can be saved."""


def describe(origin: Mapping[str, Any]) -> str:
    """An origin in a line of at most 1,000 characters; "unknown" where it says nothing."""
    pieces: list[str] = []
    try:
        for piece in _told(origin):  # a piece at a time: an origin may share its parts endlessly
            pieces.append(piece)
            if sum(map(len, pieces)) > _LONGEST:
                return "".join(pieces)[: _LONGEST - 1] + "…"
        return "".join(pieces)
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError):
        return "unknown"  # it comes from a file, which may say anything


def _told(origin: Mapping[str, Any]) -> Iterator[str]:
    if "text" in origin:
        positions = origin.get("positions") or []
        where = f"mean of {len(positions)} tokens" if len(positions) > 1 else f"at {positions}"
        yield f"{json.dumps(origin['text'][:_LONGEST], ensure_ascii=False)} {where}"
    elif "sum" in origin:
        for number, part in enumerate(origin["sum"]):
            yield " + (" if number else "("
            yield from _told(part)
            yield ")"
    elif "factor" in origin:
        yield f"{origin['factor']:g} * ("
        yield from _told(origin["of"])
        yield ")"
    elif "mean" in origin:
        for number, part in enumerate(origin["mean"]):
            yield ", " if number else "mean of "
            yield from _told(part)
    elif "compressed" in origin:
        yield from _told(origin["compressed"])
        yield f", compressed to an error of {origin['error']:.1e}"
    else:
        yield origin.get("summary", "unknown")


def bounded(origin: Mapping[str, Any]) -> Mapping[str, Any]:
    """An origin, or its description where it could not be saved."""
    return origin if ORIGIN.fits(origin) else {"summary": describe(origin)}
