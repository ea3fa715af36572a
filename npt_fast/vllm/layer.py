"""A decoder layer of vLLM as an NP layer; no vLLM here.

An NP layer only adds to what the projections return, so that quantised projections, adapters and
shards act as in vLLM's own layer. vLLM's layers have the parts of transformers' layers, apart from
gate and up, which are one matrix in all of them, so that the same table describes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import Tensor, nn

from npt_fast.hf.families import Block, first
from npt_fast.vllm.factors import ShardedFactors


class NPLayer:
    """What an NP layer does in place of vLLM's decoder layer, whose parts it calls."""

    np_factors: ShardedFactors
    np_block: Block

    def added(self, h: Tensor, call: Mapping[str, Any]) -> Tensor:
        """What the layer adds to the residual stream (design.md#layer).

        Args:
            h: the residual stream in front of the layer, ``(T, D)``.
            call: keyword arguments of attention.

        Returns:
            ``(T, D)``.
        """
        block, factors = self.np_block, self.np_factors
        x = block.attention(self, h, call)
        u = factors.bottleneck(x)
        # the MLP reads the layer's input: attention reaches it through its weights alone
        read = block.mlp_input(self, h)
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
        return self.added(h, {"positions": positions, **options}), h


class AddingLayer(NPLayer):
    """Returns the residual stream, and the one in front of it if it is given another one."""

    def forward(
        self, positions: Tensor, hidden_states: Tensor, *before: Tensor | None, **options: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        out = hidden_states + self.added(hidden_states, {"positions": positions, **options})
        return (out, hidden_states) if before else out


@cache
def np_layer_class(layer_class: Any, *, defers: bool) -> type[nn.Module]:
    """The class of NP layers whose parts are those of a class of vLLM's layers.

    Args:
        layer_class: vLLM's class.
        defers: whether its layers leave the last addition to the next norm.
    """
    own = DeferringLayer if defers else AddingLayer
    return type(f"NP{layer_class.__name__}", (own, layer_class), {})
