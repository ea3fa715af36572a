"""Each layer's gradients are clipped alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from npt_fast.training.clipping import clip_each


def layer(*gradients: float) -> nn.Module:
    part = nn.ParameterList(nn.Parameter(torch.zeros(2)) for _ in gradients)
    for parameter, value in zip(part, gradients, strict=True):
        parameter.grad = torch.tensor([value, 0.0])
    return part


def test_each_layer_alone() -> None:
    large, small = layer(30.0, 40.0), layer(0.3, 0.4)
    total = clip_each([large, small], 1.0)
    assert total.item() == pytest.approx(math.hypot(50, 0.5), rel=1e-6)
    for part, expected in ((large, (0.6, 0.8)), (small, (0.3, 0.4))):
        for parameter, value in zip(part.parameters(), expected, strict=True):
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, torch.tensor([value, 0.0]))
