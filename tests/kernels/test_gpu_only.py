"""Tests that need a GPU: CUDA graphs, waits for the device, a second device."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from npt_fast.kernels.modulated_mlp import Path, modulated_mlp
from npt_fast.testing import Problem
from tests.kernels.cases import Inputs, inputs_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
PATHS: tuple[Path, ...] = ("decode", "gemm", "fused")


def inputs_for(path: Path) -> Inputs:
    """Few tokens for decode; otherwise a training step with all gradients."""
    tokens = 16 if path == "decode" else 130
    problem = Problem(tokens=tokens, hidden=128, intermediate=256, num_ranks=2, rank=64)
    return inputs_of(problem, torch.bfloat16, requires_grad=path != "decode")


def step(inputs: Inputs, path: Path) -> list[Tensor]:
    """Values, and gradients if there are any."""
    x, h, weights, factors = inputs
    y = modulated_mlp(x, h, weights, factors, path=path)
    named_tensors = [t for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.requires_grad]
    gradients = torch.autograd.grad(y, named_tensors, torch.ones_like(y)) if named_tensors else ()
    return [y.detach(), *gradients]


@pytest.mark.parametrize("path", PATHS)
def test_a_graph_replays_new_inputs(path: Path) -> None:
    inputs = inputs_for(path)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(inputs, path)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(inputs, path)
    with torch.no_grad():
        for tensor in inputs[:2]:
            tensor.copy_(tensor.flip(0))
    allocated = torch.cuda.memory_allocated()
    graph.replay()
    assert torch.cuda.memory_allocated() == allocated
    for replayed, expected in zip(found, step(inputs, path), strict=True):
        assert torch.equal(replayed, expected)


@pytest.mark.parametrize("path", PATHS)
def test_a_warm_call_neither_waits_nor_takes_new_memory(path: Path) -> None:
    run = partial(step, inputs_for(path), path)
    for _ in range(3):
        run()
    reserved = torch.cuda.memory_reserved()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_reserved() == reserved


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
@pytest.mark.parametrize("path", PATHS)
def test_a_device_that_is_not_the_current_one(path: Path) -> None:
    inputs = inputs_for(path)

    def moved(tensor: Tensor) -> Tensor:
        return tensor.detach().to("cuda:1").requires_grad_(tensor.requires_grad)

    other = tree_map_only(Tensor, moved, inputs)
    for found, expected in zip(step(other, path), step(inputs, path), strict=True):
        assert found.device == torch.device("cuda:1")
        torch.testing.assert_close(found.to("cuda:0"), expected)
