"""Runs on mixtures of experts: resumed, exported and loaded again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import npt_fast as npt
from npt_fast.hf.base_model import load_base_model
from tests.hf.small_models import build
from tests.training import runs, tiny
from tests.training.runs import Place

SETTINGS: dict[str, Any] = {"residual": "kept", "max_steps": 6, "save_steps": 3}


def of(place: Place, folder: Path, family: str) -> Place:
    """The same place with a mixture as its base model."""
    build(family, initializer_range=0.2, vocab_size=257).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return replace(place, base=folder)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_resuming_is_exact(place: Place, tmp_path: Path, family: str) -> None:
    place = of(place, tmp_path / "base", family)
    whole = place.train(tmp_path / "whole", **SETTINGS)
    half = whole.with_name("checkpoint-3")
    rest = place.train(tmp_path / "rest", resume_from=str(half), **SETTINGS)
    runs.assert_same_end(rest, whole)


@pytest.mark.parametrize("reference", [False, True], ids=["whole", "reference"])
def test_an_export_is_the_model(place: Place, tmp_path: Path, reference: bool) -> None:
    place = of(place, tmp_path / "base", "qwen3_moe")
    trained = place.train(tmp_path / "run", **SETTINGS)
    npt.export(trained, tmp_path / "export", model_name=str(place.base), reference=reference)
    auto: Any = AutoModelForCausalLM
    exported = auto.from_pretrained(tmp_path / "export").eval()
    base, _ = load_base_model(str(place.base))
    loaded = npt.load(base, trained)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(exported(ids).logits, loaded(ids).logits)
