"""Documents from files with one value replaced, and whether what is parsed has its types."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from npt_fast.errors import CheckpointError

ODD = [
    None, True, -1, 5, 1 << 126, 0.5, 1e308, float("nan"), float("inf"), "", "x", "1", "\ud800",
    "\0", [], [None], [5], [[5]], ["x"], {}, {"": 1}, {"1": 1}, {"1": {}}, {"-1": {}}, {"01": {}},
    {"\ud800": "x"}, {"9" * 30: {}}, {"x": {"y": 5}}, json.loads("[" * 90 + "]" * 90),
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places(item, (*path, key))
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from places(item, (*path, index))


def spoilt(document: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    changed: Any = copy.deepcopy(document)
    *above, last = path
    target = changed
    for key in above:
        target = target[key]
    target[last] = value
    return dict(changed)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type, all the way down."""
    if is_dataclass(hint):
        assert isinstance(hint, type)
        hints = get_type_hints(hint)
        return type(value) is hint and all(
            fits(getattr(value, f.name), hints[f.name]) for f in fields(hint)
        )
    origin, inner = get_origin(hint), get_args(hint)
    if origin is UnionType:
        return any(fits(value, option) for option in inner)
    if origin is tuple and inner[-1] is ...:
        return isinstance(value, tuple) and all(fits(item, inner[0]) for item in value)
    if origin is tuple:
        return isinstance(value, tuple) and all(map(fits, value, inner))
    if origin is Mapping:
        assert isinstance(value, (dict, NoneType))
        return value is not None and all(
            fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items()
        )
    return hint is Any or type(value) is hint


def check_types(kind: Any, document: dict[str, Any]) -> None:
    """Whatever value is replaced, `kind.parse` gives what it declares or names the key."""
    assert fits(kind.parse(document, "file"), kind)
    refused = 0
    for path in places(document):
        for value in ODD:
            content = spoilt(document, path, value)
            try:
                parsed = kind.parse(content, "file")
            except CheckpointError as error:
                refused += 1
                line = str(error)
                assert line.startswith("file: ") and len(line) < 300 and line.isprintable()
                assert str(path[0]) in line, (path, line)
            else:
                assert fits(parsed, kind), (path, value)
    assert refused > 300
