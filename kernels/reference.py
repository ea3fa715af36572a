"""The definition of the modulated MLP, written to be read; the truth in every test.

Forms v_a and v_b for every token, which is what the other implementations avoid. Works in any
dtype, float64 included; no Triton.

Shapes: ``T`` tokens, ``D`` model width, ``F`` MLP width, ``k`` components, ``r`` rank of each.

For a projection with base weight W, input ``a`` and attention output ``x`` (SPEC 1.1, 1.2)::

    z   = x @ W_down[i]      bottleneck of component i
    v_a = z @ W_a_up[i]      what the weight change reads
    v_b = z @ W_b_up[i]      what it writes
    y   = W a + sum_i v_b (v_a . a)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import linear


class Modulation(NamedTuple):
    """Factors of one projection's weight change.

    Attributes:
        w_down: ``(k, D, r)``.
        w_a_up: ``(k, r, in)``.
        w_b_up: ``(k, r, out)``.
    """

    w_down: Tensor
    w_a_up: Tensor
    w_b_up: Tensor


class Projection(NamedTuple):
    """One linear map of the MLP, and how it is modulated.

    Attributes:
        weight: ``(out, in)``.
        bias: ``(out,)`` or None.
        modulation: None where the projection is not modulated.
    """

    weight: Tensor
    bias: Tensor | None = None
    modulation: Modulation | None = None


def modulated_linear(a: Tensor, x: Tensor, projection: Projection) -> Tensor:
    """One modulated projection.

    Args:
        a: input of the projection, ``(T, in)``.
        x: attention output, ``(T, D)``.
        projection: weights.

    Returns:
        ``(T, out)``.
    """
    y = linear(a, projection.weight, projection.bias)
    if projection.modulation is None:
        return y
    for w_down, w_a_up, w_b_up in zip(*projection.modulation, strict=True):
        z = x @ w_down
        v_a = z @ w_a_up
        v_b = z @ w_b_up
        y = y + v_b * (v_a * a).sum(-1, keepdim=True)
    return y


def modulated_mlp(
    x: Tensor,
    h: Tensor,
    gate: Projection,
    up: Projection,
    down: Projection,
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    """``down(activation(gate(h)) * up(h))`` with every projection modulated by `x`.

    Args:
        x: attention output, ``(T, D)``.
        h: MLP input, ``(T, D)``.
        gate: ``D -> F``.
        up: ``D -> F``.
        down: ``F -> D``.
        activation: elementwise.

    Returns:
        ``(T, D)``.
    """
    inner = activation(modulated_linear(h, x, gate)) * modulated_linear(h, x, up)
    return modulated_linear(inner, x, down)
