"""The low-rank change of one projection's output, for projections that are called as modules.

``y = projection(a) + change``. The algebra and its names are those of `factored`, for one
projection and without the product with its weight, which may be of any kind: quantised, sharded, or
wrapped in an adapter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from npt_fast.kernels.factored import TORCH_STEPS, Steps, without_autocast
from npt_fast.kernels.weight_gradients import WeightGradient


def bottleneck(x: Tensor, w_down: Tensor, copy: Tensor) -> Tensor:
    """``x @ copy``, whose gradient of the weight goes to `w_down`.

    Args:
        x: attention output, ``(T, D)``.
        w_down: W_down, ``(D, R)``.
        copy: `w_down`, or a detached copy of it in the dtype of `x`.

    Returns:
        ``(T, R)``.
    """
    if torch.is_grad_enabled() and (x.requires_grad or w_down.requires_grad):
        result: Tensor = BottleneckFunction.apply(x, w_down, copy)
        return result
    with without_autocast(x):
        return x @ copy


def weight_change(
    a: Tensor,
    u: Tensor,
    w_a: Tensor,
    w_b: Tensor,
    num_ranks: int,
    steps: Steps | None = None,
    copies: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The change of a projection's output, of tensors on one device.

    Args:
        a: input of the projection, ``(T, in)``.
        u: bottleneck of the projection, ``(T, R)``, of the same dtype.
        w_a: its W_a_up, ``(R, in)``.
        w_b: its W_b_up, ``(R, out)``.
        num_ranks: number of components k.
        steps: how to compute the parts; None means plain torch.
        copies: detached copies of w_a and w_b in the dtype of `a`; None if they have it.

    Returns:
        ``(T, out)``.
    """
    steps = TORCH_STEPS if steps is None else steps
    used = copies or (w_a, w_b)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (a, u, w_a, w_b)):
        result: Tensor = WeightChangeFunction.apply(a, u, w_a, w_b, *used, num_ranks, steps)
        return result
    with without_autocast(a):
        _, z, *_ = steps.probe_and_scale(a, used[0], u.unsqueeze(0), num_ranks, False)
        return z[0] @ used[1]


class BottleneckFunction(torch.autograd.Function):
    """`bottleneck` with gradients for x and W_down."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w_down: Tensor, copy: Tensor) -> Tensor:
        ctx.save_for_backward(x, copy)
        ctx.gradient = WeightGradient.to(w_down, copied=copy is not w_down)
        with without_autocast(x):
            return x @ copy

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _bottleneck_backward(ctx, grad, not torch.is_grad_enabled())


class WeightChangeFunction(torch.autograd.Function):
    """`weight_change` with gradients for all four tensors; saves what is computed with, p and s."""

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        u: Tensor,
        w_a: Tensor,
        w_b: Tensor,
        used_a: Tensor,
        used_b: Tensor,
        num_ranks: int,
        steps: Steps,
    ) -> Tensor:
        with without_autocast(a):
            s, z, p = steps.probe_and_scale(a, used_a, u.unsqueeze(0), num_ranks, True)
            y = z[0] @ used_b
        ctx.save_for_backward(a, u, used_a, used_b, s, p)
        ctx.steps = steps
        ctx.gradients = [
            WeightGradient.to(w, copied=used is not w) for w, used in ((w_a, used_a), (w_b, used_b))
        ]
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _weight_change_backward(ctx, grad, not torch.is_grad_enabled())


# the steps record no graph, so a second derivative would be wrong: this makes it an error
@once_differentiable
def _bottleneck_backward(ctx: Any, grad: Tensor, may_add: bool) -> tuple[Tensor | None, ...]:
    x, w_down = ctx.saved_tensors
    wants_x, wants_w, _ = ctx.needs_input_grad
    with without_autocast(x):
        dx = grad @ w_down.t() if wants_x else None
        of_w = ctx.gradient if may_add else ctx.gradient.alone()
        return dx, of_w.of(x, grad) if wants_w else None, None


@once_differentiable
def _weight_change_backward(ctx: Any, grad: Tensor, may_add: bool) -> tuple[Tensor | None, ...]:
    a, u, w_a, w_b, s, p = ctx.saved_tensors
    wants_a, wants_u, wants_w_a, wants_w_b, *_ = ctx.needs_input_grad
    of_a, of_b = (g if may_add else g.alone() for g in ctx.gradients)
    with without_autocast(a):
        du = torch.empty_like(u)
        dz = (grad @ w_b.t()).unsqueeze(0)
        dp, z = ctx.steps.coefficients_backward(
            dz, u.unsqueeze(0), p.unsqueeze(0), s, du.unsqueeze(0)
        )
        return (
            dp @ w_a if wants_a else None,
            du if wants_u else None,
            of_a.of(dp, a) if wants_w_a else None,
            of_b.of(z[0], grad) if wants_w_b else None,
            *[None] * 4,
        )
