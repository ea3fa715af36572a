"""transformers' Auto classes load exported models as `npt.load` does, or say what is wrong."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

import npt_fast as npt
from npt_fast.hf.base_model import load_base_model, load_skeleton
from npt_fast.hf.model_types import MODEL_TYPES
from tests.checkpoints import flip_byte
from tests.hf.exports import Parts, load, logits, write_parts
from tests.hf.small_models import TYPES, build
from tests.hf.test_families import RIGHT
from tests.processes import run_python
from tests.transfer.models import FAMILIES

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return write_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture
def exported(parts: Parts, tmp_path: Path) -> Path:
    """A fresh export, which a test may change."""
    npt.export(parts.checkpoint, tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_equals_convert_and_load(family: str, tmp_path: Path) -> None:
    """Bit for bit, and it is not the base model."""
    parts = write_parts(tmp_path, family)
    npt.export(parts.checkpoint, tmp_path / "out")
    found, by_hand, base = load(tmp_path / "out"), parts.by_hand(), load(parts.base)
    assert type(found) is type(by_hand)
    assert npt.status(found) == npt.status(by_hand)
    assert torch.equal(logits(found), logits(by_hand))
    assert not torch.allclose(logits(found), logits(base))
    prompt = torch.arange(5, 9)[None]
    tokens = [m.generate(prompt, max_new_tokens=9, do_sample=False) for m in (found, by_hand)]
    assert torch.equal(*tokens)
    ours, theirs = (AutoTokenizer.from_pretrained(f) for f in (tmp_path / "out", parts.base))
    assert type(ours) is type(theirs) and ours("a word").input_ids == theirs("a word").input_ids


@pytest.mark.slow
@pytest.mark.parametrize("model_type", RIGHT)
def test_every_type_that_is_listed(model_type: str, tmp_path: Path) -> None:
    """It can be exported and loaded, or is refused when it is exported."""
    if model_type not in TYPES:
        pytest.skip("this transformers has no such type")
    model = build(model_type)
    if model.config.model_type != model_type:
        pytest.skip("its causal language model is of another type")
    model.save_pretrained(tmp_path / "base")
    layer = RIGHT[model_type][0]
    ids = torch.arange(3, 11)[None]
    by_hand = load(tmp_path / "base")
    plain = by_hand(ids).logits
    npt.convert(by_hand, npt.NPTConfig(layers=[layer], rank=2, init="improved", init_scale=1.0))
    npt.save(by_hand, tmp_path / "np")
    try:
        npt.export(tmp_path / "np", tmp_path / "out", model_name=str(tmp_path / "base"))
    except npt.ModelError as error:
        assert "architectures must begin with a causal language model" in str(error)
        return
    found = load(tmp_path / "out")(ids).logits
    assert torch.equal(found, by_hand(ids).logits) and not torch.equal(found, plain)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.bfloat16},
        {"dtype": "auto"},
        {"attn_implementation": "eager"},
        {"device_map": "auto"},
        {"output_loading_info": True},
    ],
    ids=str,
)
def test_options_of_the_loader(options: dict[str, Any], parts: Parts, exported: Path) -> None:
    found = load(exported, **options)
    if "output_loading_info" in options:
        found, about = found
        assert not about["missing_keys"] and not about["unexpected_keys"]
        options = {}
    by_hand = parts.by_hand(**options)
    assert found.dtype == by_hand.dtype
    assert npt.status(found) == npt.status(by_hand)
    assert torch.equal(logits(found), logits(by_hand))


def test_what_cannot_be_loaded_as_asked(exported: Path, tmp_path: Path) -> None:
    options = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "offload"}
    with pytest.raises(npt.ModelError, match=r"layer 1 .*device"):
        load(exported, **options)
    auto: Any = AutoModelForCausalLM
    with pytest.raises(npt.ModelError, match="use from_pretrained"):
        auto.from_config(AutoConfig.from_pretrained(exported))
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        AutoModel.from_pretrained(exported)  # it would have no NP layers


def change(folder: Path, **npt: Any) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "npt": {**content["npt"], **npt}}))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"format_version": 2}, "knows format_version 1, the file has another; update npt_fast"),
        ({"weights": {"sha256": "0" * 64}}, "is not the file that was exported"),
        ({"weights": {"sha256": 5}}, "npt: weights: sha256 must be a text, not 5"),
        ({"weights": []}, "npt: weights must be a mapping, or null, not a list"),
        ({"base": {}}, "npt: base: must name either a folder or a hub_id"),
        ({"base": {"folder": "a", "hub_id": "b"}}, "must name either a folder or a hub_id"),
        ({"base": {"folder": "gone"}}, "its base model .*/out/gone is missing: no such folder"),
        ({"base": {"folder": "/dev"}}, "its base model /dev: holds no model.safetensors"),
        ({"base": {"folder": ""}}, "folder must be the path of a folder, or null, not ''"),
        ({"base": {"folder": "x" * 5000}}, "folder must be the path of a folder"),
        ({"base": {"folder": "x" * 300}}, "File name too long"),
        ({"base": {"hub_id": ""}}, "hub_id must be the id of a model on the Hub, or null, not ''"),
        ({"base": {"hub_id": "/etc"}}, "hub_id must be the id of a model on the Hub"),
        ({"base": {"hub_id": "../.."}}, "hub_id must be the id of a model on the Hub"),
        ({"layers": {"x": {}}}, "npt: layers must be"),
    ],
)
def test_configs_that_are_refused(changes: dict[str, Any], problem: str, exported: Path) -> None:
    change(exported, **changes)
    with pytest.raises(npt.NPTError, match=problem) as raised:
        load(exported)
    assert "\n" not in str(raised.value) and str(exported) in str(raised.value)


def test_weights_that_are_refused(exported: Path) -> None:
    weights = exported / "npt_weights.safetensors"
    flip_byte(weights, -9)
    with pytest.raises(npt.CheckpointError, match="its SHA-256 differs; copy the folder"):
        load(exported)
    weights.unlink()
    with pytest.raises(npt.ModelError, match=f"out: {weights.name} is missing; copy the folder"):
        load(exported)


@pytest.mark.parametrize("part", ["another residual", "a layer more", "a layer less"])
def test_files_that_describe_a_layer_differently(part: str, exported: Path) -> None:
    """The digest does not cover what is beside the weights."""
    path = exported / "npt_config.json"
    described = json.loads(path.read_text())
    layers = described["layers"]
    if part == "another residual":
        layers["2"]["residual"] = "kept"
        path.write_text(json.dumps(described))
    elif part == "a layer more":
        change(exported, layers={**layers, "3": layers["2"]})
    else:
        change(exported, layers={"1": layers["1"]})
    with pytest.raises(npt.CheckpointError, match=r"layer [23] is not as config.json describes it"):
        load(exported)


def test_base_weights_that_are_missing_or_broken(exported: Path) -> None:
    weights = exported / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.norm.weight"]
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(npt.ModelError, match=r"model\.norm\.weight is missing or of another"):
        load(exported)
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(npt.ModelError, match="safetensors: cannot be read"):
        load(exported)
    weights.unlink()
    with pytest.raises(npt.ModelError, match="out: holds no model"):
        load(exported)


def test_a_folder_in_a_folder(parts: Parts, exported: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(exported.parent)
    shutil.copytree(parts.base, "base")
    npt.export(parts.checkpoint, "all/one", model_name="base", reference=True)
    expected = logits(parts.by_hand())
    assert torch.equal(logits(load("all", subfolder="one")), expected)


def test_a_config_without_layers(exported: Path) -> None:
    path = exported / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "npt": None}))
    with pytest.raises(npt.CheckpointError, match="npt: must be a mapping, not None"):
        load(exported)


def test_saving_what_was_loaded(exported: Path, tmp_path: Path) -> None:
    """As any converted model it is saved whole; the Auto class loads that with its NP layers."""
    model = load(exported)
    expected = logits(model)
    model.save_pretrained(tmp_path / "whole")
    assert torch.equal(logits(load(tmp_path / "whole")), expected)
    npt.save(model, tmp_path / "np")
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)


def test_configs(exported: Path, tmp_path: Path) -> None:
    """Libraries take them for the base model's; files and pickles keep what they are."""
    config = AutoConfig.from_pretrained(exported)
    assert isinstance(config, LlamaConfig) and config.model_type == "llama"
    assert config.architectures == ["NPTLlamaForCausalLM"]
    config.save_pretrained(tmp_path / "again")
    for same in (
        AutoConfig.from_pretrained(tmp_path / "again"),
        pickle.loads(pickle.dumps(config)),
    ):
        assert type(same) is type(config) and same.npt == config.npt
    written = [json.loads((f / "config.json").read_text()) for f in (exported, tmp_path / "again")]
    assert written[0]["model_type"] == written[1]["model_type"] == "npt_fast-llama"
    with pytest.raises(AttributeError, match="no attribute 'NPT_other'"):
        _ = npt.hf.auto.NPT_other


def test_an_export_as_a_base_model(parts: Parts, exported: Path, tmp_path: Path) -> None:
    with pytest.warns(npt.errors.NPTWarning, match="holds NP layers 1, 2 too"):
        model, _ = load_base_model(str(exported))
    assert type(model) is LlamaForCausalLM and not npt.status(model)
    assert not hasattr(model.config, "npt")
    assert torch.equal(logits(model), logits(load(parts.base)))
    model, _ = load_base_model(str(exported), checkpoints=[exported])
    assert torch.equal(logits(npt.load(model, exported)), logits(load(exported)))
    skeletons = [load_skeleton(str(folder)) for folder in (parts.base, exported)]
    assert type(skeletons[0]) is type(skeletons[1]) and not npt.status(skeletons[1])
    npt.export(parts.checkpoint, tmp_path / "named", reference=True)
    with pytest.raises(npt.ModelError, match=rf"whose base model is {parts.base}; give that as"):
        load_base_model(str(tmp_path / "named"))


ORDERS = {
    "npt_fast first": "import npt_fast; from transformers import AutoConfig",
    "transformers first": "from transformers import AutoConfig; import npt_fast",
    "looked for before": """
import importlib.util, npt_fast
importlib.util.find_spec("transformers.models.auto.configuration_auto")
from transformers import AutoConfig
""",
    "transformers alone": "from transformers import AutoConfig",
}


@pytest.mark.parametrize("order", ORDERS)
def test_imports_in_any_order(order: str, exported: Path) -> None:
    """Without npt_fast, what transformers says names it."""
    code = f"""
{ORDERS[order]}
try:
    print(AutoConfig.from_pretrained({str(exported)!r}).npt["format_version"])
except ValueError as error:
    print(str(error).splitlines()[0])
"""
    found = run_python(code)
    expected = "has model type `npt_fast-llama` but" if order == "transformers alone" else "1\n"
    assert expected in found.stdout, found.stderr


def test_every_listed_type_is_registered() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    for model_type in MODEL_TYPES:
        assert (f"npt_fast-{model_type}" in CONFIG_MAPPING) == (model_type in CONFIG_MAPPING)
