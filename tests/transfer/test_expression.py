"""Expressions that users type."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from npt_fast.errors import TransferError
from npt_fast.transfer.expression import evaluate
from npt_fast.transfer.modulation import Modulation
from npt_fast.transfer.session import Session


def dense(modulation: Modulation) -> dict[tuple[int, str], Tensor]:
    """dW by layer and projection, float64."""
    return {
        (layer, name): terms.v_b.double().t() @ terms.v_a.double()
        for layer, name, terms in modulation.walk()
    }


@pytest.mark.parametrize(
    ("text", "truth"),
    [
        ("a", lambda a, b: a),
        ("0.7*a - b", lambda a, b: 0.7 * a - b),
        ("-(a - 2*b) * 3", lambda a, b: -3 * a + 6 * b),
        ("mean(a, b, +a)", lambda a, b: (2 * a + b) / 3),
        ("(1 - 0.25) * mean(a, b) + 1e-1*b", lambda a, b: 0.375 * a + 0.475 * b),
    ],
)
def test_calculated_exactly(
    two: Session, text: str, truth: Callable[[Tensor, Tensor], Tensor]
) -> None:
    names = {name: two.modulation(name).to("cpu", torch.float64) for name in ("a", "b")}
    found = dense(evaluate(text, names.__getitem__))
    a, b = dense(names["a"]), dense(names["b"])
    for key, value in found.items():
        torch.testing.assert_close(value, truth(a[key], b[key]), rtol=1e-12, atol=1e-12)
    assert two.calculate("c", f" {text} ").layers.keys() == {1, 2}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a + c", "no modulation is called 'c'"),
        ("a +", "cannot be read"),
        ("", "cannot be read"),
        ("a + 1", "a number cannot be added"),
        ("a * b", "not by each other"),
        ("a / 2", "only names, numbers"),
        ("a ** 2", "only names, numbers"),
        ("2 * 3", "is a number"),
        ("True * a", "only names, numbers"),
        ("1j * a", "only names, numbers"),
        ("1e999 * a", "cannot be multiplied by inf"),
        ("mean()", "only names, numbers"),
        ("mean(a, 2)", "not numbers"),
        ("mean(*a)", "only names, numbers"),
        ("max(a, b)", "only names, numbers"),
        ("a.layers", "only names, numbers"),
        ("a[0]", "only names, numbers"),
        ("__import__('os').system('x')", "only names, numbers"),
        ("(lambda: a)()", "only names, numbers"),
        ("(b := a)", "only names, numbers"),
        ("a; b", "cannot be read"),
        ("a\0", "cannot be read"),
        ("(" * 300 + "a" + ")" * 300, "cannot be read"),
        ("-" * 2000 + "a", "too long"),
    ],
)
def test_what_is_no_expression(two: Session, text: str, problem: str) -> None:
    with pytest.raises(TransferError, match=problem):
        two.calculate("new", text)
    assert "new" not in two.state.shelf
