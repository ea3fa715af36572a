"""Probes and coefficients in one kernel."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from npt_fast.kernels import reference
from npt_fast.kernels._launch import Tiles
from npt_fast.kernels._tuning import forced_tiles, nth_candidate
from npt_fast.kernels.probe import MAX_RANK, probe
from tests.kernels.cases import (
    DTYPES,
    assert_like,
    dtypes,
    joined,
    layouts,
    padded,
    tiles_of_the_rule,
    unchanged,
)
from tests.kernels.conftest import Normal

pytestmark = pytest.mark.ttsem

SMALL = Tiles(16, 32, 16, 4, 2)


def arguments_of(
    normal: Normal, dtype: torch.dtype, c: int, tokens: int, k: int, rank: int, depth: int = 35
) -> list[Tensor]:
    """a, w_a and u with the MLP's layout."""
    return [
        normal(tokens, depth, dtype=dtype),
        normal(c * k * rank, depth, dtype=dtype, fan_in=depth),
        joined(normal(c, tokens, k * rank, dtype=dtype)),
    ]


@dtypes
@pytest.mark.parametrize(
    "size",
    # one element; ranks padded to powers of two, tiles with no component left in them; one
    # component wider than a tile
    [
        (1, 1, 1, 1),
        (2, 37, 3, 3),
        (2, 63, 5, 6),
        (1, 37, 8, 16),
        (2, 5, 1, 64),
        (1, 5, 2, MAX_RANK),
    ],
    ids=lambda size: "c{}-T{}-k{}-r{}".format(*size),
)
def test_forward(normal: Normal, dtype: torch.dtype, size: tuple[int, int, int, int]) -> None:
    arguments = arguments_of(normal, dtype, *size)
    with forced_tiles(SMALL), unchanged(*arguments):
        found = probe(*arguments, size[2], True)
    assert found[0].dtype == torch.float32
    assert_like(reference.probe, (*arguments, size[2]), found)


def test_p_need_not_be_written(normal: Normal) -> None:
    arguments = arguments_of(normal, DTYPES[0], 2, 37, 3, 5)
    s, z, _ = probe(*arguments, 3, True)
    without_p = probe(*arguments, 3, False)
    assert len(without_p) == 2
    assert all(map(torch.equal, without_p, (s, z)))


@layouts
def test_any_strides(normal: Normal, layout: Callable[[Tensor], Tensor]) -> None:
    a, w_a, u = arguments_of(normal, DTYPES[0], 2, 21, 3, 5)
    a, w_a, u = layout(a), layout(w_a), padded(u)
    with forced_tiles(SMALL):
        found = probe(a, w_a, u, 3, True)
        expected = probe(a.contiguous(), w_a.contiguous(), u.contiguous(), 3, True)
    assert all(map(torch.equal, found, expected))


@tiles_of_the_rule
def test_tiles_of_the_rule(normal: Normal, dtype: torch.dtype, tokens: int, number: int) -> None:
    arguments = arguments_of(normal, dtype, 2, tokens, 5, 24, depth=72)
    with nth_candidate(number):
        found = probe(*arguments, 5, True)
    assert_like(reference.probe, (*arguments, 5), found)


def test_no_tokens(normal: Normal) -> None:
    s, z, p = probe(*arguments_of(normal, DTYPES[0], 2, 0, 3, 5), 3, True)
    assert (s.shape, z.shape, p.shape) == ((2, 0, 3), (2, 0, 15), (0, 30))
