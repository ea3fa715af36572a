"""Sums of mean squares from Gram matrices: values, gradients, 16 bit, and FLOPs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from npt_fast.functional import modulated_mlp, sum_of_mean_squares
from npt_fast.kernels.factored import Factors
from npt_fast.testing import Problem, make_inputs
from tests.checkpoints import PROJECTIONS
from tests.kernels.float32_sums import float32_sums
from tests.test_vector_norms import formed_vectors, inputs_of


@pytest.fixture(params=[False, True], ids=["widened", "sums"])
def either_gemm(request: pytest.FixtureRequest) -> Iterator[None]:
    if not request.param:
        yield
        return
    with float32_sums():
        yield


def by_definition(x: Tensor, factors: Factors, weights: Tensor) -> Tensor:
    """From v_a and v_b themselves (design.md#losses)."""
    v_a, v_b = formed_vectors(x, factors)
    means = sum((v.square().mean((-1, -2)) for v in (*v_a, *v_b)), torch.zeros(()))
    return (means * weights).sum()


def leaves(factors: Factors) -> list[Tensor]:
    return [t for t in factors if isinstance(t, Tensor)]


@pytest.mark.parametrize("modulation", PROJECTIONS)
@pytest.mark.parametrize(("num_ranks", "rank"), [(1, 5), (3, 4), (2, 1)])
def test_values_and_gradients_in_float64(modulation: str, num_ranks: int, rank: int) -> None:
    x, factors = inputs_of(modulation, num_ranks=num_ranks, rank=rank)
    weights = torch.rand(7, dtype=torch.float64)
    wanted = [x, *leaves(factors)]
    found = sum_of_mean_squares(x @ factors.w_down, weights, factors)
    expected = by_definition(x, factors, weights)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    pairs = (torch.autograd.grad(value, wanted) for value in (found, expected))
    for ours, exact in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-12)


def test_gradcheck() -> None:
    problem = Problem(tokens=3, hidden=4, intermediate=5, num_ranks=2, rank=2)
    x, _, _, factors = make_inputs(problem)
    weights = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)

    def run(u: Tensor, *tensors: Tensor) -> Tensor:
        return sum_of_mean_squares(u, weights, Factors(factors.w_down, *tensors, factors.num_ranks))  # type: ignore[arg-type]

    u = (x @ factors.w_down).detach().requires_grad_()
    assert torch.autograd.gradcheck(run, (u, *leaves(factors)[1:]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1.0, 300.0], ids=["usual", "large"])
def test_16_bit(dtype: torch.dtype, size: float, either_gemm: None) -> None:
    """Squares of the large ones are beyond float16, whose end is 65,504."""
    x, _, _, factors = make_inputs(Problem(tokens=40, num_ranks=3, rank=6), dtype=torch.float32)
    factors = Factors._make(
        t.detach().to(dtype).float().requires_grad_() if isinstance(t, Tensor) else t
        for t in factors
    )
    u = (size * x @ factors.w_down).detach().to(dtype).requires_grad_()
    weights = torch.ones(40)
    found = sum_of_mean_squares(u, weights, factors)
    assert found.dtype == torch.float32
    exact_u = u.detach().double().requires_grad_()
    exact_factors = Factors._make(
        t.detach().double().requires_grad_() if isinstance(t, Tensor) else t for t in factors
    )
    exact = sum_of_mean_squares(exact_u, weights, exact_factors)
    # the Gram matrices of rounded numbers are summed in float32
    assert found.item() == pytest.approx(exact.item(), rel=1e-5)
    wanted = torch.autograd.grad(exact, [exact_u, *leaves(exact_factors)[1:]])
    ours = torch.autograd.grad(found, [u, *leaves(factors)[1:]])
    # one rounding of the Gram matrix, and one of the gradient of u
    for gradient, expected in zip(ours, wanted, strict=True):
        assert gradient.isfinite().all()
        error = (gradient.double() - expected).norm() / expected.norm()
        assert error <= 2 * torch.finfo(dtype).eps
    assert ours[0].dtype == dtype and ours[1].dtype == torch.float32


@pytest.mark.parametrize(
    "problem",
    [
        Problem(tokens=2048, hidden=2048, intermediate=8192, num_ranks=8, rank=512),
        Problem(tokens=2048, hidden=4096, intermediate=14336, num_ranks=8, rank=64),
    ],
    ids=["1B-R4096", "8B-R512"],
)
def test_flops_beside_the_layers(problem: Problem) -> None:
    """Forward and backward: at most 15 % of the layer's, which gives the bottlenecks."""
    x, h, weights, factors = make_inputs(problem, dtype=torch.float32, device="meta")
    x, h = (t.detach().bfloat16() for t in (x, h))
    frozen: list[Any] = [t.detach().bfloat16() for t in weights[:3]]

    def flops(regularised: bool) -> int:
        u: list[Tensor] = []
        with FlopCounterMode(display=False) as counter:
            y = modulated_mlp(x, h, *frozen, factors, bottleneck=u)
            loss = y.float().sum()
            if regularised:
                loss = loss + sum_of_mean_squares(
                    u[0], torch.ones(problem.tokens, device="meta"), factors
                )
            loss.backward()
        return counter.get_total_flops()

    layer, both = flops(False), flops(True)
    t, d, f = problem.tokens, problem.hidden, problem.intermediate
    k, r = problem.num_ranks, problem.rank
    # C and the Gram matrices of W_a and W_b are symmetric: three quarters; du, dWa and dWb whole
    assert both - layer == 1.75 * 2 * k * r * r * (3 * t + 3 * d + 3 * f)
    # the layer's own, which has no gradients of x and h here
    assert both - layer <= 0.15 * layer
