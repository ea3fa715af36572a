"""NPT classes for vLLM's models: its own classes, some of whose decoder layers are NP layers."""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from functools import cache
from typing import Any

from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from vllm import ModelRegistry
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.utils import PPMissingLayer

from npt_fast.checkpoint.keys import parse_key
from npt_fast.hf.checkpoint import read_component
from npt_fast.hf.exported import ARCHITECTURE_PREFIX
from npt_fast.hf.families import candidates
from npt_fast.vllm.factors import ShardedFactors
from npt_fast.vllm.layer import ARCHITECTURES, np_layer_class
from npt_fast.vllm.source import has_pickles, open_source


class _NPModel:
    """What a causal language model of vLLM gets more: NP layers, and their weights.

    Attributes:
        np_layer: class of `npt_fast.vllm.layer` that its NP layers are of.
        secondary_weights: where vLLM finds the base weights if the exported folder has none.
        allow_patterns_overrides: which files vLLM takes for weights. By itself it takes those of
            one kind, and safetensors first: of base weights in pickles, the NP weights alone.
    """

    model: Any
    np_layer: Any
    secondary_weights: tuple[Any, ...] = ()
    allow_patterns_overrides: list[str] | None = None

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        source = open_source(vllm_config.model_config)
        if source.base is not None:
            place, revision = source.base
            self.secondary_weights = (DefaultModelLoader.Source(place, revision),)
        elif has_pickles(vllm_config.model_config.model):
            self.allow_patterns_overrides = ["pytorch_model*.bin"]
        for index in source.checkpoint.modules:
            layer: Any = self.model.layers[index]
            if isinstance(layer, PPMissingLayer):
                continue
            layer.np_block = block = candidates(layer)[0]
            # Cohere sums over devices what both add, but an NP layer reads what attention adds
            getattr(layer, block.attn).o_proj.reduce_results = True
            getattr(layer, block.mlp).down_proj.reduce_results = True
            layer.np_factors = ShardedFactors(
                read_component(source.checkpoint, index),
                device=next(layer.parameters()).device,
                dtype=vllm_config.model_config.dtype,
                shard=get_tensor_model_parallel_rank(),
                shards=get_tensor_model_parallel_world_size(),
                reduce=tensor_model_parallel_all_reduce,
            )
            layer.__class__ = np_layer_class(self.np_layer, layer.__class__)

    @property
    def _from_config_kwargs(self) -> dict[str, Any]:
        """What a model of transformers is made from, where vLLM runs one: without NP layers."""
        options: dict[str, Any] = super()._from_config_kwargs  # type: ignore[misc]
        config = copy(options["config"])
        config.__class__ = CONFIG_MAPPING[config.model_type]
        return {**options, "config": config}

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the base weights. The NP weights that vLLM finds beside them are loaded already."""
        base = ((name, tensor) for name, tensor in weights if parse_key(name) is None)
        loaded: set[str] = super().load_weights(base)  # type: ignore[misc]
        return loaded


@cache
def __getattr__(name: str) -> Any:
    """The NPT class of an architecture, which is vLLM's class of the base model with NP layers."""
    if name not in ARCHITECTURES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    own = ModelRegistry.models[name.removeprefix(ARCHITECTURE_PREFIX)].load_model_cls()
    content = {"__module__": __name__, "np_layer": ARCHITECTURES[name]}
    return type(name, (_NPModel, own), content)
