"""The modulated MLP of up to 64 tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from npt_fast.kernels import decode
from npt_fast.kernels.swiglu import ACTIVATIONS
from npt_fast.testing import Problem, assert_within_budget, longest_sum, named_tensors
from tests.kernels.cases import (
    DTYPES,
    Inputs,
    arranged,
    cast,
    constant,
    dtypes,
    expanded,
    inputs_of,
    misaligned,
    padded,
    reference_mlp,
    strided,
    transposed,
    unchanged,
)

pytestmark = pytest.mark.ttsem

PROBLEMS = [
    Problem(tokens=1, hidden=33, intermediate=43, num_ranks=1, rank=3),
    Problem(tokens=5, hidden=33, intermediate=43, num_ranks=3, rank=5, projections=1, bias=True),
    Problem(tokens=16, hidden=33, intermediate=43, num_ranks=8, rank=3, projections=2, bias=True),
    Problem(tokens=17, hidden=24, intermediate=600, num_ranks=1, rank=70, bias=True),
    Problem(tokens=64, hidden=70, intermediate=130, num_ranks=3, rank=16),
]
problems = pytest.mark.parametrize(
    "problem", PROBLEMS, ids=lambda p: f"T{p.tokens}-c{p.projections}-k{p.num_ranks}-r{p.rank}"
)


def run(inputs: Inputs, activation: str = "silu") -> Tensor:
    x, h, weights, factors = inputs
    return decode.decode_mlp(x, h, *weights, *factors, (), activation)


def make(problem: Problem, dtype: torch.dtype) -> Inputs:
    return inputs_of(problem, dtype, requires_grad=False)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of parts that each product was split into."""
    found: list[int] = []
    split = decode.split_k

    def noting(*arguments: Any) -> tuple[int, int]:
        count, chunk = split(*arguments)
        found.append(count)
        return count, chunk

    monkeypatch.setattr(decode, "split_k", noting)
    return found


@dtypes
@problems
def test_values(problem: Problem, dtype: torch.dtype) -> None:
    inputs = make(problem, dtype)
    with unchanged(*named_tensors(*inputs).values()):
        y = run(inputs)
    exact = reference_mlp(cast(inputs, torch.float64))
    assert_within_budget(y, exact, reference_mlp(inputs), terms=longest_sum(inputs))


@dtypes
@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_activations(dtype: torch.dtype, activation: str) -> None:
    inputs = make(PROBLEMS[2], dtype)
    exact, low = (reference_mlp(cast(inputs, d), activation) for d in (torch.float64, dtype))
    assert_within_budget(run(inputs, activation), exact, low, terms=longest_sum(inputs))


@dtypes
def test_products_in_parts(dtype: torch.dtype, parts: list[int]) -> None:
    """The sum of partial products is the same every time."""
    inputs = make(Problem(tokens=5, hidden=24, intermediate=300, num_ranks=2, rank=66), dtype)
    y = run(inputs)
    assert parts == [3, 2]  # of intermediate and of R
    exact = reference_mlp(cast(inputs, torch.float64))
    assert_within_budget(y, exact, reference_mlp(inputs), terms=longest_sum(inputs))
    assert torch.equal(run(inputs), y)


@dtypes
def test_a_token_does_not_depend_on_others(dtype: torch.dtype) -> None:
    x, h, *weights = make(PROBLEMS[2], dtype)
    assert torch.equal(run((x[:5], h[:5], *weights)), run((x, h, *weights))[:5])


def test_parts_cover_k() -> None:
    """The parts cover K, and each is a multiple of every tile's k."""
    for columns in (1, 64, 5000, 10**6):
        for depth in (1, 63, 64, 257, 4096, 14336, 10**5):
            count, chunk = decode.split_k(columns, depth)
            assert (count - 1) * chunk < depth <= count * chunk
            assert chunk % decode._CHUNK_MULTIPLE == 0 and 1 <= count <= 16


@pytest.mark.parametrize("layout", [padded, transposed, strided, misaligned, expanded, constant])
def test_any_strides(layout: Callable[[Tensor], Tensor]) -> None:
    """Every operand is there, and each has more than one tile in some direction."""
    problem = Problem(tokens=5, hidden=33, intermediate=43, num_ranks=2, rank=3, bias=True)
    inputs = arranged(make(problem, DTYPES[0]), layout)
    assert torch.equal(run(inputs), run(cast(inputs, DTYPES[0])))  # a cast copies to whole rows


def test_no_tokens() -> None:
    assert run(make(Problem(tokens=0), DTYPES[0])).shape == (0, 24)
