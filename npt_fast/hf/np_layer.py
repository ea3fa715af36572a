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
    # the MLP reads the layer's input: attention reaches it through its weights alone
    h = block.mlp_input(layer, hidden_states)
    # a function: accelerate would move a module among the arguments, also one that is offloaded
    kept = component.residual == "kept"
    y = block.mlp_added(layer, component(attention, h, lambda: _mlp(layer)), normed=kept)
    out = hidden_states + y
    out = block.finished(layer, out + attention if kept else out, options)
    return block.returned(out, returned)


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
    h = block.mlp_input(layer, states)
    outputs = component(read, h, lambda: _mlp(layer), bottleneck=found)
    outputs = block.mlp_added(layer, outputs, normed=kept)
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
    mlp = unwrapped(mlp_module(layer))
    act_fn, replaced = layer.np_component.layout.activation, ""
    if not patching.is_attached(mlp, mlp_forward):
        replaced = "it or its forward"
    elif getattr(mlp, act_fn, None) is not mlp.np_act_fn:
        replaced = f"its {act_fn}"
    if replaced:
        raise ModelError(
            f"{type(mlp).__name__}: {replaced} was replaced after the layer was converted; "
            "replace it before npt.convert"
        )
    return mlp


def mlp_forward(
    mlp: Any, h: Tensor, *, modulated: Callable[[Any, Tensor], Tensor] | None = None
) -> Tensor:
    """The forward of an NP layer's MLP: the base's, or with `modulated` the modulated one.

    The MLP is called as a module only if it is not plain. Then its own hooks see what they would
    see in the base model.
    """
    y: Tensor = patching.call_base(mlp, h) if modulated is None else modulated(mlp, h)
    return y
