"""The origin of a modulation: plain data that can be saved, and its description in a line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from npt_fast.hf.tokenizer import PLAIN, Reading
from npt_fast.schema import Kind, is_plain
from npt_fast.transfer.positions import named

_DEEPEST = 64  # levels of nesting; strict_json stops at 100
_LARGEST = 3 << 20  # bytes as JSON in the header of a file, which may have 4 MiB
_LONGEST = 1000  # characters of a description
_MOST_TEXTS = 1000  # whose reading is described; 30 times m + m have 2^30


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
        if len(positions) == 1 and "tokens" in origin:
            where = f"at {named(positions, origin['tokens'])}"
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
    elif "vectors" in origin:
        for number, part in enumerate(origin["vectors"]):
            yield " + " if number else "on vectors "
            yield from _pieces(part)
    elif "mean" in origin:
        for number, part in enumerate(origin["mean"]):
            yield ", " if number else "mean of "
            yield from _pieces(part)
    elif "compressed" in origin:
        yield from _pieces(origin["compressed"])
        yield f", compressed to an error of {origin['error']:.1e}"
    else:
        yield origin.get("summary", "unknown")


def readings(origin: Mapping[str, Any]) -> list[str]:
    """How the texts of an origin became tokens, each way once, as `Reading` describes it."""
    return list(dict.fromkeys(map(_reading, islice(_texts(origin), _MOST_TEXTS))))


def _reading(text: Mapping[str, Any]) -> str:
    if "special_tokens" not in text:
        return f"{PLAIN} (older file)"
    try:
        return str(Reading(special_tokens=text["special_tokens"], chat=text["chat"]))
    except (LookupError, ValueError):
        return "in an unknown way"  # an origin from a file may hold anything


def _texts(origin: Any) -> Iterator[Mapping[str, Any]]:
    """The parts of an origin that are texts of their own."""
    if isinstance(origin, Mapping):
        if "text" in origin:
            yield origin
        for part in origin.values():
            yield from _texts(part)
    elif isinstance(origin, list):
        for part in origin:
            yield from _texts(part)


def bounded(origin: Mapping[str, Any]) -> Mapping[str, Any]:
    """The origin itself if it can be saved, otherwise its description."""
    return origin if ORIGIN.fits(origin) else {"summary": describe(origin)}
