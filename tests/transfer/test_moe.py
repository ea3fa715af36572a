"""Modulations of mixtures of experts: extracted, injected, baked and exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import npt_fast as npt
from npt_fast.hf.convert import components, decoder_layers
from npt_fast.transfer.base_model import BaseModel
from npt_fast.transfer.modulation import Modulation
from npt_fast.transfer.terms import Terms
from tests.hf.mixtures import FAMILIES, IDS, LAYERS, base, converted, logits
from tests.transfer.models import tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


def modulation(model: Any, layers: tuple[int, ...] = LAYERS, terms: int = 2) -> Modulation:
    """Random terms in float64."""
    record = BaseModel.of(model, layers)
    d, f = record.hidden_size, record.intermediate_size
    generator = torch.Generator().manual_seed(3)
    widths = {"gate": (d, f), "up": (d, f), "down": (f, d)}

    def drawn(width: int) -> Tensor:
        return torch.randn((terms, width), generator=generator, dtype=torch.float64) / 4

    return Modulation(
        {n: {p: Terms(*map(drawn, pair)) for p, pair in widths.items()} for n in layers}, record
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_baking_is_adding_at_all_positions(family: str) -> None:
    model = converted(family, modulation="triple")
    m = modulation(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with npt.inject(model, m, mode="exact-add", position="all", strength=0.5):
        expected = logits(model)
    assert (expected - logits(model)).abs().max() > 0.01
    baked = npt.bake(model, m, 0.5)
    torch.testing.assert_close(logits(model), expected, rtol=1e-6, atol=1e-6)
    changed = {name for name, w in model.state_dict().items() if not torch.equal(w, before[name])}
    names = (
        [f"shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")]
        if family == "deepseek_v3"
        else ["experts.gate_up_proj", "experts.down_proj"]
    )
    assert changed == {f"model.layers.{n}.mlp.{name}" for n in LAYERS for name in names}
    baked.undo()
    found = model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in before.items())


def test_each_expert_gets_the_same_change() -> None:
    """GPT-OSS keeps its matrices transposed, with gate and up in turn."""
    for family in ("mixtral", "gpt_oss"):
        model = base(family)
        m = modulation(model, (1,))
        experts = decoder_layers(model)[1].mlp.experts
        both, down = experts.gate_up_proj.clone(), experts.down_proj.clone()
        npt.bake(model, m)
        dense = {p: sum(map(torch.outer, t.v_b, t.v_a)) for p, t in m.layers[1].items()}
        if family == "gpt_oss":
            joined, out = (
                torch.stack([dense["gate"], dense["up"]], 1).flatten(0, 1).T,
                dense["down"].T,
            )
        else:
            joined, out = torch.cat([dense["gate"], dense["up"]]), dense["down"]
        torch.testing.assert_close(experts.gate_up_proj, both + joined, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(experts.down_proj, down + out, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["replace", "blend", "exact-add"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_an_injection_at_one_token(family: str, mode: Any) -> None:
    """The chosen token's output is that of all tokens injected; other tokens keep their bits."""
    model = converted(family, [1])
    m = Modulation(modulation(model, (1,)).layers, BaseModel.of(model, (1,)), vectors=True)
    seen: list[Tensor] = []
    components(model)[1].register_forward_hook(lambda _, args, out: seen.append(out))
    logits(model)
    for position in (3, "all"):
        with npt.inject(model, m, mode=mode, position=position, strength=0.7):
            logits(model)
    own, one, every = seen
    others = [t for t in range(IDS.shape[1]) if t != 3]
    assert torch.equal(one[:, others], own[:, others])
    torch.testing.assert_close(one[:, 3], every[:, 3], rtol=1e-6, atol=1e-6)
    assert (one[:, 3] - own[:, 3]).abs().max() > 0.01


def test_extracted_ones_fit_the_experts(tmp_path: Path) -> None:
    model = converted("qwen3_moe", [1])
    m = npt.extract(model, tokenizer, "ab")
    assert m.base.intermediate_size == 16 and model.config.intermediate_size == 48
    m.save(tmp_path / "m.safetensors")
    again = npt.load_modulation(tmp_path / "m.safetensors")
    again.check_base_model(model)
    with pytest.raises(npt.ModelError, match="intermediate_size 16, the model has 24"):
        again.check_base_model(base("qwen3_moe", moe_intermediate_size=24))


def test_one_modulation_has_one_width() -> None:
    model = converted("deepseek_v3", [0, 1])
    assert BaseModel.of(model, [0]).intermediate_size == 48
    assert BaseModel.of(model, [1]).intermediate_size == 16
    with pytest.raises(npt.ModelError, match=r"one width: those of layers \[1, 2, 3\]"):
        BaseModel.of(model)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_no_adapters(family: str, tmp_path: Path) -> None:
    """PEFT would put those of DeepSeek's layer 0 on the experts of other layers."""
    model = base(family)
    m = modulation(model, (0,))
    with pytest.raises(npt.ModelError, match=r"layers \[.*1, 2, 3\] are mixtures of experts"):
        npt.export_lora(m, model, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_hooked_experts_are_not_baked() -> None:
    model = base("mixtral")
    m = modulation(model)
    decoder_layers(model)[2].mlp.experts.register_forward_hook(lambda *args: args[-1])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(npt.ModelError, match="layer 2 has hooks on its experts"):
        npt.bake(model, m)
    found = model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in before.items())
