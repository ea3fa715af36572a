"""Sums of products in one accumulator, and gate and up with an activation behind them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from npt_fast.kernels import reference
from npt_fast.kernels._launch import Tiles
from npt_fast.kernels._tuning import forced_tiles, nth_candidate
from npt_fast.kernels.modulated_linear import modulated_gate_up, modulated_linear
from npt_fast.kernels.swiglu import ACTIVATIONS
from tests.kernels.cases import (
    DTYPES,
    assert_like,
    dtypes,
    layouts,
    padded,
    spread,
    tiles_of_the_rule,
    unchanged,
)
from tests.kernels.conftest import Normal

pytestmark = pytest.mark.ttsem

SMALL = Tiles(16, 16, 16, 4, 2)


def sum_of_products(a: list[Tensor], b: list[Tensor], bias: Tensor | None) -> Tensor:
    products = [left @ right for left, right in zip(a, b, strict=True)]
    return sum(products[1:], products[0]) + (0 if bias is None else bias)


@dtypes
@pytest.mark.parametrize(
    ("size", "depths", "has_bias"),
    [
        pytest.param((1, 35), (1,), False, id="one-token"),
        pytest.param((37, 1), (33, 6), True, id="one-column"),
        pytest.param((37, 35), (33, 6), False, id="two"),
        pytest.param((63, 17), (20, 17, 3), True, id="three-and-bias"),
    ],
)
def test_sums(
    normal: Normal,
    dtype: torch.dtype,
    size: tuple[int, int],
    depths: tuple[int, ...],
    has_bias: bool,
) -> None:
    tokens, width = size
    a = [normal(tokens, depth, dtype=dtype) for depth in depths]
    b = [normal(depth, width, dtype=dtype, fan_in=depth) for depth in depths]
    bias = normal(width, dtype=dtype) if has_bias else None
    with forced_tiles(SMALL), unchanged(*a, *b):
        y = modulated_linear(a, b, bias)
    assert_like(sum_of_products, (a, b, bias), y)


@dtypes
def test_a_modulated_projection(normal: Normal, dtype: torch.dtype) -> None:
    """One more product in the accumulator gives W a + sum_i v_b (v_a . a)."""
    tokens, inputs, outputs, hidden, k, rank = 37, 40, 35, 24, 3, 5
    a, x = normal(tokens, inputs, dtype=dtype), normal(tokens, hidden, dtype=dtype)
    weight, bias = normal(outputs, inputs, dtype=dtype, fan_in=inputs), normal(outputs, dtype=dtype)
    w_down = normal(k, hidden, rank, dtype=dtype, fan_in=hidden)
    w_a = normal(k, rank, inputs, dtype=dtype, fan_in=inputs)
    w_b = normal(k, rank, outputs, dtype=dtype, fan_in=rank)

    def definition(a: Tensor, x: Tensor, *weights: Tensor) -> Tensor:
        weight, bias, *factors = weights
        projection = reference.Projection(weight, bias, reference.ProjectionFactors(*factors))
        return reference.modulated_linear(a, x, projection)

    u = (x @ w_down.movedim(0, 1).flatten(1)).unsqueeze(0)
    _, z, _ = reference.probe(a, w_a.flatten(0, 1), u, k)
    y = modulated_linear([a, z[0]], [weight.t(), w_b.flatten(0, 1)], bias)
    assert_like(definition, (a, x, weight, bias, w_down, w_a, w_b), y)


@layouts
def test_any_strides(normal: Normal, layout: Callable[[Tensor], Tensor]) -> None:
    a = [layout(normal(21, depth, dtype=DTYPES[0])) for depth in (33, 6)]
    b = [layout(normal(depth, 19, dtype=DTYPES[0], fan_in=depth)) for depth in (33, 6)]
    bias = normal(19, dtype=DTYPES[0])
    with forced_tiles(SMALL):
        y = modulated_linear(a, b, spread(bias))
        expected = modulated_linear(
            *([t.contiguous() for t in operands] for operands in (a, b)), bias
        )
        assert torch.equal(y, expected)
        number = bias[:1].expand(19)  # one number for all columns, with stride 0
        assert torch.equal(
            modulated_linear(a, b, number), modulated_linear(a, b, number.contiguous())
        )


@tiles_of_the_rule
def test_tiles_of_the_rule(normal: Normal, dtype: torch.dtype, tokens: int, number: int) -> None:
    a = [normal(tokens, depth, dtype=dtype) for depth in (72, 8)]
    b = [normal(depth, 136, dtype=dtype, fan_in=depth) for depth in (72, 8)]
    with nth_candidate(number):
        y = modulated_linear(a, b, None)
    assert_like(sum_of_products, (a, b, None), y)


@pytest.mark.parametrize("size", [(0, 5), (5, 0)], ids=["no-tokens", "no-columns"])
def test_nothing_to_do(normal: Normal, size: tuple[int, int]) -> None:
    tokens, width = size
    y = modulated_linear(
        [normal(tokens, 3, dtype=DTYPES[0])], [normal(3, width, dtype=DTYPES[0])], None
    )
    assert y.shape == size


def gate_up_arguments(
    normal: Normal,
    dtype: torch.dtype,
    size: tuple[int, int] = (37, 35),
    *,
    rank: int = 15,
    projections: int = 2,
    bias: bool = False,
    layout: Callable[[Tensor], Tensor] = Tensor.contiguous,
) -> list[Tensor | None]:
    """Arguments of `modulated_gate_up` except `save`, in `layout`; rows of z are contiguous."""
    (tokens, width), hidden = size, 40
    arguments: list[Tensor | None] = [layout(normal(tokens, hidden, dtype=dtype))]
    arguments += (layout(normal(width, hidden, dtype=dtype, fan_in=hidden)) for _ in range(2))
    arguments.append(padded(normal(projections, tokens, rank, dtype=dtype)))
    heads = (layout(normal(rank, width, dtype=dtype, fan_in=rank)) for _ in range(projections))
    arguments += [*heads, None][:2]
    return arguments + [normal(width, dtype=dtype) if bias else None for _ in range(2)]


@dtypes
@pytest.mark.parametrize(
    ("size", "projections", "bias"),
    [
        pytest.param((1, 35), 2, False, id="one-token"),
        pytest.param((37, 1), 2, True, id="one-column"),
        pytest.param((37, 35), 1, True, id="gate-and-bias"),
        pytest.param((63, 17), 2, True, id="gate-and-up-and-bias"),
    ],
)
def test_gate_up(
    normal: Normal, dtype: torch.dtype, size: tuple[int, int], projections: int, bias: bool
) -> None:
    arguments = gate_up_arguments(normal, dtype, size, projections=projections, bias=bias)
    with forced_tiles(SMALL), unchanged(*(t for t in arguments if t is not None)):
        found = modulated_gate_up(*arguments, True)
    assert_like(reference.modulated_gate_up, arguments, found)


@dtypes
@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_gate_up_activations(normal: Normal, dtype: torch.dtype, activation: str) -> None:
    arguments = gate_up_arguments(normal, dtype, bias=True)
    with forced_tiles(SMALL):
        found = modulated_gate_up(*arguments, True, activation)
    assert_like(reference.modulated_gate_up, (*arguments, activation), found)


def test_gate_and_up_need_not_be_written(normal: Normal) -> None:
    arguments = gate_up_arguments(normal, DTYPES[0])
    (inner,) = modulated_gate_up(*arguments, False)
    assert torch.equal(inner, modulated_gate_up(*arguments, True)[0])


@layouts
def test_gate_up_of_any_strides(normal: Normal, layout: Callable[[Tensor], Tensor]) -> None:
    arguments = gate_up_arguments(normal, DTYPES[0], layout=layout)
    dense = [t if t is None else t.contiguous() for t in arguments]
    with forced_tiles(SMALL):
        found, expected = (modulated_gate_up(*a, True) for a in (arguments, dense))
    assert all(map(torch.equal, found, expected))


@tiles_of_the_rule
def test_gate_up_tiles_of_the_rule(
    normal: Normal, dtype: torch.dtype, tokens: int, number: int
) -> None:
    arguments = gate_up_arguments(normal, dtype, (tokens, 136), rank=16)
    with nth_candidate(number):
        found = modulated_gate_up(*arguments, True)
    assert_like(reference.modulated_gate_up, arguments, found)


def test_gate_up_without_tokens(normal: Normal) -> None:
    arguments = gate_up_arguments(normal, DTYPES[0], (0, 35))
    assert [t.shape for t in modulated_gate_up(*arguments, True)] == [(0, 35)] * 3
