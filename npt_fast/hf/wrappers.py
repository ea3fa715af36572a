"""See through what other libraries wrap around modules."""

from __future__ import annotations

from typing import Any

_ONLY_CHILD = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module")
"""What torch.compile, FSDP, activation checkpointing and DDP call the module that they wrap."""


def unwrapped(module: Any) -> Any:
    """The module inside all wrappers; of PEFT's copies the one that is active."""
    while (inner := _inner(module)) is not None:
        module = inner
    return module


def _inner(module: Any) -> Any:
    children = getattr(module, "_modules", {})
    if len(children) == 1 and next(iter(children)) in _ONLY_CHILD:
        return next(iter(children.values()))
    if children.keys() == {"original_module", "modules_to_save"}:  # PEFT's modules_to_save
        copies = children["modules_to_save"]
        active = [name for name in module.active_adapters if name in copies]
        return (
            children["original_module"]
            if module.disable_adapters or not active
            else (copies[active[0]])
        )
    return None
