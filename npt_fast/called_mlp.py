"""A modulated MLP that calls its projections: ``y = projection(a) + change``.

Adapters, quantised or sharded weights and hooks then act as in the base model. `is_plain` tells
where the fused path, which reads the projections' weights, computes the same faster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from npt_fast.errors import ModelError
from npt_fast.functional import is_shard, like
from npt_fast.mlp_layout import GATED, MLPLayout

_DTYPES = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
_TENSORS = frozenset((nn.Parameter, Tensor))  # not DTensor, nor the classes of quantised weights

Change = Callable[[str, Any, Tensor], Tensor | None]
"""What is added to a projection's output, from its name, its module and its input, or None."""


class Edit(Protocol):
    """Replaces the weight change of some tokens; an injection is one."""

    @property
    def tokens(self) -> Tensor:
        """Mask of the tokens, in the shape of the attention output without its width."""

    def at(self, rows: tuple[Tensor, ...]) -> Edit:
        """The edit of the tokens that ``tokens[rows]`` are."""

    def applied(self, change: Change, component: Any, attention: Tensor) -> Change:
        """The change after this edit, for an NP component and its attention output."""


def is_plain(mlp: Any, layout: MLPLayout = GATED) -> bool:
    """Whether all that an MLP computes follows from its weights, biases and activation.

    That is so for projections of class `nn.Linear` with a float weight on a device, without hooks,
    parametrizations, adapters or wrappers. Hooks of the MLP, of its activation and of all modules
    count too. It is asked in every forward, since all of them can come and go.
    """
    return (
        has_no_hooks(mlp)
        and _has_no_own_hooks(getattr(mlp, layout.activation, None))
        and all([is_plain_linear(getattr(mlp, name)) for name in layout.names])
    )


def is_plain_linear(module: Any, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether a projection's output is a product with its float weight, and its bias.

    Args:
        module: the projection.
        kind: class of linear layers that it must be of, not of a class derived from it.
    """
    if not has_plain_weight(module, kind) or not _has_no_own_hooks(module):
        return False
    own = module.__dict__
    # accelerate's dispatch puts a hook on every module, which matters only where it loads weights
    return "forward" not in own or getattr(own.get("_hf_hook"), "offload", True) is False


def has_plain_weight(module: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether a module is a linear layer of a class, with a float weight on a device."""
    if type(module) is not kind:
        return False
    # module.weight would take ten times as long
    return is_plain_tensor(module._parameters.get("weight"))


def is_plain_tensor(weight: Any) -> bool:
    """Whether a weight is a float tensor on a device, neither quantised nor a shard."""
    return type(weight) in _TENSORS and weight.dtype in _DTYPES and not weight.is_meta


def first(output: Any) -> Tensor:
    """The output of a module that may return more behind it, as attention does its weights."""
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


def has_no_hooks(module: Any) -> bool:
    """Whether a call of a module is its forward alone: no hooks on it, nor on all modules."""
    return _has_no_own_hooks(module) and not _has_any_global_hook()


def _has_no_own_hooks(module: Any) -> bool:
    return not isinstance(module, nn.Module) or not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def called_as_module(module: Any, run: Callable[..., Tensor], *args: Any) -> Tensor:
    """``run(module, *args)``, within the module's hooks if it has some.

    It is called then, with the keyword that `npt_fast.convert` adds to its forward.
    """
    y: Tensor = run(module, *args) if has_no_hooks(module) else module(*args, modulated=run)
    return y


def call_mlp(
    mlp: Any,
    h: Tensor,
    activation: Callable[[Tensor], Tensor],
    change: Change,
    layout: MLPLayout = GATED,
) -> Tensor:
    """``down(activation(gate(h)) * up(h))``, or without a gate, by calling the projections.

    Args:
        mlp: module with the projections of `layout`. Its own activation is called if it has one,
            since it may have hooks.
        h: MLP input, ``(..., D)``.
        activation: the activation of an MLP that has none.
        change: what is added to each projection's output.
        layout: how the MLP names its projections.

    Returns:
        ``(..., D)``.
    """

    def called(name: str, a: Tensor) -> Tensor:
        projection = getattr(mlp, name)
        y: Tensor = projection(a)
        if a.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            _check_gradient(y, name, projection)
        return y

    def changed(name: str, a: Tensor, y: Tensor) -> Tensor:
        added = change(name, getattr(mlp, getattr(layout, name)), a)
        if added is None:
            return y
        if is_shard(added):
            added = like(added, y)
        return y + added.to(y.dtype)

    act = getattr(mlp, layout.activation, activation)
    if layout.gate is None:
        inner = act(changed("up", h, called(layout.up, h)))
    else:
        if layout.joined:
            gate, up = called(layout.gate, h).chunk(2, -1)
        else:
            gate, up = called(layout.gate, h), called(layout.up, h)
        inner = act(changed("gate", h, gate)) * changed("up", h, up)
    return changed("down", inner, called(layout.down, inner))


def _check_gradient(y: Tensor, name: str, projection: Any) -> None:
    """Raise ModelError if backward would leave a projection out; torch only warns, and then."""
    steps = [y.grad_fn]
    for _ in range(4):  # a cast, a view, or the sum of an adapter and its base may come last
        if any(step is None or "NotImplemented" in step.name() for step in steps):
            break
        steps = [before for step in steps if step for before, _ in step.next_functions if before]
    else:
        return
    raise ModelError(
        f"{name} ({type(projection).__module__}.{type(projection).__name__}) does not pass "
        "gradients back in this mode; train on a base model of another quantisation or in floats"
    )
