"""PEFT adapters on the projections of NP layers act, train and merge."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import npt_fast as npt
from npt_fast.hf.convert import decoder_layers
from npt_fast.transfer.base_model import BaseModel
from npt_fast.transfer.modulation import Modulation
from npt_fast.transfer.terms import Terms
from tests.hf.test_convert import PROMPT, converted, logits, randomize, tiny

PROJECTIONS = ["gate_proj", "up_proj", "down_proj"]
ORDERS = ["convert, then adapt", "adapt, then convert"]


def with_np_layers(model: Any) -> Any:
    return randomize(npt.convert(model, npt.NPTConfig(layers=[1, 2], rank=4, num_ranks=2)))


def adapted(model: Any, **options: Any) -> Any:
    torch.manual_seed(2)
    options = {"init_lora_weights": False, **options}
    return get_peft_model(
        model,
        LoraConfig(r=4, target_modules=PROJECTIONS, layers_to_transform=[1, 2], **options),
    ).eval()


def both(order: str, **options: Any) -> Any:
    if order == ORDERS[0]:
        return adapted(converted(), **options)
    return with_np_layers(adapted(tiny(), **options))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_an_adapter_acts_as_if_merged(order: str, options: dict[str, Any]) -> None:
    """Merging writes into plain weights, which the fused path reads."""
    model = both(order, **options)
    on = logits(model)
    with model.disable_adapter():
        off = logits(model)
    torch.testing.assert_close(off, logits(converted()), rtol=1e-4, atol=1e-5)
    assert (on - off).abs().max() > 0.1
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(on, logits(merged), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", ORDERS)
def test_disabled_layers_are_the_adapted_base(order: str) -> None:
    model = both(order)
    with npt.disabled(model):
        found = logits(model)
    assert torch.equal(found, logits(adapted(tiny())))


@pytest.mark.parametrize("order", ORDERS)
def test_an_adapter_on_np_layers_trains_and_merges(order: str) -> None:
    model = both(order, init_lora_weights=True)
    for name, parameter in model.named_parameters():  # convert freezes what it finds
        parameter.requires_grad_("lora_" in name)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 3
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(PROMPT, labels=PROMPT, use_cache=False).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5
    on = logits(model)
    torch.testing.assert_close(on, logits(model.merge_and_unload()), rtol=1e-4, atol=1e-5)


def test_gradients_of_an_adapter_are_those_of_its_merged_weight() -> None:
    """dL/dB = s dL/dW A' and dL/dA = s B' dL/dW, with dL/dW of the fused path."""
    model = adapted(with_np_layers(tiny().double())).double()
    merged = copy.deepcopy(model).merge_and_unload().requires_grad_(True)
    for each in (model, merged):
        each(PROMPT, labels=PROMPT, use_cache=False).loss.backward()
    for index in (1, 2):
        for name in PROJECTIONS:
            layer: Any = decoder_layers(model)[index].get_submodule(f"mlp.{name}")
            weight: Any = decoder_layers(merged)[index].get_submodule(f"mlp.{name}").weight
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            scale = layer.scaling["default"]
            torch.testing.assert_close(b.grad, scale * weight.grad @ a.t())
            torch.testing.assert_close(a.grad, scale * b.t() @ weight.grad)


def modulation(model: Any) -> Modulation:
    torch.manual_seed(3)
    terms = {
        name: Terms(torch.randn(2, n) * 0.3, torch.randn(2, m) * 0.3)
        for name, n, m in (("gate", 32, 48), ("up", 32, 48), ("down", 48, 32))
    }
    return Modulation({1: terms}, BaseModel.of(model), {}, True)


def test_our_own_adapter_acts_on_the_np_model(tmp_path: Path) -> None:
    """As injecting the modulation into every token, which is its definition."""
    model = converted()
    m = modulation(model)
    with npt.inject(model, m, mode="exact-add", position="all"):
        expected = logits(model)
    npt.export_lora(m, model, tmp_path / "adapter")
    adapter = PeftModel.from_pretrained(model, tmp_path / "adapter")
    torch.testing.assert_close(logits(adapter), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", ORDERS)
def test_injecting_into_an_adapted_model(order: str) -> None:
    model = both(order)
    m = modulation(tiny())
    merged = copy.deepcopy(model).merge_and_unload()
    for mode in ("replace", "exact-add", "add"):
        with npt.inject(model.get_base_model(), m, mode=mode):
            found = logits(model)
        with npt.inject(merged, m, mode=mode):
            torch.testing.assert_close(found, logits(merged), rtol=1e-4, atol=1e-5)


def test_baking_into_an_adapted_projection_is_refused() -> None:
    model = both(ORDERS[0])
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(npt.ModelError, match=r"layer 1, gate_proj is a peft\..*Merge adapters"):
        npt.bake(model.get_base_model(), modulation(tiny()))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
