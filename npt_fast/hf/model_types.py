"""The table of ``npt-fast models``: model types that were tried, and what works for them.

It is for readers. What is converted is decided by `probe`, which also accepts types that are not
listed here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class ModelType:
    """What works for a model type.

    Attributes:
        layers: which layers can be NP layers.
        residuals: residual modes in which training has something to learn.
        kernels: ``"fused"`` if one kernel computes the modulated MLP, ``"called"`` if the base
            model's projections are called and their changes are computed each by itself.
        vllm: whether the vLLM plugin serves it.
    """

    layers: str = "all"
    residuals: str = "removed, kept"
    kernels: str = "fused"
    vllm: bool = False


def _each(names: Iterable[str], of: ModelType) -> dict[str, ModelType]:
    return dict.fromkeys(names, of)


MODEL_TYPES: dict[str, ModelType] = {
    **_each(
        (
            *("exaone4", "gemma", "gemma2", "gemma3_text", "glm4", "granite", "llama"),
            *("mistral", "olmo2", "olmo3", "phi3", "qwen2", "qwen3", "smollm3"),
        ),
        ModelType(vllm=True),
    ),
    **_each(
        ("cohere", "cohere2"),
        ModelType(residuals="removed", vllm=True),
    ),
    **_each(
        (
            *("aria_text", "axk2", "cwm", "deepseek_v2", "deepseek_v3", "deepseek_v32"),
            *("diffllama", "dots1", "dots3_note_text", "emu3", "ernie4_5"),
            *("ernie4_5_moe", "exaone_moe", "flint", "gemma3", "glm", "glm4_moe"),
            *("glm4_moe_lite", "got_ocr2", "granite_swa", "helium", "hunyuan_v1_dense"),
            *("hunyuan_v1_moe", "hy_v3", "internlm3", "iquestcoder", "kolibri1"),
            *("laguna", "minicpm3", "ministral", "ministral3"),
            *("moss_transcribe_diarize", "olmo", "olmo_hybrid", "phi4_multimodal"),
            *("qwen2_moe", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text"),
            *("qwen3_5_text", "qwen3_next", "seed_oss", "solar_open", "stablelm"),
            *("youtu",),
        ),
        ModelType(),
    ),
    **_each(
        (
            *("arcee", "flex_olmo", "gpt-sw3", "gpt2", "gpt_bigcode"),
            *("gpt_neo", "gpt_oss", "granitemoe", "granitemoe_swa", "granitemoeshared"),
            *("jais2", "mellum", "mimo_v2_flash", "minimax_m2", "mixtral", "nanochat"),
            *("nemotron", "olmoe", "persimmon", "phimoe", "qwen3_moe", "starcoder2"),
        ),
        ModelType(kernels="called"),
    ),
    **_each(
        ("codegen", "cohere2_moe", "falcon", "gpt_neox", "gptj", "phi"),
        ModelType(residuals="removed", kernels="called"),
    ),
    **_each(
        ("axk1", "gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"),
        ModelType("those without experts"),
    ),
}
"""``model_type`` of config.json -> what works for it."""

MODEL_TYPE_HEADS = ("model_type", "layers that can be NP layers", "residual", "kernels", "vLLM")


def model_type_rows() -> list[tuple[str, ...]]:
    """The table in words, a row for each model type."""
    return [
        (name, about.layers, about.residuals, about.kernels, "yes" if about.vllm else "no")
        for name, about in sorted(MODEL_TYPES.items())
    ]
