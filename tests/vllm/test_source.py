"""What an engine is told before its workers start."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

import npt_fast as npt
from npt_fast.checkpoint.checkpoint import open_checkpoint
from npt_fast.hf.model_types import MODEL_TYPES
from npt_fast.vllm import source as module
from npt_fast.vllm.layer import ARCHITECTURES
from npt_fast.vllm.source import OVERRIDE, check, check_plain, describe, open_source
from tests.checkpoints import flip_byte, layer_weights, write_checkpoint
from tests.hf.exports import Parts, config_of, write_parts
from tests.training import tiny


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return write_parts(tmp_path_factory.mktemp("parts"))


def model_config(folder: Path, **overrides: Any) -> Any:
    """What `open_source` asks of vLLM's config."""
    config = AutoConfig.from_pretrained(folder)
    config.update(overrides)
    return SimpleNamespace(hf_config=config, model=str(folder), revision=None, dtype=torch.float32)


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
    check(source, given, 3)
    with pytest.raises(npt.ModelError, match=r"tensor parallel size 5 does not divide .* width 48"):
        check(source, given, 5)
    with pytest.raises(npt.ModelError, match="hidden_size 32, the model has 64"):
        check(source, model_config(tmp_path / "out", hidden_size=64), 1)
    helium = ["NPTHeliumForCausalLM"]
    with pytest.raises(npt.ModelError, match="not in NPTHeliumForCausalLM; load it with"):
        check(source, model_config(tmp_path / "out", architectures=helium), 1)
    dual = write_checkpoint(tmp_path / "np", layer_weights(1, modulation="dual", d=32, f=48))
    other = open_source(model_config(tmp_path / "out", **{OVERRIDE: str(dual)}))
    with pytest.raises(npt.ModelError, match="no file says whether layer 1 keeps attention"):
        check(other, given, 1)
    plain = write_checkpoint(tmp_path / "plain", layer_weights(1, modulation="plain", d=32, f=48))
    other = open_source(model_config(tmp_path / "out", **{OVERRIDE: str(plain)}))
    with pytest.raises(npt.ModelError, match="layer 1 is plain, for an MLP without a gate"):
        check(other, given, 1)
    given.dtype = torch.float16
    check(source, given, 1)
    large = {name: 1e6 * tensor for name, tensor in layer_weights(1, d=32, f=48).items()}
    other = source._replace(checkpoint=open_checkpoint(write_checkpoint(tmp_path / "l", large)))
    with pytest.raises(npt.ModelError, match="has numbers that are too large for float16"):
        check(other, given, 1)
    flip_byte(tmp_path / "out" / "npt_weights.safetensors", -5)
    with pytest.raises(npt.CheckpointError, match="its SHA-256 differs"):
        open_source(given)


def test_another_base_of_the_same_sizes(parts: Parts, tmp_path: Path) -> None:
    other = tiny.save(tmp_path / "other")
    options = {"allow_different_base": True, "model_name": str(other)}
    npt.export(parts.checkpoint, tmp_path / "meant", **options)
    meant = model_config(tmp_path / "meant")
    check(open_source(meant), meant, 1)
    problem = r"np: belongs to another base model of the same sizes than .*/meant"
    with pytest.raises(npt.ModelError, match=problem):
        named = model_config(tmp_path / "meant", **{OVERRIDE: str(parts.checkpoint)})
        check(open_source(named), named, 1)
    for reference in (True, False):
        out = tmp_path / f"out-{reference}"
        npt.export(parts.checkpoint, out, model_name=str(parts.base), reference=reference)
        given = model_config(out)
        check(open_source(given), given, 1)
        content = json.loads((out / "config.json").read_text())
        if reference:
            content["npt"]["base"]["folder"] = str(other)
            (out / "config.json").write_text(json.dumps(content))
        else:
            shutil.copy(other / "model.safetensors", out)
        given = model_config(out)
        with pytest.raises(npt.ModelError, match="belongs to another base model"):
            check(open_source(given), given, 1)


def test_another_base_on_the_hub(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is fetched first; an export that names it need not have its weights."""
    npt.export(parts.checkpoint, tmp_path / "out", reference=True)
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    content["npt"]["base"] = {"hub_id": "org/tiny", "revision": "abc"}
    (tmp_path / "out" / "config.json").write_text(json.dumps(content))
    given, asked = model_config(tmp_path / "out"), []
    folders = [parts.base, tiny.save(tmp_path / "other")]

    def fetch(*place: str | None) -> Path:
        asked.append(place)
        return folders[len(asked) - 1]

    monkeypatch.setattr(module, "download_weights", fetch)
    check(open_source(given), given, 1, "cache")
    with pytest.raises(npt.ModelError, match=r"belongs to another base model .* than org/tiny"):
        check(open_source(given), given, 1, "cache")
    assert asked == 2 * [("org/tiny", "abc", "cache")]


def test_np_layers_of_a_plain_model_are_not_forgotten(parts: Parts, tmp_path: Path) -> None:
    """By overrides of an engine's user, the architecture may be the base model's."""
    npt.export(parts.checkpoint, tmp_path / "out")
    plain = ["LlamaForCausalLM"]
    check_plain(model_config(parts.base))
    for given in (
        model_config(tmp_path / "out", architectures=plain),
        model_config(parts.base, **{OVERRIDE: str(parts.checkpoint)}),
    ):
        with pytest.raises(npt.ModelError, match=r'"architectures": \["NPTLlamaForCausalLM"\]'):
            check_plain(given)


def test_the_architectures_are_those_of_exports(tmp_path: Path) -> None:
    """An export names one, and the table of model types says which are served."""
    parts = write_parts(tmp_path)
    npt.export(parts.checkpoint, tmp_path / "out")
    assert config_of(tmp_path / "out")["architectures"] == ["NPTLlamaForCausalLM"]
    served = {f"NPT{NAMES[name]}" for name, about in MODEL_TYPES.items() if about.vllm}
    assert served == set(ARCHITECTURES)


def test_components_of_a_checkpoint(parts: Parts) -> None:
    from npt_fast.hf.checkpoint import read_component
    from npt_fast.hf.convert import components

    for layer, expected in components(parts.by_hand()).items():
        found = read_component(open_checkpoint(parts.checkpoint), layer)
        assert found.architecture == expected.architecture and found.residual == expected.residual
        for name, tensor in expected.joined.items():
            assert torch.equal(found.joined[name], tensor)
