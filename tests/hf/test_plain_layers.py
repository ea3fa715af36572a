"""NP layers of MLPs without a gate: modulation types, names in files, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from torch import Tensor

import npt_fast as npt
from npt_fast.checkpoint.np_module import Architecture
from npt_fast.cli.shell.views import kind
from npt_fast.hf.convert import components, decoder_layers
from npt_fast.hf.residual import probe_residuals
from npt_fast.mlp_layout import MLPLayout
from npt_fast.modules import NPComponent
from npt_fast.testing import assert_within_budget
from tests.checkpoints import layer_weights, write_checkpoint
from tests.hf.families import base, converted
from tests.transfer.models import ids_of, logits, own_vectors, tokenizer

IDS = ids_of("the red house")
SIZES: dict[str, Any] = {"d": 32, "f": 48}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("modulation", ["triple", "plain"])
def test_all_projections_are_up_and_down(modulation: Any) -> None:
    model = npt.convert(base("gpt2"), npt.NPTConfig(layers=[1], rank=3, modulation=modulation))
    (status,) = npt.status(model)
    assert status.architecture == Architecture("plain", 1, 3, 32, 48)
    assert status.parameters == 2 * 3 * (2 * 32 + 48)


@pytest.mark.parametrize(
    ("name", "modulation", "problem"),
    [
        ("gpt2", "single", "layer 1 (GPT2Block): modulation single needs an MLP with a gate"),
        ("falcon", "dual", "(FalconDecoderLayer): modulation dual needs an MLP with a gate"),
        ("granite", "plain", "(GraniteDecoderLayer): modulation plain is for an MLP without"),
    ],
)
def test_a_modulation_of_the_other_kind_is_refused(
    name: str, modulation: Any, problem: str
) -> None:
    model = base(name)
    with pytest.raises(npt.OptionError) as caught:
        npt.convert(model, npt.NPTConfig(layers=[1], rank=3, modulation=modulation))
    assert problem in str(caught.value) and "\n" not in str(caught.value)
    assert not components(model) and all(p.requires_grad for p in model.parameters())


def test_a_component_is_for_one_kind_of_mlp() -> None:
    with pytest.raises(npt.OptionError, match="modulation plain is for an MLP without a gate"):
        NPComponent(32, 48, rank=2, modulation="plain")
    with pytest.raises(npt.OptionError, match="modulation triple needs an MLP with a gate"):
        NPComponent(32, 48, rank=2, layout=MLPLayout(None))


@pytest.mark.parametrize(("name", "given"), [("gpt2", "triple"), ("granite", "plain")])
def test_a_checkpoint_of_the_other_kind_is_refused(tmp_path: Path, name: str, given: str) -> None:
    weights = layer_weights(0, modulation=given, **SIZES)
    path = write_checkpoint(tmp_path / "np", weights)
    model = base(name)
    with pytest.raises(npt.ModelError) as caught:
        npt.load(model, path, residual="removed")
    assert str(caught.value).startswith(f"{path}: layer")
    assert given in str(caught.value) and "\n" not in str(caught.value)
    assert not components(model)


def test_a_layer_of_another_width_is_refused(tmp_path: Path) -> None:
    """The config tells one width for all layers, which need not be that of each."""
    path = write_checkpoint(tmp_path / "np", layer_weights(1, modulation="plain", d=32, f=40))
    model = base("gpt2")
    model.config.intermediate_size = 40
    with pytest.raises(npt.ModelError, match="intermediate_size 40, the model has 48"):
        npt.load(model, path, residual="removed")
    assert not components(model)


def test_names_in_the_file(tmp_path: Path) -> None:
    npt.save(converted("gpt_neox", "kept"), tmp_path / "np", format="pt")
    weights = torch.load(tmp_path / "np" / "npt_weights.pt", weights_only=True)
    expected = [
        name
        for layer in (1, 2)
        for name in layer_weights(layer, modulation="plain", num_ranks=2, rank=3, **SIZES)
    ]
    assert list(weights) == expected
    assert expected[0] == "layer_1_np.W_down_up.0"
    report = npt.inspect(tmp_path / "np")
    assert (report.modulation, report.intermediate_size) == ("plain", 48)
    assert npt.verify(tmp_path / "np").passed


def test_a_whole_model(tmp_path: Path) -> None:
    """Layers in ``transformer.h``, as save_pretrained writes them."""
    model = converted("gpt2", "kept")
    model.save_pretrained(tmp_path / "whole")
    with safe_open(tmp_path / "whole" / "model.safetensors", "pt") as file:
        assert "transformer.h.1.np_component.w_b_up" in file.keys()
    other = npt.load(base("gpt2"), tmp_path / "whole", dtype=torch.float64)
    assert torch.equal(logits(other, IDS), logits(model, IDS))


def test_int8_factors(tmp_path: Path) -> None:
    model = converted("falcon", "kept").float()
    expected = logits(model, IDS)
    npt.quantize(model)
    found = logits(model, IDS)
    assert (found - expected).norm() < 0.1 * expected.norm()
    npt.save(model, tmp_path / "np")
    other = npt.load(base("falcon", torch.float32), tmp_path / "np")
    assert torch.equal(logits(other, IDS), found)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "falcon"])
@torch.no_grad()
def test_bfloat16_keeps_the_budget(name: str) -> None:
    """Beside the definition computed in bfloat16, with vectors formed."""
    layer = decoder_layers(converted(name, "removed").bfloat16())[1]
    x, h = torch.randn(2, 1, 64, 32, generator=torch.Generator().manual_seed(0)).bfloat16()

    def by_definition(layer: Any, x: Tensor, h: Tensor) -> Tensor:
        own, layout = own_vectors(layer.np_component, x[0]), layer.np_component.layout

        def projected(name: str, a: Tensor) -> Tensor:
            coefficients = (own[name].v_a * a.unsqueeze(-2)).sum(-1, keepdim=True)
            change = (own[name].v_b * coefficients).sum(-2)
            y: Tensor = getattr(layer.mlp, getattr(layout, name))(a)
            return y + change

        return projected("down", layer.mlp.act(projected("up", h[0])))[None]

    exact = by_definition(copy.deepcopy(layer).double(), x.double(), h.double())
    found = layer.np_component(x, h, layer.mlp)
    assert_within_budget(found, exact, by_definition(layer, x, h), name, terms=48)


def test_a_modulation_goes_through_its_file(tmp_path: Path) -> None:
    model = converted("gpt2", "removed")
    m = npt.extract(model, tokenizer, "a blue boat")
    assert {name for _, name, _ in m.walk()} == {"up", "down"} and kind(m) == "plain"
    m.save(tmp_path / "m.safetensors")
    again = npt.load_modulation(tmp_path / "m.safetensors")
    with npt.inject(model, m, mode="blend", strength=0.5):
        expected = logits(model, IDS)
    with npt.inject(model, again, mode="blend", strength=0.5):
        assert torch.equal(logits(model, IDS), expected)
    assert not torch.allclose(logits(model, IDS), expected)


@pytest.mark.filterwarnings("ignore:the modulation belongs to another base model")
def test_a_modulation_of_a_gate_is_refused(tmp_path: Path) -> None:
    gated = npt.extract(converted("granite", "removed"), tokenizer, "a blue boat")
    model = converted("gpt2", "removed")
    expected = logits(model, IDS)
    problem = "layer 1 has no gate, which the modulation changes"
    with pytest.raises(npt.ModelError, match=problem), npt.inject(model, gated):
        pass
    with pytest.raises(npt.ModelError, match=problem):
        npt.bake(model, gated)
    with pytest.raises(npt.ModelError, match=problem):
        npt.export_lora(gated, model, tmp_path / "lora")
    assert torch.equal(logits(model, IDS), expected)


def test_an_adapter_and_hooks_act_as_in_the_base_model() -> None:
    """At dW = 0 a layer whose MLP is called gives what the base MLP gives with an adapter."""
    model = base("gpt2", torch.float32)
    config = LoraConfig(r=2, target_modules=["c_fc", "mlp.c_proj"], fan_in_fan_out=True)
    adapted: Any = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    layer = decoder_layers(model)[1]
    h = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    expected = layer.mlp(h)
    npt.convert(model, npt.NPTConfig(layers=[1], rank=2))
    assert torch.allclose(layer.np_component(h, h, layer.mlp), expected, atol=1e-6)
    seen: list[Tensor] = []
    layer.mlp.register_forward_hook(lambda _, args, out: seen.append(out))
    assert torch.equal(layer.np_component(h, h, layer.mlp), seen[0])


@pytest.mark.parametrize("name", ["gptj", "falcon"])
def test_attention_weights_are_returned_as_by_the_base_layer(name: str) -> None:
    """Layer 1 reads what it reads in the base model, and these layers return a tuple."""
    models = [base(name), converted(name, "removed")]
    for model in models:
        model.set_attn_implementation("eager")
    expected, found = (model(IDS, output_attentions=True).attentions for model in models)
    assert len(found) == 4 and torch.equal(found[1], expected[1])
    assert not torch.equal(found[2], expected[2])


@pytest.mark.parametrize("name", ["gpt2", "gpt_neo", "gpt_neox", "gpt_neox, one after the other"])
def test_names_that_fit_two_blocks_are_proved_without_the_probe_too(name: str) -> None:
    models = [base(name), base(name)]
    for model, probe in zip(models, (True, False), strict=True):
        npt.convert(model, npt.NPTConfig(layers=[2], rank=2), probe=probe)
    blocks = [decoder_layers(model)[2].np_block for model in models]
    assert blocks[0] == blocks[1]
    assert torch.equal(*(logits(model, IDS) for model in models))


@pytest.mark.parametrize(
    ("name", "residual", "verdict"),
    [("gpt2", "removed", "removed"), ("gpt2", "kept", "kept"), ("falcon", "removed", None)],
)
def test_what_training_aimed_at_is_found(name: str, residual: Any, verdict: str | None) -> None:
    """Layers whose file does not tell the residual are run on random tokens.

    In a parallel block attention does not move the base MLP, so that there is no verdict.
    """
    model = base(name, torch.float32)
    npt.convert(model, npt.NPTConfig(layers=[1], rank=16, num_ranks=2, residual=residual))
    step = npt.Distillation(model)
    ids = torch.randint(257, (4, 64), generator=torch.Generator().manual_seed(0))
    step.calibrate(ids)
    optimizer = torch.optim.AdamW(npt.trainable_parameters(model), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        step(ids).loss.backward()
        optimizer.step()
    assert probe_residuals(model, [1]) == {1: verdict}
