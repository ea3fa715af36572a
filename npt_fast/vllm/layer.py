"""A decoder layer of vLLM as an NP layer; no vLLM here.

An NP layer only adds to what the projections return, so that quantised projections, adapters and
shards act as in vLLM's own layer.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor, nn

from npt_fast.vllm.factors import ShardedFactors


class NPLayer:
    """What an NP layer does in place of vLLM's decoder layer, whose parts it calls."""

    np_factors: ShardedFactors
    input_layernorm: Any
    post_attention_layernorm: Any
    self_attn: Any
    mlp: Any

    def forward(
        self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        x = self.self_attn(positions=positions, hidden_states=hidden_states)
        factors = self.np_factors
        u = factors.bottleneck(x)
        # the MLP reads the layer's input: attention reaches it through its weights alone
        h = self.post_attention_layernorm(residual)
        gate_up, _ = self.mlp.gate_up_proj(h)
        inner = self.mlp.act_fn(gate_up + factors.gate_up_change(u, h))
        y, _ = self.mlp.down_proj(inner)
        change = factors.down_change(u, inner)
        if change is not None:
            y = y + change
        # the next norm adds what is returned to the residual stream
        return y + x if factors.kept else y, residual


@cache
def np_layer_class(layer_class: Any) -> type[nn.Module]:
    """The class of NP layers whose parts are those of a class of vLLM's layers."""
    return type(f"NP{layer_class.__name__}", (NPLayer, layer_class), {})
