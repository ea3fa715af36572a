"""`decode` with int8 factors: numbers converted in registers, sums scaled once for a channel."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from npt_fast.kernels.factored import Factors
from npt_fast.kernels.int8 import Int8Matrix, quantize
from npt_fast.kernels.modulated_mlp import modulated_mlp
from npt_fast.testing import assert_within_budget, longest_sum
from tests.kernels.cases import Inputs, cast, dtypes, inputs_of, reference_mlp
from tests.kernels.test_decode import problems

pytestmark = pytest.mark.ttsem


def rounded(inputs: Inputs) -> tuple[Any, Inputs]:
    """int8 factors, and the same inputs with the float64 numbers that those stand for."""
    x, h, weights, factors = inputs
    int8, exact = [], []
    for name, w in zip(Factors._fields, factors[:-1], strict=False):
        if w is None:
            int8.append(None)
            exact.append(None)
            continue
        values, scale = quantize(w, 0 if name.startswith("w_a") else 1)
        int8.append(Int8Matrix(values, scale, h.dtype))
        exact.append(values.double() * scale.double())
    k = factors.num_ranks
    whole: Any = Factors._make([*int8, k])
    return whole, (x, h, weights, Factors._make([*exact, k]))


@dtypes
@problems
@pytest.mark.parametrize("path", ["decode", "gemm"])
def test_values(problem: Any, dtype: torch.dtype, path: Any) -> None:
    inputs = inputs_of(problem, dtype, requires_grad=False)
    x, h, weights, _ = inputs
    int8, exact = rounded(inputs)
    y = modulated_mlp(x, h, weights, int8, path=path)
    wide = cast(exact, torch.float64)
    assert_within_budget(
        y, reference_mlp(wide), reference_mlp(cast(exact, dtype)), terms=longest_sum(inputs)
    )


def test_the_layout_is_no_matter() -> None:
    from tests.kernels.test_decode import PROBLEMS

    inputs = inputs_of(PROBLEMS[1], torch.float32, requires_grad=False)
    x, h, weights, _ = inputs
    int8, _ = rounded(inputs)
    other = Factors._make(
        w if w is None or isinstance(w, int) else Int8Matrix(w.values.contiguous(), w.scale)
        for w in int8
    )
    found = (modulated_mlp(x, h, weights, f, path="decode") for f in (int8, other))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)
