"""Activations of MLPs, their backward, and the gated activation in plain torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

# torch.nn.functional has no backward functions
aten = torch.ops.aten


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _quick_gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    s = torch.sigmoid(1.702 * x)
    return grad * (s + 1.702 * x * s * (1 - s))


ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (functional.silu, aten.silu_backward),
    "gelu": (functional.gelu, aten.gelu_backward),
    "gelu_pytorch_tanh": (
        lambda x: functional.gelu(x, approximate="tanh"),
        lambda grad, x: aten.gelu_backward(grad, x, approximate="tanh"),
    ),
    "quick_gelu": (_quick_gelu, _quick_gelu_backward),
    "relu": (functional.relu, lambda grad, x: aten.threshold_backward(grad, x, 0)),
    "relu2": (lambda x: functional.relu(x).square(), lambda grad, x: 2 * grad * functional.relu(x)),
}
"""Name -> the activation, and its backward as a function of ``(gradient, input)``."""


def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return ACTIVATIONS[activation][0](gate) * up


def gated_activation_backward(
    d_inner: Tensor, gate: Tensor, up: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    act, act_backward = ACTIVATIONS[activation]
    activated = act(gate)
    return act_backward(d_inner * up, gate), d_inner * activated, activated * up
