"""Mixtures of experts with weight changes (design.md#mixtures-of-experts).

The mixture's own forward is run, with other functions in the place of its experts. So the router,
the weights of the experts, and what is done with their outputs are the base model's, whatever they
are.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from npt_fast.called_mlp import Change, called_as_module, first, is_plain_tensor
from npt_fast.errors import ModelError
from npt_fast.mlp_layout import MLPLayout

EXPERTS = MLPLayout("gate_up_proj", "gate_up_proj")
"""Routed experts: the matrices of all are one tensor, ``(E, 2 F, D)`` and ``(E, D, F)``."""

_Function = TypeVar("_Function", bound=Callable[..., Any])
# torch.compiler.disable would import the compiler now, which takes 1 s; this does at the first call
_uncompiled: Callable[[_Function], _Function] = torch._disable_dynamo  # type: ignore[assignment,attr-defined]
_FORM = {"has_gate": True, "has_post_expert_norm": False, "_is_expert_parallel": False}


@dataclass(frozen=True)
class Mixture:
    """The parts of a mixture of experts that read the MLP's input.

    Attributes:
        experts: name of the routed experts, which are called with the tokens, and the indices and
            weights of each token's experts.
        shared: name of the expert that every token goes through; None if there is none.
    """

    experts: str = "experts"
    shared: str | None = None

    @property
    def changed(self) -> str:
        """Name of the part whose weights change: the shared expert, or all routed ones alike."""
        return self.shared or self.experts

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of both."""
        return tuple(filter(None, (self.experts, self.shared)))


@_uncompiled  # torch.compile would take the stand-in's functions for modules
def call_mixture(
    mlp: Any,
    mixture: Mixture,
    h: Tensor,
    routed_by: Tensor,
    *,
    shared: Callable[[Any], Tensor],
    change: Callable[[], Change],
) -> Tensor:
    """Run a mixture with a weight change, whose experts read something else than its router.

    Args:
        mlp: module of the mixture.
        mixture: its parts.
        h: what the experts read, ``(..., D)``.
        routed_by: what the router reads, ``(..., D)``.
        shared: the output of the shared expert, ``(..., D)``, with changed weights.
        change: what is added to the projections' outputs of routed experts, if these change.

    Returns:
        ``(..., D)``.
    """

    def replaced(name: str) -> Callable[..., Tensor]:
        part = getattr(mlp, name)

        def call(x: Tensor, *routing: Tensor) -> Tensor:
            read = h.reshape(x.shape)  # some mixtures flatten the batch
            if name != mixture.changed:
                y: Tensor = part(read, *routing)
            elif mixture.shared:
                y = shared(part).reshape(x.shape)
            else:
                run = partial(call_experts, shape=h.shape[:-1], change=change())
                y = called_as_module(part, run, read, *routing)
            return y

        return call

    stand_in = copy(mlp)  # of the module alone: it keeps its own parts, and this one has others
    stand_in.__dict__["_modules"] = mlp._modules | {name: replaced(name) for name in mixture.parts}

    def run(_: Any, read: Tensor) -> Tensor:
        return first(type(mlp).forward(stand_in, read))

    return called_as_module(mlp, run, routed_by)


def expert_sizes(experts: Any) -> tuple[int, int]:
    """Model width D and width F of each routed expert."""
    _, out, inner = experts.down_proj.shape
    return (inner, out) if experts.is_transposed else (out, inner)


def expert_matrices(experts: Any, projection: str) -> Tensor:
    """The weights of a projection, ``"gate"``, ``"up"`` or ``"down"``: a view, ``(E, out, in)``."""
    weight: Tensor = getattr(experts, getattr(EXPERTS, projection))
    if experts.is_transposed:
        weight = weight.transpose(1, 2)
    if projection == "down":
        return weight
    place = int(projection == "up")
    return weight.chunk(2, 1)[place] if experts.is_concatenated else weight[:, place::2]


def obstacle_of_experts(experts: Any) -> str | None:
    """What is in the way of changing the weights of routed experts; None if nothing.

    They may be of another form, or quantised, or sharded over devices, which may also come later.
    """
    name = type(experts).__name__
    for field, needed in _FORM.items():
        # older versions of transformers have no has_post_expert_norm, nor such a norm
        if (found := getattr(experts, field, False)) is not needed:
            return f"has experts ({name}) whose {field} is {found}, not {needed}"
    for projection in EXPERTS.names:
        if not is_plain_tensor(getattr(experts, projection)):
            return f"has experts ({name}) whose {projection} is no float tensor of its own"
    return None


def call_experts(
    experts: Any,
    h: Tensor,
    index: Tensor,
    weights: Tensor,
    *,
    shape: tuple[int, ...],
    change: Change,
) -> Tensor:
    """The weighted sum of each token's experts, with one weight change for all of them.

    Args:
        experts: module of the routed experts.
        h: what they read, ``(T, D)``.
        index: the experts of each token, ``(T, K)``.
        weights: their weights, ``(T, K)``.
        shape: shape of the batch, in which `change` takes tokens.
        change: what is added to the projections' outputs: to gate's and up's of each expert, and to
            the sum of down's, which is linear.

    Returns:
        ``(T, D)``.

    Raises:
        ModelError: the experts are sharded or quantised.
    """
    if problem := obstacle_of_experts(experts):
        raise ModelError(f"a layer with a weight change {problem}")
    order = index.flatten().argsort(stable=True)
    rows = order // index.shape[1]
    counts = index.flatten().bincount(minlength=experts.num_experts).tolist()
    weight = weights.flatten()[order, None]
    back = order.argsort()

    def summed(outputs: Tensor) -> Tensor:
        # in the order of a token's experts: an index_add would have another one each time
        each: Tensor = (outputs * weight)[back].unflatten(0, index.shape)
        return each.sum(1).to(h.dtype)

    gate_up = _each(experts, "gate_up_proj", h[rows], counts)
    added = _gate_up(experts, h.view(*shape, -1), change)
    if added is not None:
        gate_up = gate_up + added.to(gate_up.dtype).flatten(0, -2)[rows]
    inner = experts._apply_gate(gate_up)
    y = summed(_each(experts, "down_proj", inner, counts))
    down = change("down", experts, summed(inner).view(*shape, -1))
    return y if down is None else y + down.to(y.dtype).reshape(y.shape)


def _each(experts: Any, name: str, rows: Tensor, counts: list[int]) -> Tensor:
    """A projection of each expert, of the rows that are its own."""
    weight, bias = getattr(experts, name), getattr(experts, f"{name}_bias", None)
    if experts.is_transposed:
        weight = weight.transpose(1, 2)
    return torch.cat(
        [
            linear(own, weight[e], None if bias is None else bias[e])
            for e, own in enumerate(rows.split(counts))
            if len(own)
        ]
    )


def _gate_up(experts: Any, tokens: Tensor, change: Change) -> Tensor | None:
    """The changes of gate and up in the order of the experts' own rows, ``(..., 2 F)``."""
    gate, up = (change(name, experts, tokens) for name in ("gate", "up"))
    if gate is None:  # every modulation type has it, so there is no change
        return None
    both = gate, torch.zeros_like(gate) if up is None else up
    return torch.cat(both, -1) if experts.is_concatenated else torch.stack(both, -1).flatten(-2)
