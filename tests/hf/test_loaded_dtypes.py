"""The dtype of layers that `npt.load` reads: the model's, or float32 for training."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import npt_fast as npt
from npt_fast.errors import NPTWarning
from npt_fast.hf.convert import components
from npt_fast.testing import ParameterCasts
from tests.checkpoints import layer_weights, write_checkpoint
from tests.hf.test_checkpoint import SIZES
from tests.hf.test_convert import PROMPT, converted, logits, tiny

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Layers 1 and 2 in float32, with numbers that 16 bits do not hold."""
    return npt.save(converted(), tmp_path / "saved")


def held(model: Any) -> set[tuple[torch.dtype, bool]]:
    return {
        (p.dtype, p.requires_grad) for part in components(model).values() for p in part.parameters()
    }


@pytest.mark.parametrize("dtype", [BF16, F16, F32, torch.float64], ids=str)
def test_layers_take_the_models_dtype_and_are_frozen(saved: Path, dtype: torch.dtype) -> None:
    model = npt.load(tiny().to(dtype), saved)
    assert held(model) == {(dtype, False)}
    rounded = converted().to(dtype)
    assert torch.equal(logits(model), logits(rounded))


def test_for_training_they_are_float32(saved: Path) -> None:
    model = npt.load(tiny().to(BF16), saved, trainable=True)
    assert held(model) == {(F32, True)}
    assert not any(p.requires_grad for p in model.model.embed_tokens.parameters())
    logits_of_training = model(PROMPT, use_cache=False).logits
    logits_of_training.float().sum().backward()
    assert components(model)[1].w_down.grad is not None


@pytest.mark.parametrize("trainable", [True, False])
def test_a_dtype_that_is_given_wins(saved: Path, trainable: bool) -> None:
    model = npt.load(tiny().to(BF16), saved, trainable=trainable, dtype=F16)
    assert held(model) == {(F16, trainable)}


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_a_dtype_that_layers_cannot_have_is_refused(saved: Path, dtype: torch.dtype) -> None:
    model = tiny()
    with pytest.raises(npt.OptionError, match="dtype must be a float of 16 bits or more"):
        npt.load(model, saved, dtype=dtype)
    assert not npt.status(model)


def test_layers_that_are_there_keep_what_they_have(saved: Path) -> None:
    model = converted().to(BF16)
    trained, frozen = components(model).values()
    trained.float()
    frozen.requires_grad_(False)
    npt.load(model, saved)
    assert {p.dtype for p in trained.parameters()} == {F32}
    assert {p.dtype for p in frozen.parameters()} == {BF16}
    assert trained.w_down.requires_grad and not frozen.w_down.requires_grad
    npt.load(model, saved, dtype=F16)
    assert held(model) == {(F16, True), (F16, False)}
    npt.load(model, saved, trainable=True)
    assert held(model) == {(F32, True)}
    assert torch.equal(trained.w_down, components(converted())[1].w_down)


class Scaled(nn.Linear):
    """A quantised projection: bytes, and a float32 scale."""

    def __init__(self, old: nn.Linear) -> None:
        super().__init__(old.in_features, old.out_features, bias=False)
        weight = old.weight.detach().to(torch.float8_e4m3fn)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, a: Tensor) -> Tensor:
        return nn.functional.linear(a, (self.weight.float() * self.weight_scale).to(a.dtype))


def test_layers_of_a_quantised_mlp_take_the_models_dtype(saved: Path) -> None:
    model = tiny().to(BF16)
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer.mlp, name, Scaled(getattr(layer.mlp, name)))
    npt.load(model, saved)
    assert held(model) == {(BF16, False)}


def test_layers_of_an_adapted_mlp_take_its_weights_dtype(saved: Path) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        tiny().to(BF16), peft.LoraConfig(r=2, target_modules=["gate_proj"])
    )
    npt.load(adapted, saved)
    assert held(adapted) == {(BF16, False)}


class Shapes(TorchDispatchMode):
    """Shapes of the float32 tensors that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.made: set[torch.Size] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == F32:
            self.made.add(result.shape)
        return result


def test_no_wider_copy_of_a_parameter_is_made(saved: Path) -> None:
    model = tiny().to(BF16)
    with Shapes() as wide:
        npt.load(model, saved, probe=False)
    assert wide.made  # a file's tensors, which are parts of the parameters
    assert not wide.made & {p.shape for p in components(model)[1].parameters()}


def test_a_decode_step_of_a_loaded_model_casts_no_parameter(saved: Path) -> None:
    model = npt.load(tiny().to(BF16), saved)
    with torch.no_grad(), ParameterCasts(components(model)[1]) as casts:
        model(PROMPT, use_cache=True)
    assert casts.count == 0


def test_numbers_that_float16_does_not_hold_are_refused(tmp_path: Path) -> None:
    weights = layer_weights(1, **SIZES)
    name = list(weights)[2]
    weights[name][0, 1] = 65_520  # the least that rounds to infinity
    path = write_checkpoint(tmp_path / "a", weights)
    model = tiny().half()
    with pytest.raises(npt.ModelError) as refused:
        npt.load(model, path)
    assert str(refused.value) == (
        f"{path / 'npt_weights.pt'}: {name}: has numbers that are too large for float16; "
        "load the model in bfloat16, or the layers with dtype=torch.float32"
    )
    assert not npt.status(model)
    npt.load(model, path, dtype=F32)
    assert held(model) == {(F32, False)}
    weights[name][0, 1] = 65_519
    assert npt.load(tiny().half(), write_checkpoint(tmp_path / "b", weights)) is not None


def test_saving_tells_of_layers_that_were_rounded(saved: Path, tmp_path: Path) -> None:
    model = npt.load(tiny().to(BF16), saved)
    npt.load(model, saved, layers=[2], dtype=F32)
    out = tmp_path / "out"
    with pytest.warns(NPTWarning) as warned:
        npt.save(model, out)
    assert [str(warning.message) for warning in warned] == [
        f"{out}: layers [1] were rounded when they were loaded, and are saved so; "
        "npt.load with dtype=torch.float32 keeps their precision"
    ]
    before, after = (load_file(path / "npt_weights.safetensors") for path in (saved, out))
    for key, tensor in after.items():
        expected = before[key].to(BF16) if key.startswith("layer_1") else before[key]
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected)
    assert npt.verify(out).passed


@pytest.mark.filterwarnings("error")
def test_saving_tells_nothing_where_nothing_was_lost(saved: Path, tmp_path: Path) -> None:
    with pytest.warns(NPTWarning):
        half = npt.save(npt.load(tiny().to(BF16), saved), tmp_path / "half")
    again = npt.save(npt.load(tiny().to(BF16), half), tmp_path / "again")
    npt.save(npt.load(tiny(), half), tmp_path / "wide")  # bfloat16 in float32: exact
    npt.save(npt.load(tiny().to(BF16), saved, trainable=True), tmp_path / "float32")
    first, second = (load_file(path / "npt_weights.safetensors") for path in (half, again))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_merge_copies_what_was_saved_in_16_bits(saved: Path, tmp_path: Path) -> None:
    model = npt.load(tiny().to(BF16), saved, layers=[1])
    with pytest.warns(NPTWarning):
        npt.save(model, tmp_path / "half")
    other = converted(layers=(3,))
    npt.save(other, tmp_path / "other")
    npt.merge([tmp_path / "half", tmp_path / "other"], tmp_path / "merged", verify=True)
    layers = npt.inspect(tmp_path / "merged").layers
    assert [layer.dtypes for layer in layers] == [["BF16"], ["F32"]]


def test_a_copy_of_a_model_remembers_the_rounding(saved: Path, tmp_path: Path) -> None:
    model = copy.deepcopy(npt.load(tiny().to(BF16), saved))
    with pytest.warns(NPTWarning, match=r"layers \[1, 2\] were rounded"):
        npt.save(model, tmp_path / "out")
