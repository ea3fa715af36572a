"""vLLM's entry point: it calls `register` in each of its processes (``vllm.general_plugins``).

By then npt_fast is imported, and transformers knows the model types of exports.
"""

from __future__ import annotations

from typing import Any

from npt_fast.hf.exported import ARCHITECTURE_PREFIX
from npt_fast.hf.model_types import MODEL_TYPES
from npt_fast.vllm.layer import ARCHITECTURES
from npt_fast.vllm.source import check, check_plain, describe, open_source


def register() -> None:
    """Make vLLM know the NPT models, and check each before its workers start."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    class Check(VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            model_config = vllm_config.model_config
            shards = vllm_config.parallel_config.tensor_parallel_size
            source = open_source(model_config)
            check(source, model_config, shards, vllm_config.load_config.download_dir)
            # vLLM keeps compiled graphs by a hash of this config, and a path may get other layers
            model_config.hf_config.npt_layers = describe(source)

    class CheckPlain(VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            check_plain(vllm_config.model_config)

    for architecture in ARCHITECTURES:
        MODELS_CONFIG_MAP.setdefault(architecture.removeprefix(ARCHITECTURE_PREFIX), CheckPlain)
    for architecture in _exported():
        if architecture not in ModelRegistry.get_supported_archs():
            own = architecture if architecture in ARCHITECTURES else next(iter(ARCHITECTURES))
            ModelRegistry.register_model(architecture, f"npt_fast.vllm.models:{own}")
            MODELS_CONFIG_MAP[architecture] = Check


def _exported() -> set[str]:
    """What ``architectures`` of an export may name; `check` refuses those that are not served."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    return {ARCHITECTURE_PREFIX + NAMES[base] for base in MODEL_TYPES if base in NAMES}
