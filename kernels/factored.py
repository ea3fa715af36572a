"""The modulated MLP without v_a and v_b: the same algebra in plain torch, backward by hand.

``T`` tokens, ``D`` model width, ``F`` MLP width, ``k`` components of rank ``r``, ``R = k * r``,
``c`` modulated projections (1 gate; 2 gate and up; 3 gate, up and down). Per projection with input
``a`` and attention output ``x`` (DESIGN 1, KERNELS 2.1)::

    u = x @ W_down        (T, R)   bottleneck; one GEMM for all projections
    p = a @ W_a_up'       (T, R)   probe; one GEMM for gate and up
    s = sum_r u p         (T, k)   coefficient v_a . a, accumulated in float32
    z = s u               (T, R)
    y = a @ W' + z @ W_b_up

backward, from dy::

    dz = dy @ W_b_up'     dW_b_up = z' dy
    ds = sum_r dz u       du = s dz + ds p        dp = ds u
    dW_a_up = dp' a       da = dy @ W + dp @ W_a_up
    dW_down = x' du       dx = du @ W_down'

GEMMs are torch's; everything in between is elementwise over ``(T, R)`` and ``(T, F)``. Saved for
backward: x, h, u, p, s, and gate and up before the activation; z and their product are recomputed,
and p too with ``save_probe=False`` (2 R (2 D + F) more FLOPs per token).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

aten = torch.ops.aten

ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (functional.silu, aten.silu_backward),
    "gelu": (functional.gelu, aten.gelu_backward),
    "gelu_pytorch_tanh": (
        lambda x: functional.gelu(x, approximate="tanh"),
        lambda grad, x: aten.gelu_backward(grad, x, approximate="tanh"),
    ),
    "relu": (functional.relu, lambda grad, x: aten.threshold_backward(grad, x, 0)),
}
"""Activation by name, and its backward from (grad, x)."""


class Modulation(NamedTuple):
    """Factors of all projections' weight changes, joined so that GEMMs need no copies.

    Attributes:
        w_down: ``(D, c * R)``; columns by projection, component, rank.
        w_a_in: ``(R, D)`` for gate, or ``(2 * R, D)`` for gate and up.
        w_a_mid: ``(R, F)`` for down, or None.
        w_b_gate: ``(R, F)``.
        w_b_up: ``(R, F)``, or None.
        w_b_down: ``(R, D)``, or None.
        num_ranks: k.
    """

    w_down: Tensor
    w_a_in: Tensor
    w_a_mid: Tensor | None
    w_b_gate: Tensor
    w_b_up: Tensor | None
    w_b_down: Tensor | None
    num_ranks: int


class Base(NamedTuple):
    """The MLP's own weights.

    Attributes:
        gate: ``(F, D)``.
        up: ``(F, D)``.
        down: ``(D, F)``.
        gate_bias: ``(F,)``, or None.
        up_bias: ``(F,)``, or None.
        down_bias: ``(D,)``, or None.
    """

    gate: Tensor
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None


def modulated_mlp(
    x: Tensor,
    h: Tensor,
    base: Base,
    modulation: Modulation,
    *,
    activation: str = "silu",
    save_probe: bool = True,
) -> Tensor:
    """The modulated MLP; all tensors of one dtype and device.

    Args:
        x: attention output, ``(T, D)``.
        h: MLP input, ``(T, D)``.
        base: the MLP's weights; gradients for those that require them.
        modulation: factors of the weight changes.
        activation: one of `ACTIVATIONS`.
        save_probe: keep the probes for backward instead of computing them again.

    Returns:
        ``(T, D)``.
    """
    *factors, num_ranks = modulation
    result: Tensor = ModulatedMLPFunction.apply(  # type: ignore[no-untyped-call]
        x, h, *base, *factors, num_ranks, activation, save_probe
    )
    return result


class ModulatedMLPFunction(torch.autograd.Function):
    """Saves and restores; the algebra is in `_forward` and `_backward`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, h: Tensor, *arguments: Any) -> Tensor:
        *tensors, num_ranks, activation, save_probe = arguments
        base, modulation = Base._make(tensors[:6]), Modulation._make([*tensors[6:], num_ranks])
        with torch.autocast(x.device.type, enabled=False):
            y, saved = _forward(x, h, base, modulation, activation)
        if not save_probe:
            saved = saved._replace(p_in=None, p_mid=None)
        ctx.save_for_backward(x, h, *tensors, *saved)
        ctx.num_ranks, ctx.activation = num_ranks, activation
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, h, *rest = ctx.saved_tensors
        base, saved = Base._make(rest[:6]), _Saved._make(rest[12:])
        modulation = Modulation._make([*rest[6:12], ctx.num_ranks])
        with torch.autocast(x.device.type, enabled=False):
            gradients = _backward(
                grad, x, h, base, modulation, saved, ctx.activation, ctx.needs_input_grad
            )
        return (*gradients, None, None, None)


class _Saved(NamedTuple):
    """What backward needs beside the inputs: u ``(T, c R)``, p, s ``(T, c k)``, gate, up."""

    u: Tensor
    p_in: Tensor | None
    p_mid: Tensor | None
    s: Tensor
    gate: Tensor
    up: Tensor


def _coefficients(u: Tensor, p: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """s ``(T, k)`` in at least float32, and z ``(T, R)`` in u's dtype."""
    wide = torch.promote_types(u.dtype, torch.float32)
    u, p = u.unflatten(1, (k, -1)), p.unflatten(1, (k, -1))
    s = (u.to(wide) * p.to(wide)).sum(-1)
    return s, _scaled(u.flatten(1), s)


def _scaled(u: Tensor, s: Tensor) -> Tensor:
    z: Tensor = (u.unflatten(1, (s.shape[1], -1)) * s.unsqueeze(-1)).to(u.dtype).flatten(1)
    return z


def _forward(
    x: Tensor, h: Tensor, base: Base, m: Modulation, activation: str
) -> tuple[Tensor, _Saved]:
    k, rank = m.num_ranks, m.w_b_gate.shape[0]
    u = x @ m.w_down
    u_parts = torch.split(u, rank, dim=1)
    p_in = h @ m.w_a_in.t()
    p_parts = torch.split(p_in, rank, dim=1)
    gate = functional.linear(h, base.gate, base.gate_bias)
    s_gate, z = _coefficients(u_parts[0], p_parts[0], k)
    coefficients = [s_gate]
    gate = torch.addmm(gate, z, m.w_b_gate)
    up = functional.linear(h, base.up, base.up_bias)
    if m.w_b_up is not None:
        s_up, z = _coefficients(u_parts[1], p_parts[1], k)
        coefficients.append(s_up)
        up = torch.addmm(up, z, m.w_b_up)
    inner = ACTIVATIONS[activation][0](gate) * up
    y = functional.linear(inner, base.down, base.down_bias)
    p_mid = None
    if m.w_a_mid is not None and m.w_b_down is not None:
        p_mid = inner @ m.w_a_mid.t()
        s_down, z = _coefficients(u_parts[2], p_mid, k)
        coefficients.append(s_down)
        y = torch.addmm(y, z, m.w_b_down)
    return y, _Saved(u, p_in, p_mid, torch.cat(coefficients, 1), gate, up)


def _coefficients_backward(dz: Tensor, u: Tensor, p: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """du and dp, both ``(T, R)`` in u's dtype."""
    k, wide = s.shape[1], s.dtype
    dz, wide_u, wide_p = (t.unflatten(1, (k, -1)).to(wide) for t in (dz, u, p))
    ds = (dz * wide_u).sum(-1, keepdim=True)
    du = s.unsqueeze(-1) * dz + ds * wide_p
    return du.to(u.dtype).flatten(1), (ds * wide_u).to(u.dtype).flatten(1)


def _backward(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    base: Base,
    m: Modulation,
    saved: _Saved,
    activation: str,
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    """Gradients of x, h, the six of `Base` and the six of `Modulation`; None where not needed."""
    k, rank = m.num_ranks, m.w_b_gate.shape[0]
    act, act_backward = ACTIVATIONS[activation]
    u_parts = torch.split(saved.u, rank, dim=1)
    s_parts = torch.split(saved.s, k, dim=1)
    p_in = h @ m.w_a_in.t() if saved.p_in is None else saved.p_in
    p_parts = torch.split(p_in, rank, dim=1)
    activated = act(saved.gate)
    inner = activated * saved.up
    wants = dict(zip(("x", "h", *Base._fields, *Modulation._fields), needed, strict=False))
    grads: dict[str, Tensor] = {}
    du_parts: list[Tensor] = []

    d_inner = dy @ base.down
    if m.w_a_mid is not None and m.w_b_down is not None:
        p_mid = inner @ m.w_a_mid.t() if saved.p_mid is None else saved.p_mid
        if wants["w_b_down"]:
            grads["w_b_down"] = _scaled(u_parts[2], s_parts[2]).t() @ dy
        du, dp = _coefficients_backward(dy @ m.w_b_down.t(), u_parts[2], p_mid, s_parts[2])
        du_parts.append(du)
        d_inner = torch.addmm(d_inner, dp, m.w_a_mid)
        if wants["w_a_mid"]:
            grads["w_a_mid"] = dp.t() @ inner
    if wants["down"]:
        grads["down"] = dy.t() @ inner
    if wants["down_bias"]:
        grads["down_bias"] = dy.sum(0)

    d_gate = act_backward(d_inner * saved.up, saved.gate)
    d_up = d_inner * activated
    dp_parts: list[Tensor] = []
    for index, (name, d_out, w_b) in enumerate(
        (("gate", d_gate, m.w_b_gate), ("up", d_up, m.w_b_up))
    ):
        if wants[name]:
            grads[name] = d_out.t() @ h
        if wants[f"{name}_bias"]:
            grads[f"{name}_bias"] = d_out.sum(0)
        if w_b is None:
            continue
        if wants[f"w_b_{name}"]:
            grads[f"w_b_{name}"] = _scaled(u_parts[index], s_parts[index]).t() @ d_out
        du, dp = _coefficients_backward(
            d_out @ w_b.t(), u_parts[index], p_parts[index], s_parts[index]
        )
        du_parts.insert(index, du)
        dp_parts.append(dp)
    dp_in = torch.cat(dp_parts, 1)
    if wants["w_a_in"]:
        grads["w_a_in"] = dp_in.t() @ h
    if wants["h"]:
        dh = d_gate @ base.gate
        dh = torch.addmm(dh, d_up, base.up)
        grads["h"] = torch.addmm(dh, dp_in, m.w_a_in)
    if wants["x"] or wants["w_down"]:
        du_all = torch.cat(du_parts, 1)
        if wants["w_down"]:
            grads["w_down"] = x.t() @ du_all
        if wants["x"]:
            grads["x"] = du_all @ m.w_down.t()
    names = ("x", "h", *Base._fields, *Modulation._fields[:-1])
    return [grads.get(name) for name in names]
