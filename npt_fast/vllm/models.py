"""NPT classes for vLLM's models: its own classes, whose decoder layers compute NP layers.

An NP layer only adds to what the projections return, so that quantised projections, adapters and
shards act as in vLLM's own layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

from torch import Tensor, nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.utils import PPMissingLayer

from npt_fast.checkpoint.keys import parse_key
from npt_fast.hf.checkpoint import read_component
from npt_fast.vllm.factors import ShardedFactors
from npt_fast.vllm.source import open_source


class _NPLayer:
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
def _np_class(layer_class: type[nn.Module]) -> type[nn.Module]:
    return type(f"NP{layer_class.__name__}", (_NPLayer, layer_class), {})


class _NPModel:
    """What a causal language model of vLLM gets more: NP layers, and their weights.

    Attributes:
        secondary_weights: where vLLM finds the base weights if the exported folder has none.
    """

    model: Any
    secondary_weights: tuple[Any, ...] = ()

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        source = open_source(vllm_config.model_config)
        if source.base is not None:
            place, revision = source.base
            self.secondary_weights = (DefaultModelLoader.Source(place, revision),)
        for index in source.checkpoint.modules:
            layer = self.model.layers[index]
            if isinstance(layer, PPMissingLayer):
                continue
            layer.np_factors = ShardedFactors(
                read_component(source.checkpoint, index),
                device=layer.input_layernorm.weight.device,
                dtype=vllm_config.model_config.dtype,
                shard=get_tensor_model_parallel_rank(),
                shards=get_tensor_model_parallel_world_size(),
                reduce=tensor_model_parallel_all_reduce,
            )
            layer.__class__ = _np_class(type(layer))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the base weights. The NP weights that vLLM finds beside them are loaded already."""
        base = ((name, tensor) for name, tensor in weights if parse_key(name) is None)
        loaded: set[str] = super().load_weights(base)  # type: ignore[misc]
        return loaded


class NPTLlamaForCausalLM(_NPModel, LlamaForCausalLM):
    """Llama with NP layers."""


class NPTMistralForCausalLM(_NPModel, MistralForCausalLM):
    """Mistral with NP layers."""


class NPTQwen2ForCausalLM(_NPModel, Qwen2ForCausalLM):
    """Qwen2 with NP layers."""


class NPTQwen3ForCausalLM(_NPModel, Qwen3ForCausalLM):
    """Qwen3 with NP layers."""
