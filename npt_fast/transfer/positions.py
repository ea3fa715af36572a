"""Positions in a text, counted on its tokens without padding.

A position is ``-1`` or ``"last"``, ``0`` or ``"first"``, ``"all"``, a slice or ``"2:5"``, a list,
or given by the text itself: `at` (``"at:Germany"``) means all tokens of the words, `after`
(``"after:is"``) the token that follows them.

The last token of a prompt produces the first new token.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from npt_fast.config import Match, Position
from npt_fast.errors import TransferError
from npt_fast.schema import shown


def at(text: str) -> Match:
    """A position: all tokens of the first occurrence of `text`."""
    return Match(text)


def after(text: str) -> Match:
    """A position: the token that follows the first occurrence of `text`."""
    return Match(text, after=True)


def resolve(position: Position, tokens: Sequence[str]) -> list[int]:
    """Convert a position to ascending token indices without duplicates.

    Args:
        position: Position in any notation.
        tokens: Texts of the tokens, without padding.

    Raises:
        TransferError: the position is outside the text, matches nothing, or is malformed.
    """
    count = len(tokens)
    parsed = parse(position) if isinstance(position, str) else position
    if isinstance(parsed, Match):
        return _matched(parsed, tokens)
    if isinstance(parsed, slice):
        found = list(range(*parsed.indices(count)))
    else:
        found = [parsed] if isinstance(parsed, int) else list(parsed)
    for index in found:
        if isinstance(index, bool) or not isinstance(index, int):
            raise TransferError(f"positions are whole numbers, not {shown(index)}")
        if not -count <= index < count:
            raise TransferError(
                f"position {index} is outside the text, which has {count} tokens: "
                f"{', '.join(f'{i} {t!r}' for i, t in enumerate(tokens[:20]))}"
                + (", ..." if count > 20 else "")
            )
    if not found:
        raise TransferError(f"no token of {count} is at {position}")
    return sorted({index % count for index in found})


_NUMBER = r"-?[0-9]{1,18}"  # int() raises ValueError beyond 4,300 digits


def parse(text: str) -> int | slice | list[int] | Match:
    """Parse a position that a user wrote.

    Raises:
        TransferError: the text is malformed.
    """
    names: dict[str, int | slice] = {"last": -1, "first": 0, "all": slice(None)}
    if text in names:
        return names[text]
    if match := re.fullmatch(r"(at|after):(.+)", text, re.DOTALL):
        return Match(match[2], match[1] == "after")
    if re.fullmatch(_NUMBER, text):
        return int(text)
    if match := re.fullmatch(rf"({_NUMBER})?:({_NUMBER})?", text):
        start, stop = (int(part) if part else None for part in match.groups())
        return slice(start, stop)
    if re.fullmatch(rf"{_NUMBER}(,{_NUMBER})+", text):
        return [int(part) for part in text.split(",")]
    raise TransferError(
        f"{shown(text)} is not a position: a number, 2:5, 1,4, last, first, all, at:WORD or "
        "after:WORD"
    )


def _matched(match: Match, tokens: Sequence[str]) -> list[int]:
    whole = "".join(tokens)
    start = whole.find(match.text)
    if start < 0 or not match.text:
        raise TransferError(f"{shown(match.text)} does not occur in {shown(whole)}")
    end = start + len(match.text)
    found, place = [], 0
    for index, token in enumerate(tokens):
        if place < end and place + len(token) > start:
            found.append(index)
        place += len(token)
    if not match.after:
        return found
    if found[-1] + 1 == len(tokens):
        raise TransferError(f"nothing follows {shown(match.text)} in {shown(whole)}")
    return [found[-1] + 1]
