"""Models that read images too: NP layers are those of their text decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

import npt_fast as npt
from npt_fast.hf.base_model import load_base_model, load_skeleton
from npt_fast.hf.convert import decoder_layers
from tests.transfer.models import ids_of, logits, tokenizer

IDS = ids_of("the red house")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-VL with its tokenizer."""
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
    text = {
        "vocab_size": 257, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 256, "rope_parameters": rope, "initializer_range": 0.2,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "depth": 2, "num_heads": 4,
        "out_hidden_size": 32, "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision))
    found = tmp_path_factory.mktemp("vision") / "base"
    model.save_pretrained(found)
    tokenizer.save_pretrained(found)
    return found


def test_trained_loaded_and_injected(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the red house stands by the lake. " * 60)
    report = npt.train(
        npt.TrainOptions(
            model_name=str(folder), data=str(tmp_path / "text.txt"), output_dir=tmp_path / "run",
            train_layers="1,2", max_steps=4, max_length=24, num_eval_samples=2, np_rank=3,
            num_ranks=2, batch_size=2, learning_rate=1e-2, logging_steps=100, eval_steps=0,
            save_steps=100, generation_steps=0, cpu=True,
        )
    )  # fmt: skip
    model, tokens = load_base_model(str(folder))
    assert type(model).__name__ == "Qwen3VLForConditionalGeneration"
    plain = logits(model, IDS)
    npt.load(model, report.checkpoint)
    assert [status.layer for status in npt.status(model)] == [1, 2]
    before = logits(model, IDS)
    assert not torch.equal(before, plain)
    modulation = npt.extract(model, tokens, "a blue boat")
    seen: list[Tensor] = []

    def keep(_: Any, args: Any, kwargs: Any, out: Tensor) -> None:
        seen.append(out[0])

    handle = decoder_layers(model)[1].register_forward_hook(keep, with_kwargs=True)
    logits(model, IDS)
    with npt.inject(model, modulation, position=-2) as hits:
        logits(model, IDS)
    handle.remove()
    changed = (seen[0] != seen[1]).any(-1)
    assert changed.nonzero().flatten().tolist() == [IDS.shape[1] - 2]
    assert hits.positions == [[IDS.shape[1] - 2]]
    with npt.disabled(model):
        assert torch.equal(logits(model, IDS), plain)


def test_its_config_is_enough(folder: Path) -> None:
    assert len(decoder_layers(load_skeleton(str(folder)))) == 4
