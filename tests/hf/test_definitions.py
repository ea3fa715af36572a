"""NP layers of other families: equal to their definitions, and all that NP layers of Llama can."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

import npt_fast as npt
from npt_fast.checkpoint.keys import modulated
from npt_fast.errors import NPTWarning
from npt_fast.training.teacher_pass import check_teacher
from tests.hf.families import FAMILIES, base, converted, definition, descend, layer_of
from tests.transfer.models import ids_of, left_padded, logits, random_modulation, tokenizer

IDS = ids_of("the red house")
RESIDUALS = ("removed", "kept")
every = pytest.mark.parametrize("name", FAMILIES)
both = pytest.mark.parametrize("residual", RESIDUALS)
pytestmark = pytest.mark.usefixtures("one_thread")


def close(found: Tensor, truth: Tensor, tolerance: float = 1e-10) -> bool:
    return bool((found - truth).norm() <= tolerance * truth.norm())


def one_pass(model: Any, index: int) -> dict[str, Any]:
    """Input, arguments and output of a layer in one pass."""
    seen: dict[str, Any] = {}

    def keep(layer: Any, args: Any, kwargs: Any, out: Any) -> None:
        names = [*inspect.signature(type(layer).forward).parameters][1:]
        call = {**dict(zip(names, args, strict=False)), **kwargs}
        out = out[0] if isinstance(out, tuple) else out
        seen.update(h=call.pop("hidden_states"), call=call, out=out)

    handle = layer_of(model, index).register_forward_hook(keep, with_kwargs=True)
    logits(model, IDS)
    handle.remove()
    return seen


@every
@both
@torch.no_grad()
def test_a_layer_is_its_definition(name: str, residual: str) -> None:
    model = converted(name, residual)
    for index in (1, 2):
        seen = one_pass(model, index)
        truth = definition(
            FAMILIES[name], layer_of(model, index), seen["h"], seen["call"], residual
        )
        assert close(seen["out"][0], truth)


@every
@torch.no_grad()
def test_the_targets_are_what_the_base_layer_adds(name: str) -> None:
    """kept: m' is left to the MLP; removed: a' + m' is all of the layer."""
    model = converted(name, "kept")
    seen = check_teacher(model, IDS)
    family = FAMILIES[name]
    with npt.disabled(model):
        for index in (1, 2):
            layer, found = layer_of(model, index), one_pass(model, index)
            a = family.attention(layer, found["h"], found["call"])
            state = found["h"] if family.parallel else found["h"] + a
            m = family.added(layer, layer.mlp(family.reads(layer, state)), "kept")
            assert close(seen[index].attention, a) and close(seen[index].mlp, m)
            state = found["h"] + a + m
            assert close(found["out"], family.after(layer, state, found["call"]))


@every
def test_the_base_comes_back(name: str) -> None:
    expected = logits(base(name), IDS)
    model = converted(name, "removed")
    assert not torch.allclose(logits(model, IDS), expected)
    with npt.disabled(model):
        assert torch.equal(logits(model, IDS), expected)
    npt.unload(model)
    assert torch.equal(logits(model, IDS), expected)
    assert model.state_dict().keys() == base(name).state_dict().keys()


@every
@both
def test_cache_and_padding(name: str, residual: str) -> None:
    # eager attention of transformers gives NaN for padding in float64
    model = converted(name, residual).float()
    batch = left_padded(["the red house", "a blue boat on the lake"])
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    told: Any = {"output_logits": True, "return_dict_in_generate": True}
    found = [
        model.generate(**batch, **options, **told, use_cache=use_cache)
        for use_cache in (True, False)
    ]
    cached, whole = (torch.stack(out.logits).double() for out in found)
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert close(cached, whole, 1e-4)
    alone = model.generate(IDS, **options, **told)
    assert torch.equal(alone.sequences[0, -4:], found[0].sequences[0, -4:])


@every
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model = converted(name, "kept")
    npt.save(model, tmp_path / "checkpoint")
    other = npt.load(base(name), tmp_path / "checkpoint", dtype=torch.float64)
    assert torch.equal(logits(other, IDS), logits(model, IDS))
    assert [status.residual for status in npt.status(other)] == ["kept", "kept"]


@every
@both
@torch.no_grad()
def test_injected_and_baked(name: str, residual: str, tmp_path: Path) -> None:
    model = converted(name, residual)
    sizes = npt.status(model)[0].architecture
    m = random_modulation(
        sizes=(sizes.hidden_size, sizes.intermediate_size),
        projections=modulated(sizes.modulation),
    )
    m = npt.Modulation(m.layers, npt.extract(model, tokenizer, "x").base, m.origin)
    changes = {
        index: {p: terms.v_b.t() @ terms.v_a for p, terms in m.layers[index].items()}
        for index in m.layers
    }
    with npt.inject(model, m, mode="replace", position="all"):
        for index in (1, 2):
            seen, layer = one_pass(model, index), layer_of(model, index)
            family = FAMILIES[name]
            truth = definition(family, layer, seen["h"], seen["call"], residual, changes[index])
            assert close(seen["out"][0], truth)
    with npt.inject(model, m, mode="exact-add", position="all"):
        added = logits(model, IDS)
    before = logits(model, IDS)
    baked = npt.bake(model, m)
    assert close(logits(model, IDS), added) and not close(added, before, 1e-3)
    baked.undo()
    assert torch.equal(logits(model, IDS), before)

    plain = base(name)
    npt.bake(plain, m)
    npt.export_lora(m, base(name), tmp_path / "lora")
    adapted = PeftModel.from_pretrained(base(name), tmp_path / "lora").double().eval()
    assert close(logits(adapted, IDS), logits(plain, IDS), 1e-5)  # the file is float32


@every
@both
def test_training_lowers_the_loss(name: str, residual: Any) -> None:
    model = base(name, torch.float32)
    npt.convert(model, npt.NPTConfig(layers=[1, 2], rank=8, num_ranks=2, residual=residual))
    step = npt.Distillation(model)
    step.calibrate(IDS)
    losses = descend(step, IDS, lr=2e-3, steps=20)
    if FAMILIES[name].parallel and residual == "kept":  # its MLP never saw attention
        assert losses[0] < 1e-10
    else:
        assert losses[-1] < 0.7 * losses[0]


def test_what_has_nothing_to_learn_is_said() -> None:
    config = npt.NPTConfig(layers=[1], rank=2, residual="kept")
    with pytest.warns(NPTWarning, match=r"layers \[1\] run attention and MLP side by side"):
        npt.convert(base("cohere"), config)


@pytest.mark.parametrize("name", ["gemma3_text", "glm4", "qwen3_5_text", "gpt2", "falcon"])
def test_trained_apart_merged_and_resumed(name: str, tmp_path: Path) -> None:
    """A run on each of two layers, their merge, and a run that goes on with it."""
    base(name, torch.float32).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "text.txt").write_text("the red house stands by the lake. " * 60)

    def train(output: str, **changes: Any) -> npt.TrainReport:
        return npt.train(
            npt.TrainOptions(
                model_name=str(tmp_path / "base"),
                data=str(tmp_path / "text.txt"),
                output_dir=tmp_path / output,
                **{"max_steps": 4, **changes},
                max_length=24, num_eval_samples=2, np_rank=3, num_ranks=2, batch_size=2,
                gradient_accumulation_steps=1, logging_steps=100, eval_steps=0, save_steps=100,
                generation_steps=0, sink_weight=0.0, cpu=True,
            )
        )  # fmt: skip

    parts = [train(f"run{layer}", train_layers=str(layer)).checkpoint for layer in (1, 2)]
    npt.merge(parts, tmp_path / "merged")
    resumed = train("more", train_layers="1,2", resume_from=str(tmp_path / "merged"), max_steps=8)
    assert resumed.layers == (1, 2)
    model = npt.load(base(name, torch.float32), resumed.checkpoint)
    assert [status.layer for status in npt.status(model)] == [1, 2]
    assert not torch.equal(logits(model, IDS), logits(base(name, torch.float32), IDS))
