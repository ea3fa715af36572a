"""SwiGLU, GeGLU and ReGLU, and their gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from npt_fast.kernels import reference
from npt_fast.kernels.swiglu import ACTIVATIONS, swiglu_bwd, swiglu_fwd, swiglu_fwd_into
from tests.kernels.cases import DTYPES, assert_like, dtypes, layouts, padded, unchanged
from tests.kernels.conftest import Normal

pytestmark = pytest.mark.ttsem

# one element; fewer columns than a program takes, so several rows; more than one program takes
sizes = pytest.mark.parametrize("size", [(1, 1), (37, 43), (63, 130), (3, 1100)], ids=str)


activations = pytest.mark.parametrize("activation", ACTIVATIONS)


def backward(
    d_inner: Tensor, gate: Tensor, up: Tensor, activation: str = "silu"
) -> tuple[Tensor, Tensor, Tensor]:
    """d_gate, d_up and inner, by autograd through the definition."""
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    inner = reference.swiglu(gate, up, activation)
    return *torch.autograd.grad(inner, (gate, up), d_inner), inner.detach()


@dtypes
@sizes
def test_forward(normal: Normal, dtype: torch.dtype, size: tuple[int, int]) -> None:
    gate, up = (normal(*size, dtype=dtype) for _ in range(2))
    with unchanged(gate, up):
        inner = swiglu_fwd(gate, up)
    assert_like(reference.swiglu, (gate, up), inner)


@dtypes
@sizes
def test_backward(normal: Normal, dtype: torch.dtype, size: tuple[int, int]) -> None:
    arguments = [normal(*size, dtype=dtype) for _ in range(3)]
    with unchanged(*arguments):
        found = swiglu_bwd(*arguments)
    assert_like(backward, arguments, found)


@dtypes
@activations
def test_activations(normal: Normal, dtype: torch.dtype, activation: str) -> None:
    d_inner, *inputs = (normal(37, 43, dtype=dtype) for _ in range(3))
    assert_like(reference.swiglu, (*inputs, activation), swiglu_fwd(*inputs, activation))
    found = swiglu_bwd(d_inner, *inputs, activation)
    assert_like(backward, (d_inner, *inputs, activation), found)


@layouts
def test_any_strides(normal: Normal, layout: Callable[[Tensor], Tensor]) -> None:
    arguments = [layout(normal(37, 43, dtype=DTYPES[0])) for _ in range(3)]
    dense = [t.contiguous() for t in arguments]
    assert torch.equal(swiglu_fwd(*arguments[1:]), swiglu_fwd(*dense[1:]))
    assert all(map(torch.equal, swiglu_bwd(*arguments), swiglu_bwd(*dense)))


@dtypes
@activations
def test_far_from_zero(device: str, dtype: torch.dtype, activation: str) -> None:
    """Inputs for which exp overflows, compared element by element: large ones hide others."""
    values = torch.tensor([-1e4, -200, -30, 0, 30, 200, 1e4], device=device, dtype=dtype)
    gate = values.unsqueeze(1)
    d_inner, up = torch.full_like(gate, 0.5), torch.full_like(gate, 2)
    found = swiglu_fwd(gate, up, activation), *swiglu_bwd(d_inner, gate, up, activation)
    for at in range(len(gate)):
        row = slice(at, at + 1)
        arguments = d_inner[row], gate[row], up[row], activation
        assert_like(reference.swiglu, arguments[1:], found[0][row])
        assert_like(backward, arguments, [t[row] for t in found[1:]])


@dtypes
def test_inner_may_take_the_place_of_gate(normal: Normal, dtype: torch.dtype) -> None:
    gate, up = (normal(37, 43, dtype=dtype) for _ in range(2))
    expected = swiglu_fwd(gate, up)
    with unchanged(up):
        swiglu_fwd_into(gate, up, gate)
    assert torch.equal(gate, expected)


def test_nothing_is_written_beside_the_output(normal: Normal) -> None:
    gate, up = (normal(9, 43, dtype=DTYPES[0]) for _ in range(2))
    inner = padded(torch.empty_like(gate))
    swiglu_fwd_into(gate, up, inner)
    assert torch.equal(inner, swiglu_fwd(gate, up))
    assert inner.as_strided((9, 48), inner.stride(), 0).isnan().sum() == 9 * 5


@pytest.mark.parametrize("size", [(0, 43), (5, 0)], ids=["no-tokens", "no-columns"])
def test_nothing_to_do(normal: Normal, size: tuple[int, int]) -> None:
    empty = normal(*size, dtype=DTYPES[0])
    assert swiglu_fwd(empty, empty).shape == size
    assert all(t.shape == size for t in swiglu_bwd(empty, empty, empty))
