"""Wrappers of other libraries, around models, layers and components, are seen through."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel

import npt_fast as npt
from npt_fast.hf.convert import components, decoder_layers
from npt_fast.hf.wrappers import unwrapped
from tests.hf.test_convert import converted, logits, tiny


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/sync", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def fsdp(module: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(module, use_orig_params=True, device_id=torch.device("cpu"))


def compiled(module: nn.Module) -> nn.Module:
    found: Any = torch.compile(module, backend="eager")
    return found  # type: ignore[no-any-return]


def around_layers(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[Any], Any]:
    def wrapped(model: Any) -> Any:
        for index in (1, 2, 3):
            model.model.layers[index] = wrap(model.model.layers[index])
        return model

    return wrapped


def around_components(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[Any], Any]:
    def wrapped(model: Any) -> Any:
        for layer in model.model.layers:
            if hasattr(layer, "np_component"):
                layer.np_component = wrap(layer.np_component)
        return model

    return wrapped


def peft(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=True))


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "compiled layers": around_layers(compiled),
    "checkpointed layers": around_layers(checkpoint_wrapper),
    "data parallel": DataParallel,
    "DDP": lambda model: DistributedDataParallel(model.train()).eval(),
    "FSDP": fsdp,
    "FSDP layers": around_layers(fsdp),
    "FSDP components": around_components(fsdp),
    "PEFT": peft,
}


COMPILED: dict[str, Callable[[Any], Any]] = {
    "compiled": compiled,
    "compiled PEFT": lambda model: compiled(peft(model)),
    "both around layers": around_layers(lambda layer: compiled(checkpoint_wrapper(layer))),
}
CASES = [
    *(pytest.param(wrap, id=name) for name, wrap in WRAPPERS.items()),
    # compiling takes most of a minute
    *(pytest.param(wrap, id=name, marks=pytest.mark.slow) for name, wrap in COMPILED.items()),
]


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("wrap", CASES)
def test_a_converted_model_in_wrappers(wrap: Callable[[Any], Any], tmp_path: Path) -> None:
    plain, model = converted(), wrap(converted())
    assert npt.status(model) == npt.status(plain)
    torch.testing.assert_close(logits(model), logits(plain))
    npt.save(model, tmp_path / "out")
    with npt.disabled(model):
        torch.testing.assert_close(logits(model), logits(tiny()))
    for part in components(model).values():
        for parameter in part.parameters():
            parameter.data.zero_()
    assert not torch.allclose(logits(model), logits(plain))
    npt.load(model, tmp_path / "out")
    torch.testing.assert_close(logits(model), logits(plain))
    torch.testing.assert_close(logits(npt.load(tiny(), tmp_path / "out")), logits(plain))
    npt.unload(model)
    assert not npt.status(model)
    torch.testing.assert_close(logits(model), logits(tiny()))


@pytest.mark.parametrize("name", ["compiled layers", "checkpointed layers", "PEFT"])
def test_a_wrapped_model_is_converted(name: str, tmp_path: Path) -> None:
    plain, model = converted(), WRAPPERS[name](tiny())
    npt.save(plain, tmp_path / "out")
    torch.testing.assert_close(logits(model), logits(tiny()))  # now it is compiled
    npt.load(model, tmp_path / "out")
    assert npt.status(model) == npt.status(plain)
    torch.testing.assert_close(logits(model), logits(plain))


def test_peft_trains_a_copy_of_the_component(tmp_path: Path) -> None:
    plain = converted()
    model = get_peft_model(
        converted(), LoraConfig(target_modules=["q_proj"], modules_to_save=["np_component"])
    )
    assert npt.status(model) == npt.status(plain)
    assert {name for name, p in model.named_parameters() if p.requires_grad and "np_" in name}
    with torch.no_grad():
        for part in components(model).values():
            assert all(parameter.requires_grad for parameter in part.parameters())
            part.w_b_gate.add_(1)
    trained = logits(model)
    assert not torch.allclose(trained, logits(plain))
    with npt.disabled(model):
        torch.testing.assert_close(logits(model), logits(tiny()))
    npt.save(model, tmp_path / "out")
    assert torch.equal(logits(npt.load(tiny(), tmp_path / "out")), trained)
    with model.disable_adapter():  # PEFT then runs the component that it had copied
        assert torch.equal(logits(model), logits(plain))
        assert torch.equal(components(model)[1].w_b_gate, components(plain)[1].w_b_gate)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), trained)
    assert npt.status(merged) == npt.status(plain)


def test_what_is_no_wrapper() -> None:
    for module in (nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)), nn.ModuleDict(), None):
        assert unwrapped(module) is module


@pytest.mark.parametrize("wrap", [checkpoint_wrapper, compiled])
def test_an_mlp_in_a_wrapper(wrap: Callable[[Any], Any]) -> None:
    model = converted()
    before, layer = logits(model), decoder_layers(model)[1]
    mlp = layer.mlp
    layer.mlp = wrap(mlp)
    assert torch.equal(logits(model), before)
    npt.unload(model)
    assert not {"forward", "np_act_fn"} & vars(mlp).keys()


def test_peft_trains_a_copy_of_the_mlp() -> None:
    model = get_peft_model(
        converted(), LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp"])
    )
    before, wrapper = logits(model), decoder_layers(model)[1].mlp
    with torch.no_grad():
        wrapper.modules_to_save["default"].gate_proj.weight.mul_(2)
    assert not torch.equal(logits(model), before)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    npt.unload(model)
    assert all("np_act_fn" not in vars(part) for part in model.modules())
    assert all("forward" not in vars(part) for part in wrapper.modules())
