"""A forward is attached to a module and taken off again; what lies on it can be pickled."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn

import npt_fast as npt
from npt_fast.hf.patching import attach, call_base, check_detachable, detach
from tests.hf.test_convert import converted, logits
from tests.processes import run_python

X = torch.arange(4.0)


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def plus_one(module: nn.Module, x: Tensor) -> Tensor:
    found: Tensor = call_base(module, x) + 1
    return found


def times_ten(module: nn.Module, x: Tensor) -> Tensor:
    return 10 * x


class Negate(ModelHook):  # type: ignore[misc]
    def post_forward(self, module: Any, output: Any) -> Any:
        return -output


def hooked() -> nn.Module:
    module = Double()
    add_hook_to_module(module, Negate())
    return module


def patched_by_others() -> nn.Module:
    module = Double()
    module.forward = MethodType(times_ten, module)  # type: ignore[method-assign]
    return module


@pytest.mark.parametrize(
    ("make", "base"), [(Double, 2 * X), (patched_by_others, 10 * X), (hooked, -2 * X)]
)
def test_attach_and_detach(make: Any, base: Tensor) -> None:
    module = make()
    before = dict(module.__dict__)
    sign = -1 if make is hooked else 1  # the hook stays outermost
    attach(module, plus_one)
    assert torch.equal(module(X), base + sign)
    detach(module, plus_one)
    assert module.__dict__ == before
    assert torch.equal(module(X), base)


def test_hooks_may_come_and_go_while_it_is_attached() -> None:
    late, early = Double(), hooked()
    attach(late, plus_one)
    add_hook_to_module(late, Negate())
    attach(early, plus_one)
    remove_hook_from_module(early)
    assert torch.equal(late(X), -2 * X - 1)
    assert torch.equal(early(X), 2 * X + 1)
    for module in (late, early):
        detach(module, plus_one)
    assert torch.equal(late(X), -2 * X)
    assert torch.equal(early(X), 2 * X)
    remove_hook_from_module(late)
    assert torch.equal(late(X), 2 * X)


def test_what_was_wrapped_afterwards_is_left_alone() -> None:
    model = converted()
    layer = model.model.layers[2]
    wrapped = layer.forward
    layer.forward = lambda *args, **options: wrapped(*args, **options)
    expected = logits(model)
    with pytest.raises(npt.ModelError, match="LlamaDecoderLayer: its forward was replaced"):
        npt.unload(model)
    assert [found.layer for found in npt.status(model)] == [1, 2]
    assert torch.equal(logits(model), expected)
    layer.forward = wrapped
    npt.unload(model)
    with pytest.raises(npt.ModelError):
        check_detachable(layer, plus_one)


@pytest.mark.parametrize(
    ("make", "copied"),
    [
        (Double, copy.deepcopy),
        (Double, lambda module: pickle.loads(pickle.dumps(module))),
        (patched_by_others, copy.deepcopy),  # which cannot be pickled without us either
    ],
)
def test_copies_have_a_forward_of_their_own(make: Any, copied: Any) -> None:
    module = make()
    attach(module, plus_one)
    twin = copied(module)
    assert torch.equal(twin(X), module(X))
    assert twin.__dict__["forward"].args[0] is twin
    detach(twin, plus_one)
    assert torch.equal(twin(X), make()(X))
    assert torch.equal(module(X), make()(X) + 1)


def test_a_converted_model_is_saved_whole_and_read_by_another_process(tmp_path: Path) -> None:
    model = converted()
    torch.save(model, tmp_path / "model.pt")
    program = (
        "import sys, torch\n"
        "model = torch.load(sys.argv[1], weights_only=False)\n"
        "ids = torch.tensor([[3, 14, 15, 92, 6, 5]])\n"
        "torch.save(model(ids, use_cache=False).logits.detach(), sys.argv[2])\n"
    )
    files = [str(tmp_path / "model.pt"), str(tmp_path / "logits.pt")]
    assert run_python(program, *files).returncode == 0
    assert torch.equal(torch.load(files[1]), logits(model))


def test_a_pickled_model_can_be_used_like_the_first() -> None:
    model = converted()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    assert npt.status(twin) == npt.status(model)
    with npt.disabled(model), npt.disabled(twin):
        assert torch.equal(logits(twin), logits(model))
    npt.unload(twin)
    assert torch.equal(logits(twin), logits(npt.unload(model)))
