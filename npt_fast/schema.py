"""Check mappings from untrusted files against a schema, once, where they are read.

A `Kind` describes the allowed values of a key, in words and as a test. `checked` and `mistakes`
compare a mapping with the kinds of its keys.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

from npt_fast.errors import NPTError, suggestion

LARGEST = 1 << 63
"""Every count, index and size is less than this."""

_INDEX = re.compile(r"0|[1-9][0-9]{0,17}")


class Kind(NamedTuple):
    """The allowed values of a key.

    Attributes:
        name: description of the values, which completes "must be".
        fits: function that tells whether a value is allowed; it accepts any value.
        plain: function that makes Python's own numbers and lists of those of other libraries; it
            leaves all else as it is. Values of files are not looked at by it.
    """

    name: str
    fits: Callable[[Any], bool]
    plain: Callable[[Any], Any] = lambda value: value


def is_text(value: Any) -> bool:
    """Whether a value is text without lone surrogates, which no encoding can write."""
    if not isinstance(value, str):
        return False
    try:
        # a hundred times as fast as looking at every character
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_count(value: Any) -> bool:
    """Whether a value is a whole number from 0 to 2^63 - 1; True and False are not numbers."""
    # type(), not isinstance: True is an int
    return type(value) is int and 0 <= value < LARGEST


def is_number(value: Any) -> bool:
    """Whether a value is a finite float or an int below 2^63; True and False are not numbers."""
    if type(value) is int:
        return abs(value) < LARGEST
    return type(value) is float and math.isfinite(value)


def is_plain(value: Any, deepest: int, largest: int) -> bool:
    """Whether a value consists of the types of JSON and is within limits.

    Args:
        value: any value; its lists may be shared or hold themselves.
        deepest: limit on the nesting of lists and mappings.
        largest: limit on the number of values and characters; a shared value counts as often as it
            occurs.
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
PATH = Kind("a path", lambda value: isinstance(value, str))  # may have lone surrogates
COUNT = Kind("a whole number from 0 on", is_count)
POSITIVE = Kind("a whole number from 1 on", lambda value: is_count(value) and value > 0)
WHOLE = Kind("a whole number", lambda value: type(value) is int and is_number(value))
NUMBER = Kind("a number", is_number)
FLAG = Kind("true or false", lambda value: type(value) is bool)
MAPPING = Kind("a mapping", lambda value: isinstance(value, Mapping))
INDEX = Kind("the index of a layer", lambda v: isinstance(v, str) and bool(_INDEX.fullmatch(v)))


def one_of(names: Sequence[str]) -> Kind:
    """The kind of values that are one of `names`."""
    return Kind(f"one of {', '.join(names)}", lambda v: isinstance(v, str) and v in names)


def list_of(kind: Kind) -> Kind:
    """The kind of lists whose items are all of kind `kind`."""
    return Kind(
        f"a list, each item {kind.name}",
        lambda value: isinstance(value, list) and all(map(kind.fits, value)),
    )


def mapping_of(keys: Kind, values: Kind) -> Kind:
    """The kind of mappings whose keys are of kind `keys` and whose values are of kind `values`."""
    return Kind(
        f"a mapping, each key {keys.name}, each value {values.name}",
        lambda value: (
            isinstance(value, dict)
            and all(map(keys.fits, value))
            and all(map(values.fits, value.values()))
        ),
    )


def or_none(kind: Kind) -> Kind:
    """The kind of values that are of kind `kind` or null."""
    return Kind(f"{kind.name}, or null", lambda value: value is None or kind.fits(value))


def mistakes(
    given: Mapping[Any, Any],
    kinds: Mapping[str, Kind],
    required: Sequence[str] = (),
    *,
    closed: bool = False,
) -> Iterator[str]:
    """One line for each value that is not of its key's kind, and for each missing key.

    Args:
        given: mapping to check.
        kinds: kind of each known key.
        required: keys that must be present.
        closed: whether unknown keys are mistakes too.
    """
    if closed:
        for key in given:
            if key not in kinds:
                # difflib takes quadratic time
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
    """The known keys of a mapping and their values, after a check.

    Args:
        given: any value.
        kinds: kind of each known key.
        required: keys that must be present.
        where: file and place in it, for messages.
        error: class of the error.
        closed: whether unknown keys are mistakes too.

    Raises:
        NPTError: of class `error`: the value is not a mapping, or has a mistake; the first one is
            in the message.
    """
    if not isinstance(given, Mapping):
        raise error(f"{where}: must be a mapping, not {shown(given)}")
    if mistake := next(mistakes(given, kinds, required, closed=closed), None):
        raise error(f"{where}: {mistake}")
    return {key: given[key] for key in kinds if key in given}


def finite(value: Any) -> Any:
    """`value` with None for NaN and infinity."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def shown(value: Any) -> str:
    """A value for a message; a container is shown by its type, since it may be very large."""
    if isinstance(value, (str, bytes)):
        return f"{value[:80]!r:.80}"
    if isinstance(value, int) and abs(value) >= LARGEST:
        return "a number of more than 64 bits"
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    return f"a {type(value).__name__}"
