"""What an NP layer computes in place of its base layer (design.md#layer)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from npt_fast.errors import ModelError
from npt_fast.functional import vector_norms
from npt_fast.hf import patching
from npt_fast.hf.decoder import call_of
from npt_fast.hf.families import Block
from npt_fast.hf.scaffold import Parts, Scaffold
from npt_fast.hf.wrappers import unwrapped
from npt_fast.modules import NPComponent


def layer_forward(
    layer: Any,
    hidden_states: Tensor,
    *args: Any,
    scaffold: Scaffold | None = None,
    **options: Any,
) -> Any:
    """The forward of an NP layer (design.md#layer)."""
    component: NPComponent = layer.np_component
    block: Block = layer.np_block
    if not component.enabled:
        return patching.call_base(layer, hidden_states, *args, **options)
    if args:
        _, options = call_of(layer, (hidden_states, *args), options)
    if scaffold is not None:
        return _parts(layer, hidden_states, scaffold, options)
    returned = block.attention_output(layer, hidden_states, options)
    attention = block.attention_added(layer, returned)
    out = hidden_states + _modulated(layer, hidden_states, attention)
    if component.residual == "kept":
        out = out + attention
    return block.returned(block.finished(layer, out, options), returned)


def _modulated(
    layer: Any, states: Tensor, attention: Tensor, bottleneck: list[Tensor] | None = None
) -> Tensor:
    """What the modulated MLP adds to the residual stream, given what attention adds."""
    component: NPComponent = layer.np_component
    block: Block = layer.np_block
    options: dict[str, Any] = {} if bottleneck is None else {"bottleneck": bottleneck}
    if component.mixture is not None:  # routing is the base model's
        options["routed_by"] = block.mlp_input(layer, states, attention)
    # the MLP reads the layer's input: attention reaches it through its weights alone
    h = block.mlp_input(layer, states)
    # a function: accelerate would move a module among the arguments, also one that is offloaded
    y = component(attention, h, lambda: _mlp(layer), **options)
    return block.mlp_added(layer, y, normed=component.residual == "kept")


def _parts(layer: Any, hidden_states: Tensor, scaffold: Scaffold, call: Mapping[str, Any]) -> Parts:
    component: NPComponent = layer.np_component
    block: Block = layer.np_block
    source, attention, norms, weights, virtual, state = scaffold
    kept = component.residual == "kept"
    if attention is None:
        read = hidden_states if source is None else source
        attention = block.attention_added(layer, block.attention_output(layer, read, call))
    states, read = hidden_states, attention
    base = None
    if virtual is not None:  # one product for all tokens
        states = torch.cat((states, virtual.hidden), -2)
        read = torch.cat((read, virtual.attention), -2)
        with torch.no_grad():
            h = block.mlp_input(layer, virtual.hidden, virtual.attention)
            base = block.mlp_added(layer, mlp_module(layer)(h))
    found: list[Tensor] = []
    outputs = _modulated(layer, states, read, found)
    count = hidden_states.shape[-2]
    parts = Parts(attention, outputs[..., :count, :])
    if virtual is not None:
        parts = parts._replace(virtual=outputs[..., count:, :], virtual_base=base)
    if state is not None:
        state = state + parts.mlp
        output = block.finished(layer, state + attention if kept else state, call)
        parts = parts._replace(output=output)
    if norms or weights is not None:
        u = found[0][..., :count, :] if found else component.bottleneck(attention)
        with torch.no_grad():
            measured = vector_norms(attention, component.factors, u) if norms else None
        squares = None if weights is None else component.sum_of_mean_squares(u, weights)
        parts = parts._replace(norms=measured, squares=squares)
    return parts


def mlp_module(layer: Any) -> Any:
    """An NP layer's MLP as it is called: maybe in wrappers."""
    return getattr(layer, layer.np_block.mlp)


def _mlp(layer: Any) -> Any:
    """An NP layer's MLP, which must be the one whose function was proved when it was converted."""
    mlp, *parts = mlp_parts(layer)
    act_fn = layer.np_component.layout.activation
    for part in (mlp, *parts):
        replaced = ""
        if not patching.is_attached(part, mlp_forward):
            replaced = "it or its forward"
        elif getattr(part, act_fn, None) is not part.np_act_fn:
            replaced = f"its {act_fn}"
        if replaced:
            raise ModelError(
                f"{type(part).__name__}: {replaced} was replaced after the layer was converted; "
                "replace it before npt.convert"
            )
    return mlp


def mlp_parts(layer: Any) -> list[Any]:
    """An NP layer's MLP, and of a mixture the part whose weights change; without wrappers."""
    mlp, mixture = unwrapped(mlp_module(layer)), layer.np_component.mixture
    return [mlp] if mixture is None else [mlp, unwrapped(getattr(mlp, mixture.changed))]


def mlp_forward(
    mlp: Any, *args: Any, modulated: Callable[..., Tensor] | None = None, **options: Any
) -> Any:
    """The forward of an NP layer's MLP: the base's, or with `modulated` the modulated one.

    The MLP is called as a module only if it is not plain. Then its own hooks see what they would
    see in the base model.
    """
    if modulated is None:
        return patching.call_base(mlp, *args, **options)
    return modulated(mlp, *args)
