"""A decoder layer of vLLM as an NP layer; no vLLM here.

An NP layer only adds to what the projections return, so that quantised projections, adapters and
shards act as in vLLM's own layer. vLLM's layers have the parts of transformers' layers, so that the
same table describes them; gate and up are one matrix in all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import Tensor, nn

from npt_fast.called_mlp import first
from npt_fast.hf.exported import ARCHITECTURE_PREFIX
from npt_fast.hf.families import Block
from npt_fast.vllm.factors import ShardedFactors


class NPLayer:
    """What an NP layer does in place of vLLM's decoder layer, whose parts it calls."""

    np_factors: ShardedFactors
    np_block: Block

    def added(self, h: Tensor, call: Mapping[str, Any]) -> Tensor:
        """What the layer adds to the residual stream (design.md#layer).

        Args:
            h: the residual stream in front of the layer, ``(T, D)`` or ``(1, T, D)``.
            call: keyword arguments of attention.

        Returns:
            ``(T, D)``.
        """
        block, factors = self.np_block, self.np_factors
        returned = block.attention_output(self, h, call)
        x = block.attention_added(self, returned).flatten(0, -2)
        u = factors.bottleneck(x)
        # the MLP reads the layer's input: attention reaches it through its weights alone
        read = block.mlp_input(self, h).flatten(0, -2)
        mlp = getattr(self, block.mlp)
        inner = mlp.act_fn(first(mlp.gate_up_proj(read)) + factors.gate_up_change(u, read))
        y = first(mlp.down_proj(inner))
        change = factors.down_change(u, inner)
        if change is not None:
            y = y + change
        y = block.mlp_added(self, y, normed=factors.kept)
        return y + x if factors.kept else y


class DeferringLayer(NPLayer):
    """Leaves it to the next norm to add what it returns to the residual stream."""

    def forward(
        self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        h = hidden_states if residual is None else hidden_states + residual
        # Mistral's layers get t_cond, which is None but in models of speech, and attention does not
        given = {name: value for name, value in options.items() if value is not None}
        return self.added(h, {"positions": positions, **given}), h


class AddingLayer(NPLayer):
    """Returns the residual stream, and what it was before if it is given another such thing."""

    def forward(
        self, positions: Tensor, hidden_states: Tensor, *before: Tensor | None
    ) -> Tensor | tuple[Tensor, Tensor]:
        out = hidden_states + self.added(hidden_states, {"positions": positions})
        return (out, hidden_states) if before else out


class TransformersLayer(NPLayer):
    """A layer of transformers, whose model vLLM runs with parts of its own."""

    def forward(self, hidden_states: Tensor, **options: Any) -> Tensor:
        return hidden_states + self.added(hidden_states, options)


_FAMILIES: dict[type[NPLayer], tuple[str, ...]] = {
    DeferringLayer: (
        *("Gemma", "Gemma2", "Gemma3", "Glm4", "Llama", "Mistral", "Phi3", "Qwen2", "Qwen3"),
    ),
    AddingLayer: ("Cohere", "Cohere2", "Exaone4", "Granite"),
    TransformersLayer: ("Olmo2", "Olmo3", "SmolLM3"),
}
ARCHITECTURES: dict[str, type[NPLayer]] = {
    f"{ARCHITECTURE_PREFIX}{family}ForCausalLM": layer
    for layer, families in _FAMILIES.items()
    for family in families
}
"""What ``architectures`` of ``config.json`` may name for vLLM to serve it -> its NP layers."""


@cache
def np_layer_class(own: Any, layer_class: Any) -> type[nn.Module]:
    """The class of NP layers whose parts are those of a class of vLLM's layers."""
    return type(f"NP{layer_class.__name__}", (own, layer_class), {})
