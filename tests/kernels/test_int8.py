"""Rounding to int8, and matrices that functions of torch see as floats."""

from __future__ import annotations

import pytest
import torch

from npt_fast.kernels.int8 import Int8Matrix, quantize


@pytest.mark.parametrize("channels", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounding_is_to_the_nearest_of_255_multiples(channels: int, dtype: torch.dtype) -> None:
    w = torch.randn(7, 12, generator=torch.Generator().manual_seed(0)).to(dtype)
    values, scale = quantize(w, channels)
    wide = w.double()
    largest = wide.abs().amax(1 - channels, keepdim=True)
    assert values.abs().amax(1 - channels).eq(127).all()
    torch.testing.assert_close(scale.double(), largest / 127, rtol=1e-6, atol=0)
    assert ((values * scale.double() - wide).abs() <= largest / 127 * 0.5001).all()
    assert values.stride(1 - channels) == 1  # the numbers of a channel are neighbours


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 3e38])
def test_extreme_channels(size: float) -> None:
    w = torch.tensor([[1.0, size], [-0.5, -size / 2]])
    values, scale = quantize(w, 1)
    matrix = Int8Matrix(values, scale)
    assert matrix.dense().isfinite().all()
    assert (matrix.dense() - w)[:, 1].abs().max() <= max(size * 0.005, 2e-43)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_without_a_scale_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="cannot be rounded to int8"):
        quantize(torch.tensor([[1.0, bad]]), 1)


def test_every_function_gets_the_floats_rounded_once() -> None:
    w = torch.randn(8, 12, generator=torch.Generator().manual_seed(1))
    values, scale = quantize(w, 1)
    matrix = Int8Matrix(values, scale, torch.bfloat16)
    dense = (values * scale).bfloat16()
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(2)).bfloat16()
    assert torch.equal(matrix.dense(), dense)
    assert torch.equal(x @ matrix, x @ dense)
    assert torch.equal(
        torch.addmm(torch.ones(12).bfloat16(), x, matrix),
        torch.addmm(torch.ones(12).bfloat16(), x, dense),
    )
    assert torch.equal(x[:, :3] @ matrix.narrow(0, 2, 3), x[:, :3] @ dense[2:5])
    assert torch.equal(x @ matrix.narrow(1, 2, 3), x @ dense[:, 2:5])
    assert torch.equal(dense.t() @ dense, matrix.t().dense() @ dense)


def test_a_compiled_graph_has_it_whole() -> None:
    values, scale = quantize(torch.randn(8, 12, generator=torch.Generator().manual_seed(3)), 1)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(4))

    def products(x: torch.Tensor) -> torch.Tensor:
        matrix = Int8Matrix(values, scale)
        y = x @ matrix
        return torch.addmm(y, x, matrix)

    compiled = torch.compile(products, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), products(x))
