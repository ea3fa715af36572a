"""DDP and FSDP2 with two processes give the gradients of one."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from npt_fast import modules
from npt_fast.functional import modulated_mlp
from npt_fast.modules import NPComponent
from npt_fast.testing import assert_within_budget, longest_sum

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
    try:  # outside its forward its parameters are shards
        sharded.np.forward(*tensors[:2], sharded.mlp)
    except ValueError as error:
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
    multiprocessing.set_forkserver_preload([__name__])  # so that both share what they import
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


def test_shards_are_refused(found: list[dict[str, Any]]) -> None:
    for process in found:
        assert "Triton kernels take whole tensors, not shards" in process["refused"]
