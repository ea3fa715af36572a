"""Exports of tiny models, of the sizes that vLLM's attention on a CPU takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import npt_fast as npt
from npt_fast.hf.convert import components
from tests.hf import small_models
from tests.hf.exports import load
from tests.training import tiny
from tests.transfer import models

PROMPTS = [[5, 9, 77], [100, 20, 31, 42, 53, 64], [200, 201, 202, 7]]
TOKENS = 16
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "head_dim": 32,
}  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "gemma3_text": {"sliding_window": 64, "final_logit_softcapping": 30.0},
    "granite": {"logits_scaling": 1.0},
    # vLLM lets it see one token more than transformers does
    "cohere2": {"sliding_window": 64, "logit_scale": 1.0},
    "olmo2": {},
}
"""A model type of each other way in which vLLM's layers are wired, and fields for clear leads."""
SCALE = 0.1
"""Standard deviation of NP weights.

With it the NP layers change log-probabilities by up to 8, and float32 is within 1e-4 of float64.
With 0.3 they change as much, and float32 is off by 1e-2: rounding would decide the comparison.
"""
LAYERS: list[dict[str, Any]] = [
    {"layers": [0], "rank": 5, "modulation": "single", "residual": "kept"},
    {"layers": [1], "rank": 3, "num_ranks": 2, "modulation": "dual", "residual": "kept"},
    {"layers": [3], "rank": 4, "num_ranks": 3},
]


def write_export(folder: Path, family: str = "llama") -> Path:
    """A model with layers of each kind, of other shapes and residuals.

    Args:
        folder: folder for base model, checkpoint and export.
        family: one of `models.FAMILIES`, or a model type.
    """
    if family in models.FAMILIES:
        model = models.base(family, **SIZES).float()
    else:
        model = small_models.build(
            family, **SIZES, vocab_size=257, max_position_embeddings=128, initializer_range=0.2,
            **OTHERS.get(family, {}),
        )  # fmt: skip
    model.save_pretrained(folder / "base")
    tiny.tokenizer().save_pretrained(folder / "base")
    return export_of(folder)


def export_of(folder: Path) -> Path:
    """Export the model in ``base`` of the folder with random NP layers."""
    model = load(folder / "base")
    for options in LAYERS:
        npt.convert(model, npt.NPTConfig(**options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for part in components(model).values():
            for parameter in part.parameters():
                parameter.copy_(SCALE * torch.randn(parameter.shape, generator=generator))
    npt.save(model, folder / "np")
    npt.export(folder / "np", folder / "out", model_name=str(folder / "base"))
    return folder / "out"
