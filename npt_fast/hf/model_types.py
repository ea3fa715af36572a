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


_DENSE = ModelType("those without experts")
MODEL_TYPES: dict[str, ModelType] = {
    **_each(
        (
            *("exaone4", "gemma", "gemma2", "gemma3_text", "glm4", "granite", "llama", "mistral"),
            *("olmo2", "olmo3", "phi3", "qwen2", "qwen3", "smollm3"),
        ),
        ModelType(vllm=True),
    ),
    **_each(
        (
            *("cwm", "diffllama", "emu3", "ernie4_5", "gemma3", "got_ocr2", "granite_swa"),
            *("helium", "hunyuan_v1_dense", "internlm3", "iquestcoder", "minicpm3", "ministral"),
            *("ministral3", "moss_transcribe_diarize", "olmo", "qwen3_5", "qwen3_5_text"),
            *("seed_oss", "stablelm", "youtu"),
        ),
        ModelType(),
    ),
    **_each(("cohere", "cohere2"), ModelType(residuals="removed", vllm=True)),
    **_each(
        (
            *("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1"),
            *("dots3_note_text", "ernie4_5_moe", "exaone_moe", "flint", "glm4_moe"),
            *("glm4_moe_lite", "hy_v3", "laguna", "mimo_v2_flash", "qwen2_moe", "qwen3_moe"),
            "qwen3_next",
        ),
        _DENSE,
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
