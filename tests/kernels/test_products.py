"""Sums of products stay in place, also in what Inductor makes of them."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from npt_fast.kernels import factored
from npt_fast.kernels import modulated_mlp as triton
from npt_fast.testing import Problem, make_inputs
from tests.kernels.cases import DEVICE

PROBLEM = Problem(tokens=96, hidden=64, intermediate=160, num_ranks=2, rank=16)
ALLOCATED = re.compile(r"(\w+) = empty_strided\w*\(\((\d+), (\d+)\)")


def buffers(source: str) -> int:
    """(T, F) buffers that generated code allocates; reused ones are not allocated again."""
    shape = (str(PROBLEM.tokens), str(PROBLEM.intermediate))
    return sum(found[1:] == shape for found in ALLOCATED.findall(source))


@pytest.mark.parametrize(
    ("steps", "count"),
    [
        # gate, up and inner; in backward d_inner and inner, and two lie over what is done with
        pytest.param(factored.TORCH_STEPS, (3, 2), id="torch"),
        # gate and up; d_inner: the others are what our operations return
        pytest.param(triton.GEMM_STEPS, (2, 1), id="gemm"),
    ],
)
def test_inductor_adds_in_place(steps: factored.Steps, count: tuple[int, int]) -> None:
    """No product that is added to another one gets a buffer of its own."""
    from torch._inductor.utils import run_and_get_code

    torch.compiler.reset()
    x, h, weights, factors = make_inputs(PROBLEM, dtype=torch.float32, device=DEVICE)
    frozen = factored.MLPWeights._make(None if t is None else t.detach() for t in weights)

    def step(x: Tensor, h: Tensor, *tensors: Tensor) -> Tensor:
        given = factored.Factors(*tensors, factors.num_ranks)  # type: ignore[arg-type]
        return factored.modulated_mlp(x, h, frozen, given, steps=steps)

    leaves = (x, h, *factors[:-1])

    def both() -> list[Tensor]:
        y = torch.compile(step, fullgraph=True)(*leaves)
        return [y, *torch.autograd.grad(y.sum(), leaves)]

    found, sources = run_and_get_code(both)
    y = step(*leaves)
    for ours, expected in zip(found, [y, *torch.autograd.grad(y.sum(), leaves)], strict=True):
        assert (ours - expected).norm() <= 1e-4 * expected.norm()
    forward, backward = sources
    for source in sources:
        assert "add_product" in source
        assert "extern_kernels.addmm(" not in source  # adds into another buffer
    assert (buffers(forward), buffers(backward)) == count
