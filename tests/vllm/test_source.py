"""What an engine is told before its workers start."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig

import npt_fast as npt
from npt_fast.checkpoint.checkpoint import open_checkpoint
from npt_fast.vllm.source import ARCHITECTURES, OVERRIDE, check, describe, open_source
from tests.checkpoints import flip_byte, layer_weights, write_checkpoint
from tests.hf.exports import Parts, write_parts


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return write_parts(tmp_path_factory.mktemp("parts"))


def model_config(folder: Path, **overrides: Any) -> Any:
    """What `open_source` asks of vLLM's config."""
    config = AutoConfig.from_pretrained(folder)
    config.update(overrides)
    return SimpleNamespace(hf_config=config, model=str(folder), revision=None)


def test_sources(parts: Parts, tmp_path: Path) -> None:
    npt.export(parts.checkpoint, tmp_path / "whole")
    found = open_source(model_config(tmp_path / "whole"))
    assert list(found.checkpoint.modules) == [1, 2] and found.base is None
    layer = "triple, num_ranks 2, rank 3, removed"
    assert describe(found) == {"1": layer, "2": layer}
    npt.export(parts.checkpoint, tmp_path / "named", reference=True)
    assert open_source(model_config(tmp_path / "named")).base == (str(parts.base), None)
    npt.merge(f"{parts.checkpoint}:2", tmp_path / "other")
    other = {OVERRIDE: str(tmp_path / "other")}
    for folder in (tmp_path / "whole", parts.base):  # an export, or a plain base model
        assert list(open_source(model_config(folder, **other)).checkpoint.modules) == [2]
    found = open_source(model_config(tmp_path / "named", **other))
    assert list(found.checkpoint.modules) == [2] and found.base == (str(parts.base), None)
    with pytest.raises(npt.ModelError, match="npt_checkpoint must be the path of a checkpoint"):
        open_source(model_config(tmp_path / "whole", **{OVERRIDE: 5}))


def test_what_is_refused_at_the_start(parts: Parts, tmp_path: Path) -> None:
    npt.export(parts.checkpoint, tmp_path / "out")
    given = model_config(tmp_path / "out")
    source = open_source(given)
    check(source, given.hf_config, 3)
    with pytest.raises(npt.ModelError, match=r"tensor parallel size 5 does not divide .* width 48"):
        check(source, given.hf_config, 5)
    with pytest.raises(npt.ModelError, match="hidden_size 32, the model has 64"):
        check(source, AutoConfig.for_model("llama", hidden_size=64, num_hidden_layers=4), 1)
    gemma = AutoConfig.for_model("gemma", architectures=["NPTGemmaForCausalLM"])
    with pytest.raises(npt.ModelError, match="not in NPTGemmaForCausalLM; load it with"):
        check(source, gemma, 1)
    dual = write_checkpoint(tmp_path / "np", layer_weights(1, modulation="dual", d=32, f=48))
    other = open_source(model_config(tmp_path / "out", **{OVERRIDE: str(dual)}))
    with pytest.raises(npt.ModelError, match="no file says whether layer 1 keeps attention"):
        check(other, given.hf_config, 1)
    flip_byte(tmp_path / "out" / "npt_weights.safetensors", -5)
    with pytest.raises(npt.CheckpointError, match="its SHA-256 differs"):
        open_source(given)


def test_the_architectures_are_those_of_exports(tmp_path: Path) -> None:
    from tests.transfer.models import FAMILIES

    named = set()
    for family in FAMILIES:
        parts = write_parts(tmp_path / family, family)
        npt.export(parts.checkpoint, tmp_path / family / "out")
        config = json.loads((tmp_path / family / "out" / "config.json").read_text())
        named.update(config["architectures"])
    assert named == set(ARCHITECTURES)


def test_components_of_a_checkpoint(parts: Parts) -> None:
    import torch

    from npt_fast.hf.checkpoint import read_component
    from npt_fast.hf.convert import components

    for layer, expected in components(parts.by_hand()).items():
        found = read_component(open_checkpoint(parts.checkpoint), layer)
        assert found.architecture == expected.architecture and found.residual == expected.residual
        for name, tensor in expected.joined.items():
            assert torch.equal(found.joined[name], tensor)
