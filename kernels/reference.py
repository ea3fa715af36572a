"""The definition of the modulated MLP, written to be read; tests compare everything with it.

It forms v_a and v_b for every token, which the other implementations avoid. It works in any dtype,
float64 included, and needs no Triton. Below it are the definitions of what single kernels compute,
under the kernels' names. Gradients come from autograd.

Shapes: ``T`` tokens, ``D`` model width, ``F`` MLP width, ``k`` components, ``r`` rank of each.

For a projection with base weight W, input ``a`` and attention output ``x`` (design.md#definition)::

    u   = x @ W_down[i]      bottleneck of component i
    v_a = u @ W_a_up[i]      the direction that the weight change reads
    v_b = u @ W_b_up[i]      the direction that it writes
    y   = W a + sum_i v_b (v_a . a)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from npt_fast.kernels.activations import ACTIVATIONS


class ProjectionFactors(NamedTuple):
    """Factors of one projection's weight change.

    Attributes:
        w_down: one W_down per component, ``(k, D, r)``.
        w_a_up: one W_a_up per component, ``(k, r, in)``.
        w_b_up: one W_b_up per component, ``(k, r, out)``.
    """

    w_down: Tensor
    w_a_up: Tensor
    w_b_up: Tensor


class Projection(NamedTuple):
    """One linear map of the MLP, and the factors of its weight change.

    Attributes:
        weight: base weight, ``(out, in)``.
        bias: base bias, ``(out,)``, or None.
        factors: factors of the weight change; None if the projection is not modulated.
    """

    weight: Tensor
    bias: Tensor | None = None
    factors: ProjectionFactors | None = None


def modulated_linear(a: Tensor, x: Tensor, projection: Projection) -> Tensor:
    """One modulated projection.

    Args:
        a: input of the projection, ``(T, in)``.
        x: attention output, ``(T, D)``.
        projection: base weight and factors.

    Returns:
        ``(T, out)``.
    """
    y = linear(a, projection.weight, projection.bias)
    if projection.factors is None:
        return y
    for w_down, w_a_up, w_b_up in zip(*projection.factors, strict=True):
        u = x @ w_down
        v_a = u @ w_a_up
        v_b = u @ w_b_up
        # k sums that each round: with 128 components in bfloat16 four times the factored form's
        # error (design.md#error-budgets)
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
        gate: projection from D to F.
        up: projection from D to F.
        down: projection from F to D.
        activation: elementwise function.

    Returns:
        ``(T, D)``.
    """
    inner = activation(modulated_linear(h, x, gate)) * modulated_linear(h, x, up)
    return modulated_linear(inner, x, down)


# What single kernels compute. As in `factored`, u is the bottleneck, s = v_a . a and z = s u.


def coefficients(u: Tensor, p: Tensor, num_ranks: int) -> tuple[Tensor, Tensor]:
    """Coefficients s, the scalar product of each component's bottleneck and probe, and z = s u.

    Args:
        u: bottlenecks ``x @ W_down``, ``(c, T, R)``.
        p: probes ``a @ W_a_up'``, ``(c, T, R)``.
        num_ranks: number of components k, of R / k columns each.

    Returns:
        s ``(c, T, k)``, in float32 at least, and z ``(c, T, R)`` in the dtype of `u`.
    """
    # as the kernels sum, but float64 stays float64 for the tests
    wide = torch.promote_types(u.dtype, torch.float32)
    u_parts, p_parts = (t.to(wide).unflatten(-1, (num_ranks, -1)) for t in (u, p))
    s = (u_parts * p_parts).sum(-1)
    z = s.unsqueeze(-1) * u_parts
    return s, z.flatten(-2).to(u.dtype)


def probe(a: Tensor, w_a: Tensor, u: Tensor, num_ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Probes ``p = a @ w_a'`` and the `coefficients` of them.

    Args:
        a: input of the projections, ``(T, in)``.
        w_a: W_a_up of the projections, ``(c * R, in)``.
        u: bottlenecks, ``(c, T, R)``.
        num_ranks: number of components k.

    Returns:
        s ``(c, T, k)``, z ``(c, T, R)``, p ``(T, c * R)``.
    """
    p = a @ w_a.t()
    s, z = coefficients(u, p.unflatten(1, (u.shape[0], -1)).transpose(0, 1), num_ranks)
    return s, z, p


def swiglu(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """``act(gate) * up``."""
    return ACTIVATIONS[activation][0](gate) * up


def modulated_gate_up(
    h: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    z: Tensor,
    w_b_gate: Tensor,
    w_b_up: Tensor | None = None,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    activation: str = "silu",
) -> tuple[Tensor, Tensor, Tensor]:
    """Modulated gate and up, and `swiglu` of them.

    Args:
        h: MLP input, ``(T, D)``.
        gate_weight: weight of gate, ``(F, D)``.
        up_weight: weight of up, ``(F, D)``.
        z: scaled bottlenecks of gate, or of gate and up, ``(c, T, R)``.
        w_b_gate: W_b_up of gate, ``(R, F)``.
        w_b_up: W_b_up of up, ``(R, F)``, or None if up is not modulated.
        gate_bias: bias of gate, ``(F,)``, or None.
        up_bias: bias of up, ``(F,)``, or None.
        activation: a name of `ACTIVATIONS`.

    Returns:
        inner, gate and up, each ``(T, F)``.
    """
    gate = linear(h, gate_weight, gate_bias) + z[0] @ w_b_gate
    up = linear(h, up_weight, up_bias)
    if w_b_up is not None:
        up = up + z[1] @ w_b_up
    return swiglu(gate, up, activation), gate, up
