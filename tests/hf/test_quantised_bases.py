"""Quantised bases: an NP layer computes with what their projections return.

bitsandbytes and torchao are no requirements of ours; `make test-quantised` brings them, and without
them their cases are skipped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

import npt_fast as npt
from npt_fast.hf.convert import components, decoder_layers
from npt_fast.transfer.base_model import BaseModel
from npt_fast.transfer.modulation import Modulation
from npt_fast.transfer.terms import Terms

IDS = torch.tensor([[3, 14, 15, 92, 6, 5]])
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
D, F = 64, 128

Base = Callable[[Path], Any]


def base(_: Path) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def loaded(folder: Path, options: BitsAndBytesConfig) -> Any:
    pytest.importorskip("bitsandbytes")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    base(folder).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=options, device_map={"": "cpu"}
    ).eval()


def four_bits(folder: Path) -> Any:
    options = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, bnb_4bit_quant_type="nf4"
    )
    return loaded(folder, options)


def eight_bits(folder: Path) -> Any:
    return loaded(folder, BitsAndBytesConfig(load_in_8bit=True))  # type: ignore[no-untyped-call]


def of_torchao(name: str) -> Base:
    def make(folder: Path) -> Any:
        quantization = pytest.importorskip("torchao.quantization")
        model = base(folder)
        quantization.quantize_(model, getattr(quantization, name)())
        return model

    return make


class FP8Linear(nn.Linear):
    """As fine-grained FP8: bytes, and a scale for each block of 32 x 32."""

    def forward(self, a: Tensor) -> Tensor:
        scale = self.weight_scale_inv.repeat_interleave(32, 0).repeat_interleave(32, 1)
        return nn.functional.linear(a, self.weight.to(a.dtype) * scale, self.bias)


def fp8(folder: Path) -> Any:
    model = base(folder)
    for layer in decoder_layers(model):
        mlp = layer.get_submodule("mlp")
        for name in PROJECTIONS:
            old: Any = mlp.get_submodule(name)
            new = FP8Linear(old.in_features, old.out_features, bias=False)
            blocks = old.weight.data.view(old.out_features // 32, 32, old.in_features // 32, 32)
            scale = blocks.abs().amax((1, 3)) / 448
            weight = (blocks / scale[:, None, :, None]).reshape(old.weight.shape)
            new.weight = nn.Parameter(weight.to(torch.float8_e4m3fn), requires_grad=False)
            new.register_buffer("weight_scale_inv", scale)
            setattr(mlp, name, new)
    return model


def dynamic(folder: Path) -> Any:
    return torch.ao.quantization.quantize_dynamic(base(folder), {nn.Linear}, dtype=torch.qint8)


BASES: dict[str, tuple[Base, float]] = {
    # on CPUs with AVX-512 its kernel computes in bfloat16: 8 bits
    "bitsandbytes 4 bit": (four_bits, 1e-2),
    # its products quantise their input too: one rounding of int8 more or less
    "bitsandbytes 8 bit": (eight_bits, 3e-2),
    "torchao int8": (of_torchao("Int8WeightOnlyConfig"), 1e-4),
    "torchao float8": (of_torchao("Float8WeightOnlyConfig"), 1e-4),
    "fine-grained fp8": (fp8, 1e-4),
    "torch dynamic int8": (dynamic, 3e-2),
}
_TRAINABLE = ("bitsandbytes 8 bit", "torchao int8", "torchao float8", "fine-grained fp8")
QUANTISED = pytest.mark.parametrize(("make", "tolerance"), BASES.values(), ids=BASES)


def converted(model: Any) -> Any:
    npt.convert(model, npt.NPTConfig(layers=[1], rank=4))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in components(model)[1].parameters():
            parameter.normal_(std=0.2)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(IDS, use_cache=False).logits.float()
    return found


@torch.no_grad()
def read_out(model: Any) -> dict[str, nn.Linear]:
    """Plain layers with the weights that the projections of layer 1 have by what they return."""
    found = {}
    for name in PROJECTIONS:
        quantised: Any = decoder_layers(model)[1].get_submodule(f"mlp.{name}")
        plain = nn.Linear(quantised.in_features, quantised.out_features, bias=False)
        plain.weight.copy_(quantised(torch.eye(plain.in_features)).float().t())
        found[name] = plain
    return found


def modulation(model: Any) -> Modulation:
    torch.manual_seed(2)
    sizes = {"gate": (D, F), "up": (D, F), "down": (F, D)}
    terms = {
        n: Terms(torch.randn(1, i) * 0.3, torch.randn(1, o) * 0.3) for n, (i, o) in sizes.items()
    }
    return Modulation({1: terms}, BaseModel.of(model), {}, True)


def far(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@QUANTISED
def test_np_layers_compute_with_what_projections_return(
    make: Base, tolerance: float, tmp_path: Path
) -> None:
    model = converted(make(tmp_path))
    m = modulation(model)
    found = logits(model)
    with npt.inject(model, m, mode="exact-add"):
        injected = logits(model)
    with npt.disabled(model):
        plain = logits(model)
    mlp = decoder_layers(model)[1].get_submodule("mlp")
    for name, linear in read_out(model).items():
        setattr(mlp, name, linear)
    assert far(found, logits(model)) < tolerance
    assert far(plain, found) > 0.1
    with npt.inject(model, m, mode="exact-add"):
        assert far(injected, logits(model)) < tolerance
    assert far(injected, found) > 0.1


@pytest.mark.parametrize("kind", _TRAINABLE)
def test_components_train_on_a_quantised_base(kind: str, tmp_path: Path) -> None:
    make, tolerance = BASES[kind]
    model = converted(make(tmp_path))
    part = components(model)[1]
    model(IDS, use_cache=False).logits.float().square().sum().backward()
    gradients = {name: p.grad for name, p in part.named_parameters()}
    part.zero_grad()
    mlp = decoder_layers(model)[1].get_submodule("mlp")
    for name, linear in read_out(model).items():
        setattr(mlp, name, linear.requires_grad_(False))
    model(IDS, use_cache=False).logits.float().square().sum().backward()
    for name, parameter in part.named_parameters():
        assert gradients[name] is not None and parameter.grad is not None
        assert far(gradients[name], parameter.grad) < 3 * tolerance, name


@pytest.mark.parametrize("kind", [kind for kind in BASES if kind not in _TRAINABLE])
def test_a_base_without_gradients_is_refused_in_training(kind: str, tmp_path: Path) -> None:
    """torch would leave them out and only warn: dynamic int8, and 4 bit packed for this CPU."""
    model = converted(BASES[kind][0](tmp_path))
    kernel: Any = decoder_layers(model)[1].get_submodule("mlp.gate_proj")
    probe = torch.ones(1, D).requires_grad_()
    if "NotImplemented" not in kernel(probe).grad_fn.name():
        pytest.skip("this CPU takes another kernel for it, which has gradients")
    with pytest.raises(npt.ModelError, match=r"_proj \(.*\) does not pass gradients back"):
        model(IDS, use_cache=False)


@QUANTISED
def test_baking_is_refused_and_changes_nothing(
    make: Base, tolerance: float, tmp_path: Path
) -> None:
    model = make(tmp_path)
    before = logits(model)
    with pytest.raises(npt.ModelError, match=r"layer 1, gate_proj is a .*; only float weights"):
        npt.bake(model, modulation(model))
    assert torch.equal(logits(model), before)


@QUANTISED
def test_layers_are_saved_loaded_and_unloaded(make: Base, tolerance: float, tmp_path: Path) -> None:
    model = make(tmp_path / "base")
    before = logits(model)
    expected = logits(converted(model))
    npt.save(model, tmp_path / "layers")
    npt.unload(model)
    assert torch.equal(logits(model), before)
    assert torch.equal(logits(npt.load(model, tmp_path / "layers")), expected)
