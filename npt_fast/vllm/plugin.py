"""vLLM's entry point: it calls `register` in each of its processes (``vllm.general_plugins``).

By then npt_fast is imported, and transformers knows the model types of exports.
"""

from __future__ import annotations

from typing import Any

ARCHITECTURES = tuple(
    f"NPT{family}ForCausalLM" for family in ("Llama", "Mistral", "Qwen2", "Qwen3")
)
"""What ``architectures`` of ``config.json`` may name."""


def register() -> None:
    """Make vLLM know the NPT models, and check each before its workers start."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    class Check(VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            from npt_fast.vllm.source import check, describe, open_source

            model_config = vllm_config.model_config
            shards = vllm_config.parallel_config.tensor_parallel_size
            source = open_source(model_config)
            check(source, model_config.hf_config, shards)
            # vLLM keeps compiled graphs by a hash of this config, and a path may get other layers
            model_config.hf_config.npt_layers = describe(source)

    for architecture in ARCHITECTURES:
        if architecture not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(architecture, f"npt_fast.vllm.models:{architecture}")
            MODELS_CONFIG_MAP[architecture] = Check
