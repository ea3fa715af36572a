"""NP layers are picked out of the files of whole models, however those are kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import npt_fast as npt
from npt_fast.checkpoint.checkpoint import open_checkpoint
from npt_fast.hf.convert import components
from tests.checkpoints import assert_same_tensors, read_weights
from tests.hf.test_convert import converted, logits, tiny

State = dict[str, torch.Tensor]
NP = "model.layers.1.np_component."


def description(model: Any) -> str:
    return json.dumps({"npt": model.config.npt})


def prefixed(prefix: str, inner: str = "") -> Callable[[State], State]:
    return lambda state: {
        prefix + name.replace("np_component.", f"np_component.{inner}"): tensor
        for name, tensor in state.items()
    }


def split(state: State, model: Any) -> State:
    """As versions before 0.1 had it in state dicts: the names of NPT checkpoints."""
    kept = {name: tensor for name, tensor in state.items() if "np_component" not in name}
    return kept | {
        f"model.layers.{layer}.np_component.{name}": view.detach().clone()
        for layer, part in components(model).items()
        for name, view in part.split().items()
    }


@pytest.mark.parametrize("residual", ["removed", "kept"])
@pytest.mark.parametrize("modulation", ["single", "dual", "triple"])
@pytest.mark.parametrize("shards", [False, True])
def test_save_pretrained(tmp_path: Path, modulation: str, residual: str, shards: bool) -> None:
    model = converted(modulation=modulation, residual=residual)
    model.save_pretrained(tmp_path, max_shard_size="40KB" if shards else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == shards
    file = "model.safetensors.index.json" if shards else "model.safetensors"
    for path in (tmp_path, tmp_path / file):
        other = npt.load(tiny(), path)
        assert npt.status(other) == npt.status(model)
        assert torch.equal(logits(other), logits(model))


def test_one_component_of_a_single_projection(tmp_path: Path) -> None:
    """Here a joined parameter is one tensor of the original."""
    model = npt.convert(tiny(), npt.NPTConfig(layers=[2], rank=4, modulation="single"))
    model.save_pretrained(tmp_path)
    assert_same_tensors(
        components(npt.load(tiny(), tmp_path))[2].state_dict(), components(model)[2].state_dict()
    )


@pytest.mark.parametrize("shards", [False, True])
def test_bin_files(tmp_path: Path, shards: bool) -> None:
    model = converted()
    (tmp_path / "config.json").write_text(description(model))
    state = model.state_dict()
    names = list(state)
    parts = {"pytorch_model.bin": names}
    if shards:
        parts = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
        index = {"weight_map": {name: file for file, own in parts.items() for name in own}}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for file, own in parts.items():
        torch.save({name: state[name] for name in own}, tmp_path / file)
    assert torch.equal(logits(npt.load(tiny(), tmp_path)), logits(model))


@pytest.mark.parametrize(
    "rename",
    [
        prefixed(""),
        prefixed("module."),
        prefixed("_orig_mod."),
        prefixed("_fsdp_wrapped_module."),
        prefixed("base_model.model."),
        prefixed("base_model.model.", "modules_to_save.default."),
        lambda state: {n.replace(".np_", "._orig_mod.np_"): t for n, t in state.items()},
        lambda state: {n: t for n, t in state.items() if "np_component" in n},
        lambda state: (
            {n.replace("np_component.", "np_component.original_module."): -t
             for n, t in state.items()}
            | {n.replace("np_component.", "np_component.modules_to_save.default."): t
               for n, t in state.items()}
        ),
    ],
)  # fmt: skip
def test_names_that_wrappers_give(tmp_path: Path, rename: Callable[[State], State]) -> None:
    model = converted()
    (tmp_path / "config.json").write_text(description(model))
    save_file(rename(model.state_dict()), tmp_path / "anything.safetensors")
    other = npt.load(tiny(), tmp_path / "anything.safetensors")
    assert torch.equal(logits(other), logits(model))


def test_a_bare_state_dict_says_what_to_do(tmp_path: Path) -> None:
    model, path = converted(), tmp_path / "model.pt"
    torch.save(model.state_dict(), path)
    with pytest.raises(npt.CheckpointError) as caught:
        npt.load(tiny(), path)
    assert str(caught.value) == (
        f"{path}: num_ranks and residual of layer 1 are recorded nowhere; save the model with "
        "save_pretrained or npt.save, or convert a base model as it was converted and use "
        "load_state_dict"
    )
    torch.save(split(model.state_dict(), model), path)  # these names tell num_ranks
    assert torch.equal(logits(npt.load(tiny(), path)), logits(model))


def test_it_can_be_merged_and_verified(tmp_path: Path) -> None:
    model = converted(layers=(1,), residual="kept")
    model.save_pretrained(tmp_path / "model")
    other = tmp_path / "other"
    npt.save(converted(layers=(2,), residual="kept"), other)
    npt.merge([tmp_path / "model", other], tmp_path / "merged")
    assert npt.verify(tmp_path / "merged").passed
    found = read_weights(tmp_path / "merged")
    expected = {f"layer_1_np.{n}": v.detach() for n, v in components(model)[1].split().items()}
    assert_same_tensors({name: found[name] for name in expected}, expected)
    assert npt.status(npt.load(tiny(), tmp_path / "merged"))[0].residual == "kept"
    assert not (tmp_path / "merged" / "config.json").exists()  # the model's own was no run's


def test_a_model_without_np_layers(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    with pytest.raises(npt.CheckpointError, match=r"model.safetensors: holds no NPT layers"):
        npt.load(tiny(), tmp_path)


def test_npt_weights_are_read_first(tmp_path: Path) -> None:
    npt.save(converted(layers=(2,)), tmp_path / "both")
    converted().save_pretrained(tmp_path / "both")
    assert list(open_checkpoint(tmp_path / "both").modules) == [2]


def _set(name: str, value: Any) -> Callable[[State, dict[str, Any]], None]:
    return lambda state, config: state.__setitem__(name, value)


def _say(**facts: Any) -> Callable[[State, dict[str, Any]], None]:
    return lambda state, config: config["layers"]["1"].update(facts)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_say(num_ranks=3), "layer 1: num_ranks 3 does not fit w_down [32, 24]"),
        (_say(num_ranks=0), "layer 1: num_ranks 0 does not fit w_down [32, 24]"),
        (_say(num_ranks=2**60), "layer 1: num_ranks 1152921504606846976 does not fit"),
        (_say(num_ranks="2"), "layers: 1: num_ranks must be"),
        (_say(residual="both"), "layers: 1: residual must be"),
        (lambda state, config: config["layers"].pop("1"), "residual of layer 1 are recorded now"),
        (lambda state, config: config.update(format_version=9), "update npt_fast"),
        (lambda state, config: config.pop("format_version"), "npt: has no format_version"),
        (lambda state, config: state.pop(f"{NP}w_b_gate"), "[12, 32] expected (plain, num_ranks"),
        (lambda state, config: state.pop(f"{NP}w_b_up"), "layer 1: w_b_up is missing"),
        (lambda state, config: state.pop(f"{NP}w_a_in"), "layer 1: w_a_in is missing, [16"),
        (lambda state, config: state.pop(f"{NP}w_a_mid"), "layer 1: w_a_in is [16, 32], [24"),
        (_set(f"{NP}w_down", torch.zeros(32)), "layer 1 has no matrix w_down"),
        (_set(f"{NP}w_down", torch.zeros(32, 0)), "layer 1: num_ranks 2 does not fit w_down"),
        (_set(f"{NP}w_b_up", torch.zeros(8, 47)), "layer 1: w_b_up is [8, 47], [8, 48] exp"),
        (_set(f"{NP}w_b_up", torch.zeros(8, 48).int()), "cannot be trained"),
        (_set(f"{NP}bias", torch.zeros(8)), "is not the name of an NP tensor"),
        (_set(f"module.{NP}w_down", torch.zeros(32, 24)), "layer 1 has w_down twice"),
        (_set(f"{NP}W_down_gate.0", torch.zeros(32, 4)), "is not the name of an NPT tensor"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    tmp_path: Path, spoil: Callable[[State, dict[str, Any]], None], message: str
) -> None:
    model = converted()
    state, config = dict(model.state_dict()), json.loads(description(model))["npt"]
    spoil(state, config)
    (tmp_path / "config.json").write_text(json.dumps({"npt": config}))
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(npt.CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_num_ranks_cannot_make_many_tensors_of_few_bytes(tmp_path: Path) -> None:
    model = npt.convert(tiny(), npt.NPTConfig(layers=[1], rank=1, num_ranks=1, modulation="single"))
    state, k = model.state_dict(), 70_000
    for name, shape in (("w_down", (1, k)), ("w_a_in", (k, 1)), ("w_b_gate", (k, 1))):
        state[NP + name] = torch.zeros(shape)
    model.config.npt["layers"]["1"]["num_ranks"] = k
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(description(model))
    with pytest.raises(npt.CheckpointError, match="up to 1 have more than 200,000 tensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("block", [[], "x", 3])
def test_a_block_of_another_type(tmp_path: Path, block: object) -> None:
    save_file(converted().state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"npt": block}))
    with pytest.raises(npt.CheckpointError, match=r"config.json: npt: must be an object"):
        open_checkpoint(tmp_path)


def test_checkpoints_of_the_trainer_of_transformers(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = converted()
    rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 2
    options = {"max_steps": 1, "save_steps": 1, "report_to": [], "use_cpu": True}
    arguments = TrainingArguments(str(tmp_path), disable_tqdm=True, **options)
    before = logits(model)
    Trainer(model, arguments, train_dataset=rows).train()
    assert not torch.equal(logits(model.eval()), before)
    loaded = npt.load(tiny(), tmp_path / "checkpoint-1")
    assert torch.equal(logits(loaded), logits(model))
    assert load_file(tmp_path / "checkpoint-1" / "model.safetensors").keys() >= {f"{NP}w_down"}
