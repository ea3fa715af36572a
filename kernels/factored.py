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

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
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


class Steps(NamedTuple):
    """What is done between and around the GEMMs; the algebra that uses it is the same for all.

    c counts the projections at hand: those of u, or the one or two of gate and up.

    Attributes:
        probe: a ``(T, in)``, w_a ``(c R, in)``, u ``(c, T, R)``, k, save
            -> s ``(c, T, k)``, z ``(c, T, R)``, and if save p ``(T, c R)``.
        gate_up: h, base, z of gate and up, modulation, activation, save
            -> inner ``(T, F)``, and if save gate and up before the activation.
        sum_of_products: several ``(T, K)``, as many ``(K, out)``, a bias -> ``(T, out)``.
        gated: gate, up, activation -> inner.
        gated_backward: d_inner, gate, up, activation -> d_gate, d_up, inner.
        coefficients_backward: dz, u, p, each ``(c, T, R)``, s, and du ``(c, T, R)`` to write to
            -> dp ``(T, c R)``, z ``(c, T, R)``.
    """

    probe: Callable[[Tensor, Tensor, Tensor, int, bool], Sequence[Tensor]]
    gate_up: Callable[[Tensor, Base, Tensor, Modulation, str, bool], Sequence[Tensor]]
    sum_of_products: Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | None], Tensor]
    gated: Callable[[Tensor, Tensor, str], Tensor]
    gated_backward: Callable[[Tensor, Tensor, Tensor, str], tuple[Tensor, Tensor, Tensor]]
    coefficients_backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def modulated_mlp(
    x: Tensor,
    h: Tensor,
    base: Base,
    modulation: Modulation,
    *,
    activation: str = "silu",
    save_probe: bool = True,
    steps: Steps | None = None,
) -> Tensor:
    """The modulated MLP; all tensors of one dtype and device.

    Args:
        x: attention output, ``(T, D)``.
        h: MLP input, ``(T, D)``.
        base: the MLP's weights; gradients for those that require them.
        modulation: factors of the weight changes.
        activation: one of `ACTIVATIONS`.
        save_probe: keep the probes for backward instead of computing them again.
        steps: how the parts are computed; in plain torch if None.

    Returns:
        ``(T, D)``.
    """
    steps = TORCH if steps is None else steps
    tensors = (x, h, *base, *modulation[:-1])
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        result: Tensor = ModulatedMLPFunction.apply(
            *tensors, modulation.num_ranks, activation, save_probe, steps
        )
        return result
    with _without_autocast(x):
        return _forward(x, h, base, modulation, activation, steps, save=False)[0]


class ModulatedMLPFunction(torch.autograd.Function):
    """Saves and restores; the algebra is in `_forward` and `_backward`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, h: Tensor, *arguments: Any) -> Tensor:
        *tensors, num_ranks, activation, save_probe, steps = arguments
        base, modulation = Base._make(tensors[:6]), Modulation._make([*tensors[6:], num_ranks])
        with _without_autocast(x):
            y, saved = _forward(
                x, h, base, modulation, activation, steps, save=True, save_probe=save_probe
            )
        assert saved is not None
        ctx.save_for_backward(x, h, *tensors, *saved)
        ctx.num_ranks, ctx.activation, ctx.steps = num_ranks, activation, steps
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, h, *rest = ctx.saved_tensors
        base, saved = Base._make(rest[:6]), _Saved._make(rest[12:])
        modulation = Modulation._make([*rest[6:12], ctx.num_ranks])
        with _without_autocast(x):
            gradients = _backward(
                grad, x, h, base, modulation, saved, ctx.activation, ctx.steps,
                ctx.needs_input_grad,
            )  # fmt: skip
        return (*gradients, None, None, None, None)


def _without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Dtypes were settled at the entry; there is no autocast for tensors without data."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


class _Saved(NamedTuple):
    """What backward needs beside the inputs: u ``(T, c R)``, p ``(T, c R)``, s, gate, up."""

    u: Tensor
    p_in: Tensor | None
    p_mid: Tensor | None
    s_in: Tensor
    s_mid: Tensor | None
    gate: Tensor
    up: Tensor


def _forward(
    x: Tensor,
    h: Tensor,
    base: Base,
    m: Modulation,
    activation: str,
    steps: Steps,
    *,
    save: bool,
    save_probe: bool = False,
) -> tuple[Tensor, _Saved | None]:
    k, rank = m.num_ranks, m.w_b_gate.shape[0]
    inputs = m.w_a_in.shape[0] // rank
    u = x @ m.w_down
    u_parts = _by_projection(u, rank)
    s_in, z, *p_in = steps.probe(h, m.w_a_in, u_parts[:inputs], k, save_probe)
    inner, *gate_up = steps.gate_up(h, base, z, m, activation, save)
    left, right = [inner], [base.down.t()]
    s_mid, p_mid = None, None
    if m.w_a_mid is not None and m.w_b_down is not None:
        s_mid, z, *p_out = steps.probe(inner, m.w_a_mid, u_parts[inputs:], k, save_probe)
        p_mid = p_out[0] if p_out else None
        left.append(z[0])
        right.append(m.w_b_down)
    y = steps.sum_of_products(left, right, base.down_bias)
    saved_in = p_in[0] if p_in else None
    return y, _Saved(u, saved_in, p_mid, s_in, s_mid, *gate_up) if save else None


def _by_projection(joined: Tensor, rank: int) -> Tensor:
    """``(T, c R)`` as ``(c, T, R)``."""
    return joined.unflatten(1, (-1, rank)).transpose(0, 1)


def _stacked(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Products of one shape as one tensor, each written where it belongs."""
    if torch.compiler.is_compiling():  # which does not like `out`, and needs no help
        return torch.stack([a @ b for a, b in zip(left, right, strict=True)])
    out = left[0].new_empty(len(left), left[0].shape[0], right[0].shape[1])
    for a, b, part in zip(left, right, out, strict=True):
        torch.mm(a, b, out=part)
    return out


def _backward(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    base: Base,
    m: Modulation,
    saved: _Saved,
    activation: str,
    steps: Steps,
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    """Gradients of x, h, the six of `Base` and the six of `Modulation`; None where not needed."""
    rank = m.w_b_gate.shape[0]
    inputs = m.w_a_in.shape[0] // rank
    u = _by_projection(saved.u, rank)
    du_all = torch.empty_like(saved.u)
    du = _by_projection(du_all, rank)
    wants = dict(zip(("x", "h", *Base._fields, *Modulation._fields), needed, strict=False))
    grads: dict[str, Tensor] = {}

    dp_mid = None
    left, right = [dy], [base.down]
    if m.w_a_mid is not None and m.w_b_down is not None and saved.s_mid is not None:
        p_mid = saved.p_mid
        if p_mid is None:
            p_mid = steps.gated(saved.gate, saved.up, activation) @ m.w_a_mid.t()
        dz = _stacked([dy], [m.w_b_down.t()])
        p_parts = _by_projection(p_mid, rank)
        dp_mid, z = steps.coefficients_backward(dz, u[inputs:], p_parts, saved.s_mid, du[inputs:])
        if wants["w_b_down"]:
            grads["w_b_down"] = z[0].t() @ dy
        left.append(dp_mid)
        right.append(m.w_a_mid)
    d_inner = steps.sum_of_products(left, right, None)
    d_gate, d_up, inner = steps.gated_backward(d_inner, saved.gate, saved.up, activation)
    if dp_mid is not None and wants["w_a_mid"]:
        grads["w_a_mid"] = dp_mid.t() @ inner
    if wants["down"]:
        grads["down"] = dy.t() @ inner
    if wants["down_bias"]:
        grads["down_bias"] = dy.sum(0)

    for name, d_out in (("gate", d_gate), ("up", d_up)):
        if wants[name]:
            grads[name] = d_out.t() @ h
        if wants[f"{name}_bias"]:
            grads[f"{name}_bias"] = d_out.sum(0)
    p_in = h @ m.w_a_in.t() if saved.p_in is None else saved.p_in
    heads = [w for w in (m.w_b_gate, m.w_b_up) if w is not None]
    d_outs = [d_gate, d_up][:inputs]
    dz = _stacked(d_outs, [w.t() for w in heads])
    dp_in, z = steps.coefficients_backward(
        dz, u[:inputs], _by_projection(p_in, rank), saved.s_in, du[:inputs]
    )
    for index, name in enumerate(("w_b_gate", "w_b_up")[:inputs]):
        if wants[name]:
            grads[name] = z[index].t() @ d_outs[index]
    if wants["w_a_in"]:
        grads["w_a_in"] = dp_in.t() @ h
    if wants["h"]:
        grads["h"] = steps.sum_of_products(
            (d_gate, d_up, dp_in), (base.gate, base.up, m.w_a_in), None
        )
    if wants["w_down"]:
        grads["w_down"] = x.t() @ du_all
    if wants["x"]:
        grads["x"] = du_all @ m.w_down.t()
    names = ("x", "h", *Base._fields, *Modulation._fields[:-1])
    return [grads.get(name) for name in names]


# The steps in plain torch.


def _components(tensor: Tensor, k: int) -> Tensor:
    """``(c, T, R)`` as ``(c, T, k, r)``, in float32 at least."""
    return tensor.unflatten(2, (k, -1)).to(torch.promote_types(tensor.dtype, torch.float32))


def _probe(a: Tensor, w_a: Tensor, u: Tensor, k: int, save: bool) -> Sequence[Tensor]:
    p = a @ w_a.t()
    s = (_components(u, k) * _components(_by_projection(p, u.shape[2]), k)).sum(-1)
    return (s, _scaled(u, s), p) if save else (s, _scaled(u, s))


def _scaled(u: Tensor, s: Tensor) -> Tensor:
    z: Tensor = (u.unflatten(2, (s.shape[2], -1)) * s.unsqueeze(-1)).to(u.dtype).flatten(2)
    return z


def coefficients_backward(
    dz: Tensor, u: Tensor, p: Tensor, s: Tensor, du: Tensor
) -> tuple[Tensor, Tensor]:
    """The step of that name."""
    k = s.shape[2]
    wide_dz, wide_u, scale = _components(dz, k), _components(u, k), s.unsqueeze(-1)
    ds = (wide_dz * wide_u).sum(-1, keepdim=True)
    du.copy_((scale * wide_dz + ds * _components(p, k)).flatten(2))
    dp = (ds * wide_u).to(u.dtype).flatten(2)
    return dp.transpose(0, 1).flatten(1), _scaled(u, s)


def gate_and_up(h: Tensor, base: Base, z: Tensor, m: Modulation) -> tuple[Tensor, Tensor]:
    """Gate and up before the activation, by torch's GEMMs."""
    gate = _plus_product(functional.linear(h, base.gate, base.gate_bias), z[0], m.w_b_gate)
    up = functional.linear(h, base.up, base.up_bias)
    return gate, up if m.w_b_up is None else _plus_product(up, z[1], m.w_b_up)


def _gate_up(
    h: Tensor, base: Base, z: Tensor, m: Modulation, activation: str, save: bool
) -> Sequence[Tensor]:
    gate, up = gate_and_up(h, base, z, m)
    inner = _gated(gate, up, activation)
    return (inner, gate, up) if save else (inner,)


def sum_of_products(left: Sequence[Tensor], right: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """The step of that name, by torch's GEMMs."""
    y = left[0] @ right[0] if bias is None else torch.addmm(bias, left[0], right[0])
    for a, b in zip(left[1:], right[1:], strict=True):
        y = _plus_product(y, a, b)
    return y


def _plus_product(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``y + a @ b``, over y: to another output torch would copy y first (pytorch #153590)."""
    if torch.compiler.is_compiling():
        return torch.addmm(y, a, b)
    return torch.addmm(y, a, b, out=y)  # FLOP counters do not know `addmm_`


def _gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return ACTIVATIONS[activation][0](gate) * up


def _gated_backward(
    d_inner: Tensor, gate: Tensor, up: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    act, act_backward = ACTIVATIONS[activation]
    activated = act(gate)
    return act_backward(d_inner * up, gate), d_inner * activated, activated * up


TORCH = Steps(_probe, _gate_up, sum_of_products, _gated, _gated_backward, coefficients_backward)
