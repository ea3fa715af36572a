"""Casts and launches of a decoded token, counted on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import npt_fast as npt
from npt_fast.benchmarks.step_counts import counts_of_token
from npt_fast.hf.convert import components

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS = (0, 2)


@pytest.fixture
def tiny() -> Any:
    """A Llama of three layers in bfloat16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16)


@pytest.fixture
def checkpoint(tiny: Any, tmp_path: Path) -> Path:
    model = npt.convert(tiny, npt.NPTConfig(layers=LAYERS, rank=8, num_ranks=2))
    folder = npt.save(model, tmp_path / "checkpoint")
    npt.unload(model)
    return folder


@pytest.mark.parametrize("options", [{}, {"trainable": True}, {"factors": "int8"}], ids=str)
def test_a_decoded_token_casts_nothing(tiny: Any, checkpoint: Path, options: Any) -> None:
    npt.load(tiny, checkpoint, **options)
    counts = counts_of_token(tiny, launches=False)
    assert (counts.casts, counts.cast_bytes) == (0, 0)
    assert counts.operations > 100


def test_casts_are_counted(tiny: Any, checkpoint: Path) -> None:
    """Six factors a layer, of 4 bytes an entry read and 2 written, if nothing is kept."""
    npt.load(tiny, checkpoint, trainable=True)
    parts = components(tiny)
    entries = sum(p.numel() for part in parts.values() for p in part.parameters())

    def changed(*_: Any) -> None:
        for part in parts.values():
            for parameter in part.parameters():
                parameter.add_(0.0)

    tiny.register_forward_pre_hook(changed)
    counts = counts_of_token(tiny, launches=False)
    assert (counts.casts, counts.cast_bytes) == (6 * len(LAYERS), 6 * entries)
