"""Tensor parallelism: a sharded MLP's outputs and gradients are those of the whole one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from npt_fast.modules import NPComponent
from tests.forked import forkserver

D, F, PROCESSES = 16, 24, 2


class MLP(nn.Module):
    """A base MLP like Llama's."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(D, F)
        self.up_proj = nn.Linear(D, F)
        self.down_proj = nn.Linear(F, D)


def run(part: NPComponent, mlp: MLP) -> list[Tensor]:
    """The output, and the gradients of the inputs and the component."""
    generator = torch.Generator().manual_seed(3)
    attention, h = torch.randn(2, 2, 5, D, generator=generator, dtype=torch.float64)
    attention, h = attention.requires_grad_(), h.requires_grad_()
    y = part(attention, h, mlp)
    wanted = [attention, h, *part.parameters()]
    return [y.detach(), *torch.autograd.grad(y.square().sum(), wanted)]


def work(rank: int, store: str, modulation: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES)
    torch.manual_seed(0)
    part = NPComponent(D, F, rank=3, num_ranks=2, modulation=modulation).double()
    for parameter in part.parameters():
        nn.init.normal_(parameter, std=0.3)
    mlp = MLP().double()
    expected = run(part, mlp)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    columns: Any = ColwiseParallel()
    plan = {"gate_proj": columns, "up_proj": columns, "down_proj": RowwiseParallel()}
    found = run(part, parallelize_module(mlp, mesh, plan))  # type: ignore[arg-type]
    for actual, right in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-10, atol=1e-10)
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("modulation", ["single", "triple"])
def test_outputs_and_gradients_are_those_of_the_whole(modulation: str, tmp_path: Path) -> None:
    forkserver()
    arguments = (str(tmp_path / "store"), modulation)
    mp.start_processes(work, arguments, nprocs=PROCESSES, start_method="forkserver")
