"""The definition of the modulated MLP, written to be read; the truth in every test.

Forms v_a and v_b for every token, which is what the other implementations avoid. Works in any
dtype, float64 included; no Triton. Behind it, under the names of the kernels, what each of them
computes; gradients are autograd's.

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

import torch
from torch import Tensor
from torch.nn.functional import linear, silu


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


# What single kernels compute, named as in `factored`: u is the bottleneck, s = v_a . a, z = s u.


def coefficients(u: Tensor, p: Tensor, num_ranks: int) -> tuple[Tensor, Tensor]:
    """What each component's bottleneck and probe say together.

    Args:
        u: bottlenecks ``x @ W_down``, ``(c, T, R)``.
        p: probes ``a @ W_a_up'``, ``(c, T, R)``.
        num_ranks: components k, of R / k columns each.

    Returns:
        s ``(c, T, k)``, in float32 at least, and z ``(c, T, R)`` in the dtype of `u`.
    """
    wide = torch.promote_types(u.dtype, torch.float32)
    u_parts, p_parts = (t.to(wide).unflatten(-1, (num_ranks, -1)) for t in (u, p))
    s = (u_parts * p_parts).sum(-1)
    z = s.unsqueeze(-1) * u_parts
    return s, z.flatten(-2).to(u.dtype)


def probe(a: Tensor, w_a: Tensor, u: Tensor, num_ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """`coefficients` from what the probes are made of.

    Args:
        a: what is probed, ``(T, in)``.
        w_a: ``(c * R, in)``.
        u: bottlenecks, ``(c, T, R)``.
        num_ranks: components k.

    Returns:
        s ``(c, T, k)``, z ``(c, T, R)``, p ``(T, c * R)``.
    """
    p = a @ w_a.t()
    s, z = coefficients(u, p.unflatten(1, (u.shape[0], -1)).transpose(0, 1), num_ranks)
    return s, z, p


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``."""
    return silu(gate) * up


def modulated_gate_up(
    h: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    z: Tensor,
    w_b_gate: Tensor,
    w_b_up: Tensor | None = None,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gate and up, modulated, and `swiglu` of them.

    Args:
        h: MLP input, ``(T, D)``.
        gate_weight: ``(F, D)``.
        up_weight: ``(F, D)``.
        z: of gate, or of gate and up, ``(c, T, R)``.
        w_b_gate: ``(R, F)``.
        w_b_up: ``(R, F)``, or None where up is not modulated.
        gate_bias: ``(F,)``.
        up_bias: ``(F,)``.

    Returns:
        inner, gate and up, each ``(T, F)``.
    """
    gate = linear(h, gate_weight, gate_bias) + z[0] @ w_b_gate
    up = linear(h, up_weight, up_bias)
    if w_b_up is not None:
        up = up + z[1] @ w_b_up
    return swiglu(gate, up), gate, up
