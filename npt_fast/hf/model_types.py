"""The table of ``npt-fast models``: model types that were tried, and which of their layers work.

It is for readers. What is converted is decided by `probe`, which also accepts types that are not
listed here.
"""

from __future__ import annotations

_ALL = (
    *("cwm", "diffllama", "emu3", "ernie4_5", "gemma", "got_ocr2", "helium", "hunyuan_v1_dense"),
    *("internlm3", "iquestcoder", "llama", "ministral", "ministral3", "mistral"),
    *("moss_transcribe_diarize", "olmo", "qwen2", "qwen3", "seed_oss", "smollm3", "stablelm"),
    "youtu",
)
_DENSE = (
    *("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "dots3_note_text"),
    *("ernie4_5_moe", "exaone_moe", "flint", "glm4_moe", "glm4_moe_lite", "hy_v3", "laguna"),
    *("mimo_v2_flash", "qwen2_moe", "qwen3_moe"),
)

MODEL_TYPES: dict[str, str] = {
    **dict.fromkeys(_ALL, "all"),
    **dict.fromkeys(_DENSE, "those without experts"),
    **dict.fromkeys(("qwen3_5", "qwen3_5_text"), "those with full attention"),
    "qwen3_next": "those with full attention and without experts",
    "granite": "all, if residual_multiplier is 1",
}
"""``model_type`` of config.json -> the layers that can be NP layers."""
