"""Loading and saving NPT checkpoints, from the original's files to merges."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import npt_fast as npt
from npt_fast.hf.convert import components
from npt_fast.hf.description import describe
from npt_fast.hf.probe import fit
from tests.checkpoints import layer_weights, write_checkpoint
from tests.hf.small_models import build
from tests.hf.test_convert import converted, logits, tiny

SIZES = {"d": 32, "f": 48}


@pytest.mark.parametrize("form", ["pt", "safetensors"])
def test_round_trip(tmp_path: Path, form: Any) -> None:
    model = converted()
    npt.save(model, tmp_path / "out", format=form)
    other = npt.load(tiny(), tmp_path / "out")
    assert torch.equal(logits(other), logits(model))
    assert npt.status(other) == npt.status(model)
    assert npt.verify(tmp_path / "out").passed


def test_what_is_saved_is_the_np_part_in_the_guides_names(tmp_path: Path) -> None:
    npt.save(converted(), tmp_path / "out", format="pt")
    weights = torch.load(tmp_path / "out" / "npt_weights.pt", weights_only=True)
    assert list(weights) == [
        *layer_weights(1, num_ranks=2, **SIZES),
        *layer_weights(2, num_ranks=2, **SIZES),
    ]
    config = json.loads((tmp_path / "out" / "npt_config.json").read_text())
    assert config["base_model"]["vocab_size"] == 128
    assert config["layers"]["1"]["residual"] == "removed"


@pytest.mark.parametrize("error", [float("nan"), float("inf")])
def test_an_error_that_is_no_number_is_not_recorded(error: float) -> None:
    model = converted()
    described: Any = describe(model, components(model), fidelity={1: error, 2: 0.5})["layers"]
    assert [described[layer]["fidelity"] for layer in "12"] == [None, 0.5]


@pytest.mark.parametrize("content", [b"", b'{"a": NaN}', "{}".encode("utf-16"), b"<html>"])
def test_a_config_of_any_kind_does_not_keep_a_checkpoint_from_loading(
    tmp_path: Path, content: bytes
) -> None:
    model = converted()
    npt.save(model, tmp_path / "out")
    (tmp_path / "out" / "config.json").write_bytes(content)
    assert torch.equal(logits(npt.load(tiny(), tmp_path / "out")), logits(model))


def test_files_can_be_read_by_others(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        npt.save(converted(), tmp_path / "out")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o644}


def test_saved_safetensors_begin_on_a_page(tmp_path: Path) -> None:
    """So a merge can clone them."""
    npt.save(converted(), tmp_path / "out")
    raw = (tmp_path / "out" / "npt_weights.safetensors").read_bytes()
    assert (8 + int.from_bytes(raw[:8], "little")) % 4096 == 0
    found = load_file(tmp_path / "out" / "npt_weights.safetensors")
    assert sorted(found) == sorted([*layer_weights(1, num_ranks=2), *layer_weights(2, num_ranks=2)])


def test_architecture_per_layer(tmp_path: Path) -> None:
    """A merge of layers with different architectures loads without any option."""
    write_checkpoint(tmp_path / "a", layer_weights(0, rank=3, modulation="dual", **SIZES))
    write_checkpoint(tmp_path / "b", layer_weights(2, rank=5, num_ranks=3, **SIZES))
    npt.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "merged", verify=True)
    model = npt.load(tiny(), tmp_path / "merged", residual="removed")
    assert [(s.layer, str(s.architecture)) for s in npt.status(model)] == [
        (0, "dual, num_ranks 1, rank 3"),
        (2, "triple, num_ranks 3, rank 5"),
    ]
    expected = layer_weights(2, rank=5, num_ranks=3, prefix="", **SIZES)
    for name, tensor in components(model)[2].split().items():
        assert torch.equal(tensor, expected[name]), name


def test_a_merge_is_its_parts_together(tmp_path: Path) -> None:
    for layer in (1, 2):
        write_checkpoint(tmp_path / str(layer), layer_weights(layer, **SIZES))
    npt.merge([tmp_path / "1", tmp_path / "2"], tmp_path / "merged")
    one_by_one = npt.load(npt.load(tiny(), tmp_path / "1"), tmp_path / "2")
    assert torch.equal(logits(npt.load(tiny(), tmp_path / "merged")), logits(one_by_one))


def test_uniform_padding_does_not_change_the_model(tmp_path: Path) -> None:
    scaled = {name: tensor * 0.3 for name, tensor in layer_weights(1, rank=3, **SIZES).items()}
    write_checkpoint(tmp_path / "a", scaled)
    wide = layer_weights(2, rank=5, num_ranks=2, **SIZES)
    write_checkpoint(tmp_path / "b", {name: tensor * 0.3 for name, tensor in wide.items()})
    plain = npt.load(npt.load(tiny(), tmp_path / "a"), tmp_path / "b")
    npt.merge(
        [tmp_path / "a", tmp_path / "b"], tmp_path / "m", options=npt.MergeOptions(uniform=True)
    )
    uniform = npt.load(tiny(), tmp_path / "m")
    assert len({s.architecture for s in npt.status(uniform)}) == 1
    torch.testing.assert_close(logits(uniform), logits(plain), rtol=1e-4, atol=1e-4)


def test_loading_again_replaces_the_weights(tmp_path: Path) -> None:
    model = converted()
    npt.save(model, tmp_path / "out")
    expected = logits(model)
    with torch.no_grad():
        components(model)[1].w_b_gate.zero_()
    npt.load(model, tmp_path / "out")
    assert torch.equal(logits(model), expected)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", layer_weights(1, rank=7, **SIZES))
    model = converted()
    expected = logits(model)
    with pytest.raises(npt.ModelError, match="layer 1 is"):
        npt.load(model, tmp_path / "a")
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    ("layer", "sizes", "message"),
    [
        (1, {"d": 16, "f": 48}, "hidden_size 16, the model has 32"),
        (1, {"d": 32, "f": 24}, "intermediate_size 24, the model has 48"),
        (4, SIZES, "has layer 4, the model has 4"),
    ],
)
def test_another_base_is_refused(
    tmp_path: Path, layer: int, sizes: dict[str, int], message: str
) -> None:
    write_checkpoint(tmp_path / "a", layer_weights(layer, **sizes))
    model = tiny()
    with pytest.raises(npt.ModelError, match=message):
        npt.load(model, tmp_path / "a")
    assert not npt.status(model)


@pytest.mark.filterwarnings("error")
def test_a_resized_vocabulary_is_no_other_base(tmp_path: Path) -> None:
    npt.save(converted(), tmp_path / "out")
    model = tiny()
    model.resize_token_embeddings(129, mean_resizing=False)
    assert torch.equal(logits(npt.load(model, tmp_path / "out"))[..., :128], logits(converted()))


def test_saving_is_refused_where_it_makes_no_sense(tmp_path: Path) -> None:
    with pytest.raises(npt.ModelError, match="no NP layers"):
        npt.save(tiny(), tmp_path / "out")
    (tmp_path / "taken").mkdir()
    with pytest.raises(npt.ModelError, match="exists already"):
        npt.save(converted(), tmp_path / "taken")
    assert os.listdir(tmp_path) == ["taken"]


def test_the_models_config_describes_its_np_layers() -> None:
    model = converted(layers=(1,), residual="kept")
    assert model.config.npt == describe(model, {1: components(model)[1]})
    npt.convert(model, npt.NPTConfig(layers=[3], rank=2))
    layers = model.config.npt["layers"]
    assert [(n, about["residual"]) for n, about in layers.items()] == [
        ("1", "kept"),
        ("3", "removed"),
    ]
    npt.unload(model)
    assert "npt" not in model.config.to_dict()


def test_layers_of_one_kind_are_probed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    npt.save(converted(layers=(0, 1, 3)), tmp_path / "out")
    probed = []

    def counted(decoder: Any, index: int, **options: Any) -> Any:
        probed.append(index)
        return fit(decoder, index, **options)

    monkeypatch.setattr("npt_fast.hf.convert.fit", counted)
    npt.load(tiny(), tmp_path / "out")
    assert probed == [0]


def test_layers_of_several_widths(tmp_path: Path) -> None:
    """Layers of Gemma 4 that share keys may have MLPs of twice the width that the config names."""
    types = ["sliding_attention", "full_attention"] * 2
    options = {"num_kv_shared_layers": 2, "use_double_wide_mlp": True, "layer_types": types}
    model = build("gemma4_text", **options)
    npt.convert(model, npt.NPTConfig(layers=[1, 3], rank=2))
    assert [status.architecture.intermediate_size for status in npt.status(model)] == [48, 96]
    npt.save(model, tmp_path / "checkpoint")
    other = npt.load(build("gemma4_text", **options), tmp_path / "checkpoint")
    assert [status.layer for status in npt.status(other)] == [1, 3]
    with pytest.raises(npt.ModelError, match="another base model: intermediate_size 96"):
        npt.load(build("gemma4_text"), tmp_path / "checkpoint")
