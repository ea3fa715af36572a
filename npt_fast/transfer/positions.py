"""Positions in a text, counted on the tokens that the model reads: with BOS, without padding.

A position is ``-1`` or ``"last"``, ``0`` or ``"first"``, ``"all"``, ``"last_3"`` (the last three
tokens), a slice or ``"2:5"``, a list or ``"1,4"``, or given by the text itself: `at`
(``"at:Germany"``) means all tokens of the words, `after` (``"after:is"``) the token that follows
them. A special token is no part of a word: it is found by its whole text only.

The last token of a prompt produces the first new token.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any

from npt_fast.arguments import check_arguments
from npt_fast.config import InjectionTime, Match, Position
from npt_fast.errors import TransferError
from npt_fast.hf.tokenizer import decoded, special_places
from npt_fast.schema import shown


@check_arguments
def at(text: str) -> Match:
    """A position: all tokens of the first occurrence of `text`."""
    return Match(text)


@check_arguments
def after(text: str) -> Match:
    """A position: the token that follows the first occurrence of `text`."""
    return Match(text, after=True)


def named(places: Iterable[int], tokens: Sequence[str]) -> str:
    """Places with their tokens, for people: ``"4 ' Germany', 5 ' is'"``."""
    return ", ".join(f"{place} {tokens[place]!r}" for place in places)


def reached(places: Iterable[int], tokens: Sequence[str], when: InjectionTime) -> str:
    """The tokens that an injection reached, for people: of the prompt, the generated ones, both."""
    prompt = [named(places, tokens)] if when != "decode" else []
    return ", ".join([*prompt, *(["the generated ones"] if when != "prefill" else [])])


def find(position: Position, ids: Sequence[int], tokenizer: Any = None) -> list[int]:
    """Like `resolve`, for the ids that a model reads.

    Raises:
        TransferError: as in `resolve`, or the position is given by text and there is no tokenizer.
    """
    parsed = parse(position) if isinstance(position, str) else position
    by_text = isinstance(parsed, Match)
    if tokenizer is None:
        if by_text:
            raise TransferError(f"the position {position} needs a tokenizer")
        return resolve(parsed, [""] * len(ids))
    special = special_places(tokenizer, ids) if by_text else ()
    return resolve(parsed, decoded(tokenizer, ids), special)


def resolve(position: Position, tokens: Sequence[str], special: Collection[int] = ()) -> list[int]:
    """Convert a position to ascending token indices without duplicates.

    Args:
        position: Position in any notation.
        tokens: Texts of the tokens, without padding.
        special: Places of special tokens.

    Raises:
        TransferError: the position is outside the text, matches nothing, or is malformed.
    """
    count = len(tokens)
    parsed = parse(position) if isinstance(position, str) else position
    if isinstance(parsed, Match):
        return _matched(parsed, tokens, special)
    if isinstance(parsed, slice):
        found = list(range(*parsed.indices(count)))
    else:
        found = [parsed] if isinstance(parsed, int) else list(parsed)
    for index in found:
        if isinstance(index, bool) or not isinstance(index, int):
            raise TransferError(f"positions are whole numbers, not {shown(index)}")
        if not -count <= index < count:
            raise TransferError(
                f"position {index} is outside the text, which has {count} tokens"
                + (f": {named(range(min(count, 20)), tokens)}" if any(tokens) else "")
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
    if match := re.fullmatch(r"last_([1-9][0-9]{0,17})", text):
        return slice(-int(match[1]), None)
    if re.fullmatch(_NUMBER, text):
        return int(text)
    if match := re.fullmatch(rf"({_NUMBER})?:({_NUMBER})?", text):
        start, stop = (int(part) if part else None for part in match.groups())
        return slice(start, stop)
    if re.fullmatch(rf"{_NUMBER}(,{_NUMBER})+", text):
        return [int(part) for part in text.split(",")]
    raise TransferError(
        f"{shown(text)} is not a position: a number, 2:5, 1,4, last, last_3, first, all, at:WORD "
        "or after:WORD"
    )


def _matched(match: Match, tokens: Sequence[str], special: Collection[int]) -> list[int]:
    whole = "".join(tokens)
    spans = list(pairwise([0, *accumulate(map(len, tokens))]))
    start = whole.find(match.text) if match.text else -1
    while start >= 0:
        end = start + len(match.text)
        found = [i for i, (begin, stop) in enumerate(spans) if begin < end and stop > start]
        if all(start <= spans[i][0] and spans[i][1] <= end for i in found if i in special):
            break
        start = whole.find(match.text, start + 1)
    else:
        raise TransferError(f"{shown(match.text)} does not occur in {shown(whole)}")
    if not match.after:
        return found
    if found[-1] + 1 == len(tokens):
        raise TransferError(f"nothing follows {shown(match.text)} in {shown(whole)}")
    return [found[-1] + 1]
