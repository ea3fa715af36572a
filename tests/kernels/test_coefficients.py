"""Coefficients s and scaled bottlenecks z, and their gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from npt_fast.kernels import reference
from npt_fast.kernels.coefficients import (
    coefficient_outputs,
    coefficients_bwd,
    coefficients_fwd,
    coefficients_fwd_into,
)
from tests.kernels.cases import (
    DTYPES,
    assert_like,
    constant,
    dtypes,
    expanded,
    joined,
    misaligned,
    padded,
    strided,
    transposed,
    unchanged,
)
from tests.kernels.conftest import Normal

pytestmark = pytest.mark.ttsem

# c, T, k, r: one element; ragged tiles; more components than a program takes; a rank above a tile
SIZES = [(1, 1, 1, 1), (2, 37, 3, 5), (3, 63, 2, 16), (1, 5, 70, 3), (1, 3, 1, 200), (2, 33, 1, 64)]
sizes = pytest.mark.parametrize("size", SIZES, ids=lambda size: "c{}-T{}-k{}-r{}".format(*size))


def backward(dz: Tensor, u: Tensor, p: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """du, dp ``(T, c R)`` and z, by autograd through the definition."""
    u, p = u.detach().requires_grad_(), p.detach().requires_grad_()
    _, z = reference.coefficients(u, p, k)
    du, dp = torch.autograd.grad(z, (u, p), dz)
    return du, dp.transpose(0, 1).flatten(1), z.detach()


def run_backward(dz: Tensor, u: Tensor, p: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    du = joined(torch.empty_like(u))
    with unchanged(dz, u, p, s):
        dp, z = coefficients_bwd(dz, u, p, s, du)
    return du, dp, z


@dtypes
@sizes
def test_forward(normal: Normal, dtype: torch.dtype, size: tuple[int, int, int, int]) -> None:
    c, tokens, k, rank = size
    u, p = (normal(c, tokens, k * rank, dtype=dtype) for _ in range(2))
    with unchanged(u, p):
        s, z = coefficients_fwd(u, p, k)
    assert s.dtype == torch.float32
    assert_like(reference.coefficients, (u, p, k), (s, z))


@dtypes
@sizes
def test_backward(normal: Normal, dtype: torch.dtype, size: tuple[int, int, int, int]) -> None:
    c, tokens, k, rank = size
    dz, u, p = (normal(c, tokens, k * rank, dtype=dtype) for _ in range(3))
    s, _ = reference.coefficients(u, p, k)
    assert_like(backward, (dz, u, p, k), run_backward(dz, u, p, s))


@pytest.mark.parametrize(
    "layout", [joined, padded, transposed, strided, misaligned, expanded, constant]
)
def test_any_strides(normal: Normal, layout: Callable[[Tensor], Tensor]) -> None:
    dz, u, p = (layout(normal(2, 9, 15, dtype=DTYPES[0])) for _ in range(3))
    s, z = coefficients_fwd(u, p, 3)
    assert_like(reference.coefficients, (u, p, 3), (s, z))
    assert_like(backward, (dz, u, p, 3), run_backward(dz, u, p, strided(s)))


def test_nothing_is_written_beside_the_outputs(normal: Normal) -> None:
    u, p = (normal(2, 9, 15, dtype=DTYPES[0]) for _ in range(2))
    s, z = (padded(out) for out in coefficient_outputs(u, 3, u.dtype))
    coefficients_fwd_into(u, p, s, z)
    assert_like(reference.coefficients, (u, p, 3), (s, z))
    for part, count in ((s, 3), (z, 15)):
        whole = part.as_strided((2, 9, count + 5), part.stride(), 0)
        assert whole.isnan().sum() == 2 * 9 * 5


@dtypes
def test_z_may_take_the_place_of_p(normal: Normal, dtype: torch.dtype) -> None:
    u, p = (normal(2, 37, 15, dtype=dtype) for _ in range(2))
    expected_s, expected_z = coefficients_fwd(u, p, 3)
    s, _ = coefficient_outputs(u, 3, dtype)
    coefficients_fwd_into(u, p, s, p)
    assert torch.equal(s, expected_s)
    assert torch.equal(p, expected_z)


def test_no_tokens(normal: Normal) -> None:
    empty = normal(2, 0, 15, dtype=DTYPES[0])
    s, z = coefficients_fwd(empty, empty, 3)
    assert s.shape == (2, 0, 3)
    assert z.shape == (2, 0, 15)
    dp, z = coefficients_bwd(empty, empty, empty, s, empty)
    assert dp.shape == (0, 30)
