"""Activations and their backward, against transformers and autograd in float64."""

from __future__ import annotations

import pytest
import torch
from transformers.activations import ACT2FN

from npt_fast.kernels.activations import ACTIVATIONS

SAME = {"gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh"}


@pytest.mark.parametrize("name", [*ACTIVATIONS, *SAME])
def test_values_and_gradients(name: str) -> None:
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64).requires_grad_()
    act, backward = ACTIVATIONS[SAME.get(name, name)]
    expected = ACT2FN[name](x)
    torch.testing.assert_close(act(x), expected, rtol=1e-12, atol=1e-7 if name in SAME else 1e-14)
    grad = torch.cos(3 * x.detach())
    (wanted,) = torch.autograd.grad(act(x), x, grad)
    torch.testing.assert_close(backward(grad, x.detach()), wanted, rtol=1e-10, atol=1e-12)
