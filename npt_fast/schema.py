"""What a mapping from somebody's file may hold: checked once, where it is read.

A `Kind` says what a value must be, in words and as a test; `checked` and `mistakes` hold a mapping
against the kinds of its keys.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

from npt_fast.errors import NPTError, suggestion

LARGEST = 1 << 63
"""No count, index or size reaches this."""

_INDEX = re.compile(r"0|[1-9][0-9]{0,17}")


class Kind(NamedTuple):
    """What a value may be.

    Attributes:
        name: in words that complete "must be".
        fits: whether a value is one; may be called with anything.
    """

    name: str
    fits: Callable[[Any], bool]


def is_text(value: Any) -> bool:
    """Whether it is text of Unicode's characters: a lone surrogate cannot be written anywhere."""
    if not isinstance(value, str):
        return False
    try:
        # a hundred times as fast as looking at every character
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_count(value: Any) -> bool:
    """Whether it is a whole number from 0 on that fits 64 bits; True and False are none."""
    # type(), not isinstance: True is an int
    return type(value) is int and 0 <= value < LARGEST


def is_number(value: Any) -> bool:
    """Whether it is a number that a float holds; True and False are none."""
    if type(value) is int:
        return abs(value) < LARGEST
    return type(value) is float and math.isfinite(value)


def is_plain(value: Any, deepest: int, largest: int) -> bool:
    """Whether it is what JSON has, and not too much of it.

    Args:
        value: anything, also with lists that hold themselves or that many others share.
        deepest: lists and mappings inside one another.
        largest: values and characters, wherever they are; what is shared counts every time.
    """
    level = [value]
    for allowed in range(deepest, -1, -1):
        inner: list[Any] = []
        # level by level instead of by recursion, and counted before anything is looked at
        largest -= len(level)
        for item in level:
            container = isinstance(item, (list, tuple, Mapping))
            if container or isinstance(item, str):
                largest -= len(item)
            if largest < 0 or (container and not allowed):
                return False
            if isinstance(item, Mapping):
                if not all(isinstance(key, str) for key in item):
                    return False
                inner.extend(chain.from_iterable(item.items()))
            elif container:
                inner.extend(item)
            elif not (item is None or type(item) is bool or is_text(item) or is_number(item)):
                return False
        level = inner
    return True


TEXT = Kind("a text", is_text)
PATH = Kind("a path", lambda value: isinstance(value, str))  # its bytes may be no Unicode
COUNT = Kind("a whole number from 0 on", is_count)
POSITIVE = Kind("a whole number from 1 on", lambda value: is_count(value) and value > 0)
WHOLE = Kind("a whole number", lambda value: type(value) is int and is_number(value))
NUMBER = Kind("a number", is_number)
FLAG = Kind("true or false", lambda value: type(value) is bool)
MAPPING = Kind("a mapping", lambda value: isinstance(value, Mapping))
INDEX = Kind("the index of a layer", lambda v: isinstance(v, str) and bool(_INDEX.fullmatch(v)))


def one_of(names: Sequence[str]) -> Kind:
    """One of these texts."""
    return Kind(f"one of {', '.join(names)}", lambda v: isinstance(v, str) and v in names)


def list_of(kind: Kind) -> Kind:
    """A list of values that are all of one kind."""
    return Kind(
        f"a list, each item {kind.name}",
        lambda value: isinstance(value, list) and all(map(kind.fits, value)),
    )


def mapping_of(keys: Kind, values: Kind) -> Kind:
    """A mapping whose keys are of one kind and whose values of another."""
    return Kind(
        f"a mapping, each key {keys.name}, each value {values.name}",
        lambda value: (
            isinstance(value, dict)
            and all(map(keys.fits, value))
            and all(map(values.fits, value.values()))
        ),
    )


def or_none(kind: Kind) -> Kind:
    """As `kind`, or null."""
    return Kind(f"{kind.name}, or null", lambda value: value is None or kind.fits(value))


def mistakes(
    given: Mapping[Any, Any],
    kinds: Mapping[str, Kind],
    required: Sequence[str] = (),
    *,
    closed: bool = False,
) -> Iterator[str]:
    """A line for each value that is not of its key's kind, and each key that is missing.

    Keys that have no kind are left alone, or are mistakes too if the mapping is `closed`.
    """
    if closed:
        for key in given:
            if key not in kinds:
                near = suggestion(key[:40], kinds) if isinstance(key, str) else ""
                there = f"; there are {', '.join(kinds)}"
                yield f"unknown key {shown(key)}{near or there}"
    for key, kind in kinds.items():
        if key in given and not kind.fits(given[key]):
            yield f"{key} must be {kind.name}, not {shown(given[key])}"
    yield from (f"{key} is missing" for key in required if key not in given)


def checked(
    given: Any,
    kinds: Mapping[str, Kind],
    required: Sequence[str],
    where: str,
    error: type[NPTError],
    *,
    closed: bool = False,
) -> dict[str, Any]:
    """What a mapping holds under the keys that have a kind.

    Args:
        given: any value.
        kinds: what each known key must hold.
        required: keys that must be there.
        where: file and place in it, for messages.
        error: what is raised.
        closed: whether it must have no other keys.

    Raises:
        NPTError: of the kind `error`: no mapping, or its first mistake.
    """
    if not isinstance(given, Mapping):
        raise error(f"{where}: must be a mapping, not {shown(given)}")
    if mistake := next(mistakes(given, kinds, required, closed=closed), None):
        raise error(f"{where}: {mistake}")
    return {key: given[key] for key in kinds if key in given}


def shown(value: Any) -> str:
    """A value in a message: a container only by its type, since writing it out may take ages."""
    if isinstance(value, (str, bytes)):
        return f"{value[:80]!r:.80}"
    if isinstance(value, int) and abs(value) >= LARGEST:
        return "a number of more than 64 bits"
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    return f"a {type(value).__name__}"
