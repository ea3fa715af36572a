"""DDP and FSDP2 with two processes give the gradients of one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from npt_fast import modules
from npt_fast.errors import ModelError
from npt_fast.functional import modulated_mlp
from npt_fast.modules import NPComponent
from npt_fast.testing import assert_within_budget, longest_sum
from tests.forked import forkserver
from tests.kernels.float32_sums import Additions, float32_sums

TOKENS, HIDDEN, INTERMEDIATE = 10, 24, 40


class Layer(nn.Module):
    """An MLP and its NP component, both trained."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mlp = nn.Module()
        self.mlp.gate_proj = nn.Linear(HIDDEN, INTERMEDIATE)
        self.mlp.up_proj = nn.Linear(HIDDEN, INTERMEDIATE)
        self.mlp.down_proj = nn.Linear(INTERMEDIATE, HIDDEN)
        self.np = NPComponent(HIDDEN, INTERMEDIATE, rank=3, num_ranks=2)
        for parameter in self.np.parameters():
            nn.init.normal_(parameter, std=0.2)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return self.np(x, h, self.mlp)


def batch() -> list[Tensor]:
    """x, h and the output's gradient."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(TOKENS, HIDDEN, generator=generator) for _ in range(3)]


def gradients(model: nn.Module, x: Tensor, h: Tensor, dy: Tensor) -> dict[str, Tensor]:
    model(x, h).backward(dy)
    found = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None
        whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        found[name.removeprefix("module.")] = whole
    return found


STEPS = 3
"""Micro-steps of an optimizer step."""


class MixedLayer(Layer):
    """The same with a frozen MLP in 16 bit, whose products are added to float32 gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp.to(torch.bfloat16).requires_grad_(False)


def accumulated(model: Any, rank: int) -> dict[str, Tensor]:
    """Gradients of the second of two optimizer steps, after micro-steps with one all-reduce."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    for _ in range(2):
        optimizer.zero_grad()
        for step in range(STEPS):
            last = step == STEPS - 1
            if isinstance(model, DistributedDataParallel):
                context: Any = nullcontext() if last else model.no_sync()
            else:
                context = nullcontext()
                if isinstance(model, FSDPModule):
                    model.set_requires_gradient_sync(last)
            x, h, dy = (tensor.bfloat16() for tensor in micro_batch(rank, step))
            with context:
                model(x, h).backward(dy)
        found = {
            name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad.clone()
            for name, p in inner.named_parameters()
            if p.grad is not None
        }
        optimizer.step()
    return found


def micro_batch(rank: int, step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(10 * rank + step + 1)
    return [torch.randn(TOKENS, HIDDEN, generator=generator) for _ in range(3)]


def both_accumulated() -> dict[str, Tensor]:
    """What two processes must find, by one: means over processes, of sums of micro-steps."""
    layer = MixedLayer()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    for _ in range(2):
        parameters = dict(layer.np.named_parameters())
        found = {f"np.{name}": torch.zeros_like(p) for name, p in parameters.items()}
        for rank in range(2):
            for step in range(STEPS):
                x, h, dy = (tensor.bfloat16() for tensor in micro_batch(rank, step))
                parts = torch.autograd.grad(layer(x, h), [*parameters.values()], dy)
                for total, part in zip(found.values(), parts, strict=True):
                    total += part / 2
        for name, parameter in parameters.items():
            parameter.grad = found[f"np.{name}"]
        optimizer.step()
    return found


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "ddp, accumulated": DistributedDataParallel,
    "ddp with views, accumulated": partial(DistributedDataParallel, gradient_as_bucket_view=True),
    "fsdp2, accumulated": lambda model: fully_shard(model, mesh=init_device_mesh("cpu", (2,))),
}


def work(rank: int, folder: Path) -> None:
    """Main function of one of two processes; each has half the tokens."""
    torch.set_num_threads(1)
    modules.modulated_mlp = partial(modulated_mlp, impl="triton")
    store = distributed.FileStore(str(folder / "store"), 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    half = slice(rank * TOKENS // 2, (rank + 1) * TOKENS // 2)
    tensors = [tensor[half] for tensor in batch()]
    sharded = fully_shard(Layer(), mesh=init_device_mesh("cpu", (2,)))
    found: dict[str, Any] = {
        "ddp": gradients(DistributedDataParallel(Layer()), *tensors),
        "fsdp2": gradients(sharded, *tensors),
    }
    modules.modulated_mlp = modulated_mlp
    with float32_sums(), Additions() as additions:
        for name, wrap in WRAPPERS.items():
            found[name] = accumulated(wrap(MixedLayer()), rank)
            found[f"{name} additions"] = additions.by_gemm
            additions.by_gemm = 0
    try:  # outside its forward its parameters are shards
        sharded.np.forward(*tensors[:2], sharded.mlp)
    except ModelError as error:
        found["refused"] = str(error)
    torch.save(found, folder / f"{rank}.pt")
    distributed.barrier()  # otherwise one process closes the connection too early
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Results of each process."""
    if torch.cuda.is_available():
        pytest.skip("two processes of gloo are on a CPU")
    folder = tmp_path_factory.mktemp("processes")
    forkserver()
    multiprocessing.start_processes(work, (folder,), nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_gradients_are_those_of_one_process(
    found: list[dict[str, Any]], parallel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sum over tokens is added in halves, as a mean over processes."""
    monkeypatch.setattr(modules, "modulated_mlp", partial(modulated_mlp, impl="triton"))
    one = gradients(Layer(), *batch())
    monkeypatch.setattr(modules, "modulated_mlp", partial(modulated_mlp, impl="reference"))
    exact = gradients(Layer().double(), *(tensor.double() for tensor in batch()))
    for process in found:
        assert process[parallel].keys() == exact.keys()
        for name, gradient in process[parallel].items():
            terms = longest_sum([*batch(), *one.values()])
            assert_within_budget(2 * gradient, exact[name], one[name], name, terms=terms)


@pytest.mark.parametrize("parallel", WRAPPERS)
def test_micro_steps_are_accumulated(found: list[dict[str, Any]], parallel: str) -> None:
    """The GEMM adds to the gradients, the reducers find the sum, and copies of factors are new."""
    exact = both_accumulated()
    for process in found:
        # in each of two optimizer steps, all micro-steps but the first, for each of six factors
        assert process[f"{parallel} additions"] == 2 * (STEPS - 1) * 6
        assert process[parallel].keys() == exact.keys()
        for name, gradient in process[parallel].items():
            error = (gradient - exact[name]).norm() / exact[name].norm()
            assert error <= 1e-4, name


def test_shards_are_refused(found: list[dict[str, Any]]) -> None:
    for process in found:
        assert "parameters are shards (DTensor): FSDP2 gathers them" in process["refused"]
