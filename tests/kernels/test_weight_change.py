"""The change of one projection against its definition, which forms v_a and v_b."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from npt_fast.functional import weight_change
from npt_fast.testing import assert_within_budget


def change_inputs(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    shapes = {"a": (2, 3, 12), "x": (2, 3, 8), "w_down": (8, 6), "w_a": (6, 12), "w_b": (6, 10)}
    generator = torch.Generator().manual_seed(4)
    return {
        name: torch.randn(*shape, generator=generator, dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
        for name, shape in shapes.items()
    }


def formed_change(t: dict[str, Tensor], k: int) -> Tensor:
    """The definition, with v_a and v_b formed."""
    z = (t["x"] @ t["w_down"]).unflatten(-1, (k, -1))
    v_a, v_b = (
        torch.einsum("bskr,krn->bskn", z, t[name].unflatten(0, (k, -1))) for name in ("w_a", "w_b")
    )
    return torch.einsum("bskn,bsn,bskm->bsm", v_a, t["a"], v_b)


@pytest.mark.parametrize("k", [1, 2, 6])
def test_the_definition(k: int) -> None:
    given = change_inputs()
    expected = formed_change(given, k)
    found = weight_change(**given, num_ranks=k)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    dy = torch.randn(
        expected.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64
    )
    for name, actual, right in zip(
        given,
        torch.autograd.grad(found, list(given.values()), dy),
        torch.autograd.grad(expected, list(given.values()), dy),
        strict=True,
    ):
        torch.testing.assert_close(actual, right, rtol=1e-11, atol=1e-11, msg=name)
    with torch.no_grad():
        assert torch.equal(weight_change(**given, num_ranks=k), found)


@pytest.mark.parametrize("wanted", ["a", "x", "w_down", "w_a", "w_b"])
def test_it_gives_only_gradients_that_are_needed(wanted: str) -> None:
    given = change_inputs()
    for name, tensor in given.items():
        tensor.requires_grad_(name == wanted)
    weight_change(**given, num_ranks=2).sum().backward()
    expected = torch.autograd.grad(formed_change(given, 2).sum(), given[wanted])[0]
    torch.testing.assert_close(given[wanted].grad, expected, rtol=1e-11, atol=1e-11)
    assert all(t.grad is None for name, t in given.items() if name != wanted)


def test_autocast_and_bfloat16() -> None:
    given = {name: t.detach() for name, t in change_inputs(torch.float32).items()}
    exact = formed_change({name: t.double() for name, t in given.items()}, 2)
    low = formed_change({name: t.bfloat16() for name, t in given.items()}, 2)
    with torch.autocast("cpu", torch.bfloat16):
        found = weight_change(**given, num_ranks=2)
    assert found.dtype == torch.bfloat16
    assert_within_budget(found, exact, low)
    given["a"] = given["a"].bfloat16()  # float32 factors of a bfloat16 model
    assert weight_change(**given, num_ranks=2).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": (2, 3, 7)}, r"x must be \(2, 3, 8\), got \(2, 3, 7\)"),
        ({"x": (6, 8)}, r"x must be \(2, 3, 8\), got \(6, 8\)"),
        ({"w_a": (6, 10)}, r"w_a must be \(6, 12\), got \(6, 10\)"),
        ({"w_b": (5, 10)}, r"w_b must be \(6, 10\), got \(5, 10\)"),
        ({"num_ranks": 4}, "num_ranks must divide the 6 columns of w_down, got 4"),
        ({"num_ranks": 0}, "num_ranks must divide the 6 columns of w_down, got 0"),
    ],
)
def test_arguments_are_checked(changes: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {**change_inputs(), "num_ranks": 2}
    for name, value in changes.items():
        given[name] = torch.zeros(value) if isinstance(value, tuple) else value
    with pytest.raises(ValueError, match=message):
        weight_change(**given)
