"""Permanent modulations: in the base weights, and as an adapter that PEFT loads."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

import npt_fast as npt
from npt_fast.hf.base_model import load_base_model
from npt_fast.hf.convert import decoder_layers
from npt_fast.testing import assert_within_budget
from npt_fast.transfer.modulation import Modulation
from tests.conftest import DATA
from tests.transfer.models import (
    FAMILIES,
    PROJECTIONS,
    SOURCE,
    TEXT,
    base,
    converted,
    hooks,
    ids_of,
    logits,
    random_modulation,
    terms,
    tokenizer,
)

IDS = ids_of(TEXT)


def added(model: Any, m: Modulation, strength: float = 1.0) -> Tensor:
    """Logits with an exact-add injection at all positions."""
    with npt.inject(model, m, mode="exact-add", position="all", strength=strength):
        return logits(model, IDS)


def weights(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_bitwise(model: Any, expected: dict[str, Tensor]) -> None:
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_baking_is_adding_at_all_positions(family: str, strength: float) -> None:
    model = converted(family)
    m = npt.extract(model, tokenizer, SOURCE) + random_modulation()
    expected, before = added(model, m, strength), weights(model)
    assert (expected - logits(model, IDS)).abs().max() > 0.1
    baked = npt.bake(model, m, strength)
    torch.testing.assert_close(logits(model, IDS), expected, rtol=1e-9, atol=1e-9)
    changed = {name for name, w in model.state_dict().items() if not torch.equal(w, before[name])}
    assert changed == {
        f"model.layers.{layer}.mlp.{name}_proj.weight" for layer in (1, 2) for name in PROJECTIONS
    }
    baked.undo()
    assert_bitwise(model, before)


def test_the_weights_are_base_plus_dense() -> None:
    model, m = base(), random_modulation(layers=(0, 3), projections=("down",))
    before = weights(model)
    npt.bake(model, m, 0.25)
    for layer in (0, 3):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        v_a, v_b = m.layers[layer]["down"]
        dense = torch.stack([torch.outer(b, a) for a, b in zip(v_a, v_b, strict=True)]).sum(0)
        expected = before[name] + 0.25 * dense
        torch.testing.assert_close(model.state_dict()[name], expected, rtol=0, atol=1e-12)


def test_float32_keeps_the_budget() -> None:
    exact_model = converted()
    model = copy.deepcopy(exact_model).float()
    ms = [npt.extract(exact_model, tokenizer, SOURCE), *map(random_modulation, range(4))]
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    for m in ms:
        low_m = m.to("cpu", torch.float32)
        exact, low = added(exact_model, m), added(model, low_m)
        baked = npt.bake(model, low_m)
        rows.append((logits(model, IDS), exact, low))
        baked.undo()
    found, exact, low = (torch.cat(each) for each in zip(*rows, strict=True))
    assert_within_budget(found, exact, low, terms=terms(model))


def test_bfloat16_is_rounded_once() -> None:
    """The sum is formed in float32 and rounded to bfloat16 once."""
    model, m = base().bfloat16(), random_modulation(layers=(1,))
    before = weights(model)
    baked = npt.bake(model, m)
    name = "model.layers.1.mlp.up_proj.weight"
    expected = before[name].double() + m.dense(1, "up")
    found = model.state_dict()[name]
    assert found.dtype == torch.bfloat16
    assert ((found.double() - expected).abs() <= 2**-8 * expected.abs() + 1e-6).all()
    baked.undo()
    assert_bitwise(model, before)


def test_several_are_undone_last_first() -> None:
    model = converted()
    states = [weights(model)]
    parts = [random_modulation(1), random_modulation(2, layers=(2,)), random_modulation(3)]
    baked = []
    for m in parts:
        baked.append(npt.bake(model, m))
        states.append(weights(model))
    for wrong in baked[:2]:
        with pytest.raises(
            npt.TransferError, match=r"gate_proj has changed since; undo what was baked"
        ):
            wrong.undo()
        assert_bitwise(model, states[-1])
    for one, before in reversed(list(zip(baked, states, strict=False))):
        one.undo()
        assert_bitwise(model, before)


def test_those_of_other_layers_are_undone_in_any_order() -> None:
    model = base()
    before = weights(model)
    first = npt.bake(model, random_modulation(layers=(1,)))
    second = npt.bake(model, random_modulation(layers=(2,)))
    first.undo()
    second.undo()
    assert_bitwise(model, before)


def test_undoing_twice_does_nothing() -> None:
    model = base()
    before = weights(model)
    baked = npt.bake(model, random_modulation())
    baked.undo()
    again = npt.bake(model, random_modulation(1))
    baked.undo()
    assert not torch.equal(logits(model, IDS), logits(base(), IDS))
    again.undo()
    assert_bitwise(model, before)


def test_weights_that_were_changed_otherwise_are_not_thrown_away() -> None:
    model = base()
    baked = npt.bake(model, random_modulation())
    model.get_parameter("model.layers.2.mlp.up_proj.weight").data[0, 0] += 1
    changed = weights(model)
    with pytest.raises(npt.TransferError, match="layer 2, up_proj has changed since"):
        baked.undo()
    assert_bitwise(model, changed)


def test_the_base_is_baked_not_the_np_layer() -> None:
    """It acts with NP layers on, off, or absent."""
    plain, model = base(), converted()
    m = random_modulation()
    npt.bake(plain, m)
    npt.bake(model, m)
    with npt.disabled(model):
        assert torch.equal(logits(model, IDS), logits(plain, IDS))
    assert torch.equal(logits(npt.unload(model), IDS), logits(plain, IDS))


def test_another_base_is_refused(tmp_path: Path) -> None:
    model, m = base(num_hidden_layers=3), random_modulation()
    before = weights(model)
    with pytest.raises(npt.ModelError, match="num_hidden_layers 4, the model has 3"):
        npt.bake(model, m)
    with pytest.raises(npt.ModelError, match="num_hidden_layers 4, the model has 3"):
        npt.export_lora(m, model, tmp_path / "lora")
    assert_bitwise(model, before)
    assert not list(tmp_path.iterdir())


def test_offloaded_weights_are_refused() -> None:
    model = base()
    decoder_layers(model)[1].to("meta")
    with pytest.raises(npt.ModelError, match="layer 1, gate_proj is offloaded; its weight"):
        npt.bake(model, random_modulation())


def doubled_by_a_hook(model: Any) -> None:
    decoder_layers(model)[1].mlp.gate_proj.register_forward_hook(lambda _, args, y: 2 * y)


def with_a_forward_of_its_own(model: Any) -> None:
    decoder_layers(model)[1].mlp.gate_proj.forward = lambda a: 0 * a


def with_a_shared_weight(model: Any) -> None:
    layers = decoder_layers(model)
    layers[0].mlp.gate_proj.weight = layers[1].mlp.gate_proj.weight


def without_projections(model: Any) -> None:
    decoder_layers(model)[1].mlp = torch.nn.Identity()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (doubled_by_a_hook, "layer 1, gate_proj has hooks or a forward of its own"),
        (with_a_forward_of_its_own, "layer 1, gate_proj has hooks or a forward of its own"),
        (with_a_shared_weight, "0.mlp.gate_proj.weight is also model.layers.1.mlp.gate_proj"),
        (without_projections, "layer 1 has no mlp.gate_proj"),
    ],
)
def test_weights_that_do_not_decide_alone_are_refused(change: Any, problem: str) -> None:
    model = base()
    change(model)
    with pytest.raises(npt.ModelError, match=problem):
        npt.bake(model, random_modulation())


def test_layers_and_mlps_in_wrappers() -> None:
    plain, model, m = base(), base(), random_modulation()
    npt.bake(plain, m)
    layers = decoder_layers(model)
    for index, layer in enumerate(layers):
        layer.mlp = checkpoint_wrapper(layer.mlp)
        layers[index] = checkpoint_wrapper(layer)
    npt.bake(model, m)
    assert torch.equal(logits(model, IDS), logits(plain, IDS))


# --- LoRA


def with_adapter(model: Any, folder: Path) -> Tensor:
    """Logits of a base model with an adapter, by PEFT."""
    return logits(PeftModel.from_pretrained(model, str(folder)).eval(), IDS)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("terms", [1, 2, 5])
def test_peft_gives_the_logits_of_the_baked_base(family: str, terms: int, tmp_path: Path) -> None:
    m = random_modulation(terms=terms)
    model = base(family)
    folder = npt.export_lora(m, model, tmp_path / "lora")
    npt.bake(model, m)
    expected = logits(model, IDS)
    assert (expected - logits(base(family), IDS)).abs().max() > 0.1
    torch.testing.assert_close(with_adapter(base(family), folder), expected, rtol=1e-9, atol=1e-9)


def test_a_multimodal_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        image_size=16, patch_size=8,
    )  # fmt: skip
    model: Any = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=base().config)
    ).eval()
    m = random_modulation()
    baked = npt.bake(model, m)
    expected = logits(model, IDS)
    baked.undo()
    npt.export_lora(m, model, tmp_path / "lora")
    torch.testing.assert_close(with_adapter(model, tmp_path / "lora"), expected)


def test_peft_within_the_budget_in_float32(tmp_path: Path) -> None:
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    for seed in range(4):
        m = random_modulation(seed)
        exact_model, model = base(), base().float()
        npt.bake(exact_model, m)
        folder = npt.export_lora(m.to("cpu", torch.float32), model, tmp_path / str(seed))
        found = with_adapter(base().float(), folder)
        npt.bake(model, m)
        rows.append((found, logits(exact_model, IDS), logits(model, IDS)))
    found, exact, low = (torch.cat(each) for each in zip(*rows, strict=True))
    assert_within_budget(found, exact, low, terms=terms(base()))


def test_projections_with_fewer_terms_are_filled_up(tmp_path: Path) -> None:
    """Compressed projections have different numbers of terms; a LoRA has one rank."""
    many, few = random_modulation(terms=4), random_modulation(1, terms=1)
    layers = {
        1: {"gate": few.layers[1]["gate"], "down": many.layers[1]["down"]},
        2: {"up": few.layers[2]["up"]},
    }
    m, model = replace(many, layers=layers), base()
    folder = npt.export_lora(m, model, tmp_path / "lora")
    npt.bake(model, m)
    actual = with_adapter(base(), folder)
    torch.testing.assert_close(actual, logits(model, IDS), rtol=1e-9, atol=1e-9)


def test_an_extracted_one_with_fewer_projections(tmp_path: Path) -> None:
    model = converted(modulation="dual", layers=(0, 3), num_ranks=3)
    m = 0.5 * npt.extract(model, tokenizer, SOURCE)
    folder = npt.export_lora(m, model, tmp_path / "lora")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 3
    assert config["target_modules"] == ["gate_proj", "up_proj"]
    assert config["layers_to_transform"] == [0, 3]
    npt.bake(npt.unload(model), m)
    actual = with_adapter(base(), folder)
    torch.testing.assert_close(actual, logits(model, IDS), rtol=1e-9, atol=1e-9)


def test_what_the_folder_holds(tmp_path: Path) -> None:
    model, m = base(), random_modulation(layers=(2,), terms=3)
    model.config._name_or_path = "some/model"
    folder = npt.export_lora(m, model, str(tmp_path / "new" / "lora"))
    assert folder == tmp_path / "new" / "lora"
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["base_model_name_or_path"] == "some/model"
    tensors = load_file(folder / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.2.mlp.down_proj"
    assert torch.equal(tensors[f"{prefix}.lora_A.weight"], m.layers[2]["down"].v_a)
    assert torch.equal(tensors[f"{prefix}.lora_B.weight"], m.layers[2]["down"].v_b.t())
    assert len(tensors) == 6


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    for target in (tmp_path, tmp_path / "mine"):
        with pytest.raises(npt.TransferError, match="exists already; choose another folder"):
            npt.export_lora(random_modulation(), base(), target)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert (tmp_path / "mine").read_text() == "kept"


def test_complete_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(
        "npt_fast.checkpoint.strict_json.dump", fail
    )  # the tensors have been written before
    with pytest.raises(npt.StorageError, match="No space left on device; nothing was written"):
        npt.export_lora(random_modulation(), base(), tmp_path / "lora")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(npt.TransferError, match="Permission denied; nothing was written"):
        npt.export_lora(random_modulation(), base(), tmp_path / "lora")
    tmp_path.chmod(0o700)


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(npt.TransferError, match="Not a directory"):
        npt.export_lora(random_modulation(), base(), tmp_path / "file" / "lora")


# --- the real model


@pytest.mark.slow
def test_smollm2(smollm2: Path, tmp_path: Path) -> None:
    """Baking, exact-add at all positions and PEFT give the same logits; undo is exact."""
    model, tokenizer = load_base_model(str(smollm2))
    npt.load(model, DATA / "layer13" / "checkpoint-600")
    m = npt.extract(model, tokenizer, "The capital of France is")
    ids = tokenizer("Berlin is the capital of", return_tensors="pt").input_ids
    before = weights(model)
    with npt.inject(model, m, mode="exact-add", position="all"):
        expected = logits(model, ids)
    plain = logits(model, ids)
    baked = npt.bake(model, m)
    found = logits(model, ids)
    assert (found - expected).norm() < 1e-5 * expected.norm() < (expected - plain).norm()
    with npt.disabled(model):
        baked_base = logits(model, ids)
    baked.undo()
    assert_bitwise(model, before)
    folder = npt.export_lora(m, model, tmp_path / "lora")
    npt.unload(model)
    adapted = PeftModel.from_pretrained(model, str(folder)).eval()
    actual = logits(adapted, ids)
    assert (actual - baked_base).norm() < 1e-5 * baked_base.norm()
    assert not hooks(decoder_layers(adapted.get_base_model()))
