"""Bytes that backward needs, counted, equal the formula (design.md#saved-activations)."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from npt_fast.benchmarks.bench_modulation import saved_bytes, training_inputs
from npt_fast.benchmarks.saved_bytes import FACTORED, FORMS, REFERENCE, Form, formula_bytes
from npt_fast.testing import Problem

PROBLEMS = [
    Problem(tokens=5, hidden=24, intermediate=40, num_ranks=k, rank=r)
    for k, r in ((1, 1), (1, 16), (8, 5), (32, 2))
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: f"k{p.num_ranks}-r{p.rank}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_saved_bytes_equal_the_formula(problem: Problem, dtype: torch.dtype, form: Form) -> None:
    inputs = training_inputs(problem, dtype)
    assert saved_bytes(inputs, form) == formula_bytes(problem, form, dtype)


_1b = partial(Problem, hidden=2048, intermediate=8192)
_8b = partial(Problem, hidden=4096, intermediate=14336)


@pytest.mark.parametrize(
    ("problem", "saved", "recomputed"),
    [
        pytest.param(_1b(tokens=8192, num_ranks=8, rank=512), 739, 538, id="1B-R4096"),
        pytest.param(_8b(tokens=8192, num_ranks=8, rank=64), 655, 630, id="8B-R512"),
        pytest.param(_8b(tokens=2048, num_ranks=128, rank=64), 355, 255, id="8B-R8192"),
    ],
)
def test_the_formula_gives_the_table_of_the_design(
    problem: Problem, saved: int, recomputed: int
) -> None:
    """Megabytes per layer in bfloat16."""
    for form, megabytes in zip(FORMS, (saved, recomputed), strict=False):
        assert formula_bytes(problem, form, torch.bfloat16) / 1e6 == pytest.approx(megabytes, abs=1)


def test_the_reference_keeps_v_and_the_factored_form_does_not() -> None:
    """Ten times the components with a tenth of the rank: equal factors, ten times v_a and v_b."""
    few, many = (
        Problem(tokens=5, hidden=64, intermediate=96, num_ranks=k, rank=r)
        for k, r in ((2, 20), (20, 2))
    )
    few_inputs, many_inputs = (training_inputs(p, torch.float32) for p in (few, many))
    v = 5 * 3 * (64 + 96 + 1) * 4  # v_a, v_b and the coefficient of one component
    coefficients = 5 * 3 * 4
    assert saved_bytes(many_inputs, REFERENCE) - saved_bytes(few_inputs, REFERENCE) == 18 * v
    grown = saved_bytes(many_inputs, FACTORED) - saved_bytes(few_inputs, FACTORED)
    assert grown == 18 * coefficients
