"""Virtual tokens: whose they are; `test_distillation` has their losses."""

from __future__ import annotations

import torch
from torch import Tensor

from npt_fast.training.teacher_pass import Activations
from npt_fast.training.virtual_tokens import VirtualPlan


def seen(*counts: int, length: int) -> tuple[Activations, Tensor]:
    """Activations whose numbers say which token of which text they are, and weights."""
    numbers = 100.0 * torch.tensor(counts)[:, None] + torch.arange(length)
    weights = (torch.arange(length) < torch.tensor(counts)[:, None]).float()
    hidden = numbers[..., None].expand(-1, -1, 3)
    return Activations(hidden, -hidden, torch.zeros_like(hidden)), weights


def test_hosts_guests_and_factors() -> None:
    activations, weights = seen(10, length=10)
    found = VirtualPlan(weights, 4).tokens(activations)
    assert found.hidden[0, :, 0].tolist() == [1000, 1004, 1008]
    factors = found.attention[0, :, 0] / -torch.tensor([1005.0, 1009.0, 1003.0])
    expected = [6 ** (n * 0.6180339887 % 1) for n in range(3)]
    torch.testing.assert_close(factors, torch.tensor(expected))


def test_a_text_has_the_same_ones_in_every_batch() -> None:
    activations, weights = seen(9, 2, 1, 5, length=12)
    plan = VirtualPlan(weights, 2)
    together = plan.tokens(activations)
    assert plan.weights.sum(1).tolist() == [5, 1, 1, 3]
    for row, count in enumerate((9, 2, 1, 5)):
        own, whole = seen(count, length=count)
        alone = VirtualPlan(whole, 2).tokens(own)
        real = plan.weights[row] == 1
        for ours, theirs in zip(together, alone, strict=True):
            assert torch.equal(ours[row][real], theirs[0])


def test_factors_are_spread_from_1_to_6() -> None:
    activations, weights = seen(1000, length=1000)
    plan = VirtualPlan(weights, 1)
    guests = -(100_000 + (torch.arange(1000) + 500) % 1000)
    factors = plan.tokens(activations).attention[0, :, 0] / guests
    assert 1 <= factors.min() < 1.01 and 5.95 < factors.max() < 6
    # their logarithms are spread evenly
    assert (factors.log().mean() / torch.tensor(6.0).log() - 0.5).abs() < 0.01
