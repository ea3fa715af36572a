"""Registration with torch, so that ``torch.compile`` keeps a launcher as one opaque operation."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

_LIBRARY = torch.library.Library("npt_fast", "DEF")

Function = TypeVar("Function", bound=Callable[..., Any])


def define(schema: str, fake: Callable[..., Any]) -> Callable[[Function], Function]:
    """Make a launcher an operation of ``torch.ops.npt_fast``; autograd is around it, not in it.

    Args:
        schema: such as ``"f(Tensor a, int k) -> Tensor"``; what is written to is marked.
        fake: gives outputs of the right shape, dtype and strides, without data.

    Returns:
        A decorator. The function calls the operation while torch compiles and is itself otherwise:
        eager calls do not pay for the dispatcher.
    """

    def decorate(function: Function) -> Function:
        name = schema.partition("(")[0]
        _LIBRARY.define(schema)
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"npt_fast::{name}", fake, lib=_LIBRARY)
        operation = getattr(torch.ops.npt_fast, name)

        @wraps(function)
        def call(*arguments: Any) -> Any:
            if torch.compiler.is_compiling():
                return operation(*arguments)
            return function(*arguments)

        return call  # type: ignore[return-value]

    return decorate
