"""Arguments and options are checked against their type hints, so that a mistake is one line.

`check_arguments` is for functions that users call, `check_constructor` for classes. A hint may be
``Annotated`` with a `Kind`, where its type alone says too little. Numbers of other libraries, such
as NumPy's, become Python's own.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cache, wraps
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    ParamSpec,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from npt_fast.errors import OptionError, suggestion
from npt_fast.schema import POSITIVE, Kind, one_of, shown

P = ParamSpec("P")
R = TypeVar("R")
Class = TypeVar("Class", bound=type)
Positive = Annotated[int, POSITIVE]


def check_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which raises OptionError for an unknown name or a value of another type."""
    signature = inspect.signature(function)
    names = [name for name, p in signature.parameters.items() if p.kind != p.VAR_KEYWORD]
    open_ended = len(names) < len(signature.parameters)

    @cache
    def kinds() -> dict[str, Kind]:
        # at the first call: hints name what is imported after the function is defined
        hints = get_type_hints(function, include_extras=True)
        return {name: kind_of(hints[name]) for name in names if name in hints}

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        if not open_ended:
            check_names(kwargs, names, function.__qualname__.removesuffix(".__init__"))
        try:
            given = signature.bind(*args, **kwargs)
        except TypeError:  # which Python says better
            return function(*args, **kwargs)
        for name, kind in kinds().items():
            if name in given.arguments:
                value = given.arguments[name] = kind.plain(given.arguments[name])
                if not kind.fits(value):
                    raise OptionError(f"{name} must be {kind.name}, not {shown(value)}")
        return function(*given.args, **given.kwargs)

    return checked


def check_constructor(of: Class) -> Class:
    """The class, whose constructor is checked like a function of `check_arguments`."""
    of.__init__ = check_arguments(of.__init__)  # type: ignore[misc]
    return of


def check_names(given: Iterable[str], known: Collection[str], where: str) -> None:
    """Raise OptionError if one of the names is unknown."""
    for name in given:
        if name not in known:
            near = suggestion(name[:40], known) or f"; there are {', '.join(known)}"
            raise OptionError(f"{where} has no argument {shown(name)}{near}")


def kind_of(hint: Any) -> Kind:
    """The kind of the values that a type hint allows; of containers of one type, also the items."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        plain = kind_of(args[0])
        kinds = (extra for extra in args[1:] if isinstance(extra, Kind))
        return next((kind._replace(plain=plain.plain) for kind in kinds), plain)
    if isinstance(hint, TypeVar):
        return kind_of(hint.__bound__ or Any)
    if origin in (Union, UnionType):
        several = [kind_of(arg) for arg in args]
        return Kind(
            _joined(kind.name for kind in several),
            lambda value: any(kind.fits(value) for kind in several),
            lambda value: next((v for k in several if k.fits(v := k.plain(value))), value),
        )
    if origin is Literal:
        return one_of(args)
    if origin is Callable:
        return Kind("a function", callable)
    if origin is not None and issubclass(origin, Collection) and not issubclass(origin, Mapping):
        item = kind_of(args[0])
        return Kind(
            "a list" if args[0] is Any else f"a list, each item {item.name}",
            lambda value: (
                isinstance(value, origin)
                and not isinstance(value, (str, bytes))
                and all(map(item.fits, value))
            ),
            lambda value: _plain_list(value, origin, item),
        )
    plain = origin or hint
    return _PLAIN.get(plain) or Kind(
        f"of type {plain.__qualname__}", lambda value: isinstance(value, plain)
    )


def _plain_list(value: Any, origin: Any, item: Kind) -> Any:
    if not isinstance(value, origin) or isinstance(value, (str, bytes)):
        return value
    items = map(item.plain, value)
    return tuple(items) if isinstance(value, tuple) else list(items)


def _plain_number(value: Any) -> Any:
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def _joined(names: Iterable[str]) -> str:
    *first, last = dict.fromkeys(names)
    return f"{', '.join(first)} or {last}" if first else last


_PLAIN: dict[Any, Kind] = {
    Any: Kind("anything", lambda v: True),
    NoneType: Kind("None", lambda v: v is None),
    bool: Kind("True or False", lambda v: isinstance(v, bool)),
    # True and False are ints
    int: Kind(
        "a whole number", lambda v: isinstance(v, int) and not isinstance(v, bool), _plain_number
    ),
    float: Kind(
        "a number",
        lambda v: isinstance(v, (int, float)) and not isinstance(v, bool),
        _plain_number,
    ),
    str: Kind("a text", lambda v: isinstance(v, str)),
    **dict.fromkeys((Path, os.PathLike), Kind("a path", lambda v: isinstance(v, os.PathLike))),
}
