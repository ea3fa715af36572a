"""The modulated MLP without forming v_a and v_b: the algebra once, with a hand-written backward.

``T`` tokens, ``D`` model width, ``F`` MLP width, ``k`` components of rank ``r``, ``R = k * r``,
``c`` modulated projections (1 gate; 2 gate and up; 3 gate, up and down). Per projection with input
``a`` and attention output ``x`` (design.md#coefficients)::

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

torch computes the GEMMs; everything in between is elementwise over ``(T, R)`` and ``(T, F)``.
Backward needs x, h, u, p, s, and gate and up before the activation, which are saved. It recomputes
z and the inner activation, and with ``save_probe=False`` also p, for ``2 R (2 D + F)`` more FLOPs
per token (design.md#saved-activations). `Steps` lets other modules compute the parts in their way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from npt_fast.kernels.activations import ACTIVATIONS as ACTIVATIONS
from npt_fast.kernels.activations import gated_activation, gated_activation_backward
from npt_fast.kernels.products import add_product
from npt_fast.kernels.weight_gradients import WeightGradient


class Factors(NamedTuple):
    """Factors of the weight changes of all projections, joined so that GEMMs need no copies.

    Attributes:
        w_down: W_down of all projections, ``(D, c * R)``; columns by projection, component, rank.
        w_a_in: W_a_up of gate or up, ``(R, D)``, or of both, ``(2 * R, D)``.
        w_a_mid: W_a_up of down, ``(R, F)``, or None.
        w_b_gate: W_b_up of gate, ``(R, F)``; None if the MLP has no gate.
        w_b_up: W_b_up of up, ``(R, F)``, or None.
        w_b_down: W_b_up of down, ``(R, D)``, or None.
        num_ranks: number of components k.
    """

    w_down: Tensor
    w_a_in: Tensor
    w_a_mid: Tensor | None
    w_b_gate: Tensor | None
    w_b_up: Tensor | None
    w_b_down: Tensor | None
    num_ranks: int


def width_of(factors: Factors) -> int:
    """R, the sum of the ranks of a projection's components."""
    inputs = (factors.w_b_gate is not None) + (factors.w_b_up is not None)
    return factors.w_a_in.shape[0] // inputs


class MLPWeights(NamedTuple):
    """The base model's own weights of one MLP.

    Attributes:
        gate: weight of gate, ``(F, D)``.
        up: weight of up, ``(F, D)``.
        down: weight of down, ``(D, F)``.
        gate_bias: bias of gate, ``(F,)``, or None.
        up_bias: bias of up, ``(F,)``, or None.
        down_bias: bias of down, ``(D,)``, or None.
    """

    gate: Tensor
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None


class Steps(NamedTuple):
    """Functions that compute the parts of the modulated MLP; one algebra uses all such tables.

    Below, c is the number of projections in the call: that of u, or the one or two of gate and up.

    Attributes:
        probe_and_scale: computes probes, coefficients and scaled bottlenecks from a ``(T, in)``,
            w_a ``(c R, in)``, u ``(c, T, R)`` and k. Returns s ``(c, T, k)``, z ``(c, T, R)`` and,
            if the last argument `save` is true, p ``(T, c R)``.
        modulated_gate_up: computes the inner activation from h ``(T, D)``, the weights,
            z ``(c, T, R)`` of gate and up, the factors and the activation's name. Returns inner
            ``(T, F)`` and, if `save`, gate and up before the activation, ``(T, F)`` each.
        sum_of_products: adds the products of ``(T, K_i)`` and ``(K_i, out)`` pairs, and a bias
            ``(out,)`` or None. Returns ``(T, out)``.
        gated_activation: computes ``activation(gate) * up``, ``(T, F)``.
        gated_activation_backward: computes d_gate, d_up and inner, ``(T, F)`` each, from d_inner,
            gate, up and the activation's name.
        coefficients_backward: writes the gradient of u to its last argument du ``(c, T, R)``, from
            dz, u and p ``(c, T, R)`` each and s ``(c, T, k)``. Returns dp ``(T, c R)`` and
            z ``(c, T, R)``.
    """

    probe_and_scale: Callable[[Tensor, Tensor, Tensor, int, bool], Sequence[Tensor]]
    modulated_gate_up: Callable[[Tensor, MLPWeights, Tensor, Factors, str, bool], Sequence[Tensor]]
    sum_of_products: Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | None], Tensor]
    gated_activation: Callable[[Tensor, Tensor, str], Tensor]
    gated_activation_backward: Callable[
        [Tensor, Tensor, Tensor, str], tuple[Tensor, Tensor, Tensor]
    ]
    coefficients_backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def modulated_mlp(
    x: Tensor,
    h: Tensor,
    weights: MLPWeights,
    factors: Factors,
    *,
    activation: str = "silu",
    save_probe: bool = True,
    steps: Steps | None = None,
    parameters: Factors | None = None,
    bottleneck: list[Tensor] | None = None,
) -> Tensor:
    """The modulated MLP of tensors that share one dtype and device.

    Args:
        x: attention output, ``(T, D)``.
        h: MLP input, ``(T, D)``.
        weights: the MLP's own weights; those that require gradients get them.
        factors: factors of the weight changes.
        activation: a name of `ACTIVATIONS`.
        save_probe: whether to save the probes for backward instead of recomputing them.
        steps: how to compute the parts; None means plain torch.
        parameters: what `factors` are detached copies of, in another dtype: these get the
            gradients, in their own dtype. None if `factors` are the parameters.
        bottleneck: list that gets u, ``(T, c R)``, if there are gradients.

    Returns:
        ``(T, D)``.
    """
    steps = TORCH_STEPS if steps is None else steps
    if needs_gradients(x, h, weights, factors, parameters):
        trained = factors if parameters is None else parameters
        copies = (None,) * 6 if parameters is None else factors[:-1]
        y, u = ModulatedMLPFunction.apply(
            x, h, *weights, *trained[:-1], *copies, factors.num_ranks, activation, save_probe, steps
        )
        if bottleneck is not None:
            bottleneck.append(u)
        result: Tensor = y
        return result
    with without_autocast(x):
        # not through apply(), whose forward would return what backward needs
        return _forward(x, h, weights, factors, activation, steps, save=False)[0]


def needs_gradients(
    x: Tensor, h: Tensor, weights: MLPWeights, factors: Factors, parameters: Factors | None
) -> bool:
    """Whether a call of `modulated_mlp` has a backward."""
    tensors = (x, h, *weights, *(parameters or factors)[:-1])
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class ModulatedMLPFunction(torch.autograd.Function):
    """Saves and restores tensors around `_forward` and `_backward`, which hold the algebra.

    Its tensors are x, h, the base model's weights, the factors that get gradients, and copies of
    these that are computed with: six of each, None where there is none.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, h: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, num_ranks, activation, save_probe, steps = arguments
        weights, trained, copies = tensors[:6], tensors[6:12], tensors[12:]
        copied = copies[0] is not None
        used = copies if copied else trained
        with without_autocast(x):
            y, saved = _forward(
                x, h, MLPWeights._make(weights), Factors._make([*used, num_ranks]), activation,
                steps, save=True, save_probe=save_probe,
            )  # fmt: skip
        assert saved is not None
        ctx.save_for_backward(x, h, *weights, *used, *saved)
        ctx.num_ranks, ctx.activation, ctx.steps = num_ranks, activation, steps
        ctx.gradients = [WeightGradient.to(t, copied=copied) for t in trained]
        ctx.set_materialize_grads(False)  # few calls use u
        return y, saved.u

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, du: Tensor | None) -> tuple[Tensor | None, ...]:
        # with create_graph `once_differentiable` marks what is returned, so all of it must be
        may_add = not torch.is_grad_enabled()
        gradients: tuple[Tensor | None, ...] = _backward_once(ctx, dy, du, may_add)
        return gradients


# the steps record no graph, so a second derivative would be wrong: this makes it an error
@once_differentiable
def _backward_once(
    ctx: Any, dy: Tensor | None, du: Tensor | None, may_add: bool
) -> tuple[Tensor | None, ...]:
    x, h, *rest = ctx.saved_tensors
    dy = torch.zeros_like(h) if dy is None else dy
    weights, saved = MLPWeights._make(rest[:6]), _Saved._make(rest[12:])
    factors = Factors._make([*rest[6:12], ctx.num_ranks])
    wants = dict(zip(("x", "h", *MLPWeights._fields), ctx.needs_input_grad, strict=False))
    of = {
        name: gradient if may_add else gradient.alone()
        for name, gradient, wanted in zip(
            Factors._fields, ctx.gradients, ctx.needs_input_grad[8:], strict=False
        )
        if wanted
    }
    with without_autocast(x):
        grads = _backward(
            dy, du, x, h, weights, factors, saved, ctx.activation, ctx.steps, wants, of
        )
    # copies, num_ranks, activation, save_probe and steps have none
    return (*grads, *[None] * 10)


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Switch autocast off: the caller has chosen the dtype. Meta tensors have no autocast."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


class _Saved(NamedTuple):
    """What backward needs besides the inputs: u and p ``(T, c R)``, s, gate and up."""

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
    weights: MLPWeights,
    factors: Factors,
    activation: str,
    steps: Steps,
    *,
    save: bool,
    save_probe: bool = False,
) -> tuple[Tensor, _Saved | None]:
    k, rank = factors.num_ranks, width_of(factors)
    inputs = factors.w_a_in.shape[0] // rank
    u = x @ factors.w_down
    u_parts = _by_projection(u, rank)
    s_in, z, *p_in = steps.probe_and_scale(h, factors.w_a_in, u_parts[:inputs], k, save_probe)
    inner, *gate_up = steps.modulated_gate_up(h, weights, z, factors, activation, save)
    left, right = [inner], [weights.down.t()]
    s_mid, p_mid = None, None
    if factors.w_a_mid is not None and factors.w_b_down is not None:
        s_mid, z, *p_out = steps.probe_and_scale(
            inner, factors.w_a_mid, u_parts[inputs:], k, save_probe
        )
        p_mid = p_out[0] if p_out else None
        left.append(z[0])
        right.append(factors.w_b_down)
    y = steps.sum_of_products(left, right, weights.down_bias)
    saved_in = p_in[0] if p_in else None
    return y, _Saved(u, saved_in, p_mid, s_in, s_mid, *gate_up) if save else None


def _by_projection(joined: Tensor, rank: int) -> Tensor:
    """``(T, c R)`` as ``(c, T, R)``."""
    return joined.unflatten(1, (-1, rank)).transpose(0, 1)


def _stacked_products(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Products of equal shapes, stacked; each product is written in place, without a copy."""
    if torch.compiler.is_compiling():  # handles `out=` poorly, and plans buffers itself
        return torch.stack([a @ b for a, b in zip(left, right, strict=True)])
    out = left[0].new_empty(len(left), left[0].shape[0], right[0].shape[1])
    for a, b, part in zip(left, right, out, strict=True):
        torch.mm(a, b, out=part)
    return out


def _backward(
    dy: Tensor,
    du_more: Tensor | None,
    x: Tensor,
    h: Tensor,
    weights: MLPWeights,
    factors: Factors,
    saved: _Saved,
    activation: str,
    steps: Steps,
    wants: dict[str, bool],
    of: dict[str, WeightGradient],
) -> list[Tensor | None]:
    """Gradients of x, h, the weights and the factors, in order; None where there is none.

    `wants` says which of x, h and the weights need one, and `of` has the factors that do.
    """
    rank = width_of(factors)
    inputs = factors.w_a_in.shape[0] // rank
    u = _by_projection(saved.u, rank)
    # both calls of coefficients_backward write their slices of it, so one GEMM each gives dx and
    # dW_down of all projections
    du_all = torch.empty_like(saved.u)
    du = _by_projection(du_all, rank)
    grads: dict[str, Tensor | None] = {}

    dp_mid = None
    left, right = [dy], [weights.down]
    if factors.w_a_mid is not None and factors.w_b_down is not None and saved.s_mid is not None:
        p_mid = saved.p_mid
        if p_mid is None:
            # inner comes again with d_gate and d_up below, but their d_inner needs dp, and that
            # needs p
            p_mid = steps.gated_activation(saved.gate, saved.up, activation) @ factors.w_a_mid.t()
        dz = _stacked_products([dy], [factors.w_b_down.t()])
        p_parts = _by_projection(p_mid, rank)
        dp_mid, z = steps.coefficients_backward(dz, u[inputs:], p_parts, saved.s_mid, du[inputs:])
        if "w_b_down" in of:
            grads["w_b_down"] = of["w_b_down"].of(z[0], dy)
        left.append(dp_mid)
        right.append(factors.w_a_mid)
    d_inner = steps.sum_of_products(left, right, None)
    d_gate, d_up, inner = steps.gated_activation_backward(d_inner, saved.gate, saved.up, activation)
    if dp_mid is not None and "w_a_mid" in of:
        grads["w_a_mid"] = of["w_a_mid"].of(dp_mid, inner)
    if wants["down"]:
        grads["down"] = dy.t() @ inner
    if wants["down_bias"]:
        grads["down_bias"] = dy.sum(0)

    for name, d_out in (("gate", d_gate), ("up", d_up)):
        if wants[name]:
            grads[name] = d_out.t() @ h
        if wants[f"{name}_bias"]:
            grads[f"{name}_bias"] = d_out.sum(0)
    p_in = h @ factors.w_a_in.t() if saved.p_in is None else saved.p_in
    heads = [w for w in (factors.w_b_gate, factors.w_b_up) if w is not None]
    d_outs = [d_gate, d_up][:inputs]
    # the gradient of z: gate's and up's in one stack, as one launch reads them
    dz = _stacked_products(d_outs, [w.t() for w in heads])
    dp_in, z = steps.coefficients_backward(
        dz, u[:inputs], _by_projection(p_in, rank), saved.s_in, du[:inputs]
    )
    for index, name in enumerate(("w_b_gate", "w_b_up")[:inputs]):
        if name in of:
            grads[name] = of[name].of(z[index], d_outs[index])
    if "w_a_in" in of:
        grads["w_a_in"] = of["w_a_in"].of(dp_in, h)
    if wants["h"]:
        grads["h"] = steps.sum_of_products(
            (d_gate, d_up, dp_in), (weights.gate, weights.up, factors.w_a_in), None
        )
    if du_more is not None:  # of other uses of u
        du_all += du_more
    if "w_down" in of:
        grads["w_down"] = of["w_down"].of(x, du_all)
    if wants["x"]:
        grads["x"] = du_all @ factors.w_down.t()
    names = ("x", "h", *MLPWeights._fields, *Factors._fields[:-1])
    return [grads.get(name) for name in names]


# The steps in plain torch; see `Steps`.


def _components(tensor: Tensor, k: int) -> Tensor:
    """``(c, T, R)`` as ``(c, T, k, r)``, in float32 at least."""
    return tensor.unflatten(2, (k, -1)).to(torch.promote_types(tensor.dtype, torch.float32))


def _probe_and_scale(a: Tensor, w_a: Tensor, u: Tensor, k: int, save: bool) -> Sequence[Tensor]:
    p = a @ w_a.t()
    s = (_components(u, k) * _components(_by_projection(p, u.shape[2]), k)).sum(-1)
    return (s, _scaled_bottlenecks(u, s), p) if save else (s, _scaled_bottlenecks(u, s))


def _scaled_bottlenecks(u: Tensor, s: Tensor) -> Tensor:
    z: Tensor = (u.unflatten(2, (s.shape[2], -1)) * s.unsqueeze(-1)).to(u.dtype).flatten(2)
    return z


def coefficients_backward(
    dz: Tensor, u: Tensor, p: Tensor, s: Tensor, du: Tensor
) -> tuple[Tensor, Tensor]:
    """`Steps.coefficients_backward` in plain torch."""
    k = s.shape[2]
    wide_dz, wide_u, scale = _components(dz, k), _components(u, k), s.unsqueeze(-1)
    ds = (wide_dz * wide_u).sum(-1, keepdim=True)
    # in place: du is a slice of the matrix that backward allocated
    du.copy_((scale * wide_dz + ds * _components(p, k)).flatten(2))
    dp = (ds * wide_u).to(u.dtype).flatten(2)
    return dp.transpose(0, 1).flatten(1), _scaled_bottlenecks(u, s)


def gate_up_before_activation(
    h: Tensor, weights: MLPWeights, z: Tensor, factors: Factors
) -> tuple[Tensor, Tensor]:
    """Modulated gate and up before the activation, ``(T, F)`` each, by torch's GEMMs."""
    gate = functional.linear(h, weights.gate, weights.gate_bias)
    if factors.w_b_gate is not None:
        add_product(gate, z[0], factors.w_b_gate)
    up = functional.linear(h, weights.up, weights.up_bias)
    if factors.w_b_up is not None:
        add_product(up, z[1], factors.w_b_up)
    return gate, up


def _modulated_gate_up(
    h: Tensor, weights: MLPWeights, z: Tensor, factors: Factors, activation: str, save: bool
) -> Sequence[Tensor]:
    gate, up = gate_up_before_activation(h, weights, z, factors)
    inner = gated_activation(gate, up, activation)
    return (inner, gate, up) if save else (inner,)


def sum_of_products(left: Sequence[Tensor], right: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """`Steps.sum_of_products`, by torch's GEMMs."""
    y = left[0] @ right[0] if bias is None else torch.addmm(bias, left[0], right[0])
    for a, b in zip(left[1:], right[1:], strict=True):
        add_product(y, a, b)
    return y


TORCH_STEPS = Steps(
    _probe_and_scale,
    _modulated_gate_up,
    sum_of_products,
    gated_activation,
    gated_activation_backward,
    coefficients_backward,
)
