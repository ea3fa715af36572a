"""Give one module a forward of its own, and take it off again.

What lies on the module can be pickled and copied: a partial of a function with a name, no closure
and no bound method.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

from torch import nn

from npt_fast.errors import ModelError


def attach(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Make a module run ``forward(module, ...)`` instead of its own forward.

    Hooks run as before. accelerate's too, whether they were added before or are added or removed
    later: they replace a module's forward by one that calls ``module._old_forward``.

    Args:
        module: module that `forward` is not attached to yet.
        forward: function of a Python module, so that pickle finds it by its name. It may reach the
            module's own forward through `call_base`.
    """
    name = _name(module)
    base = getattr(module, name)
    if base != MethodType(type(module).forward, module):  # another library's: kept for `detach`
        module.__dict__["_base_forward"] = base
    module.__dict__[name] = partial(forward, module)


def detach(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Take off what `attach` has put on a module; nothing of it is left.

    Raises:
        ModelError: something wrapped the module's forward after `attach`; nothing is changed.
    """
    check_detachable(module, forward)
    name, base = _name(module), module.__dict__.pop("_base_forward", None)
    if base is None and name == "_old_forward":
        base = MethodType(type(module).forward, module)  # as accelerate stores it
    if base is None:
        del module.__dict__[name]
    else:
        module.__dict__[name] = base


def check_detachable(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Raise ModelError if `detach` would find another forward in the place of `forward`."""
    if not is_attached(module, forward):
        raise ModelError(
            f"{type(module).__name__}: its forward was replaced after conversion; "
            "undo that before npt.unload"
        )


def is_attached(module: nn.Module, forward: Callable[..., Any]) -> bool:
    """Whether a module runs what `attach` has put on it: it and its forward are still the same."""
    found = module.__dict__.get(_name(module))
    return isinstance(found, partial) and found.func is forward


def call_base(module: nn.Module, *args: Any, **options: Any) -> Any:
    """Run the forward that a module had before `attach`, without hooks."""
    if "_base_forward" in module.__dict__:
        return module.__dict__["_base_forward"](*args, **options)
    return type(module).forward(module, *args, **options)


def _name(module: nn.Module) -> str:
    # with device_map, accelerate has replaced forward by a hook that calls _old_forward
    return "_old_forward" if "_old_forward" in module.__dict__ else "forward"
