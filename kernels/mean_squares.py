"""Mean squares of v_a and v_b, summed over tokens: from Gram matrices, without one value per token.

For a component with U = u ``(T, r)``, the token weights m, and W_a_up and W_b_up as Wa and Wb::

    sum_t m_t |u_t Wa|^2 = <C, Wa Wa'>        C = (m U)' U        (r, r)

So with ``G = Wa Wa' / in + Wb Wb' / out`` the sum is ``<C, G>``, and its gradients are

    du = 2 m U G        dWa = 2 C Wa / in        dWb = 2 C Wb / out

The products read the dtype of u and sum in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from npt_fast.kernels.factored import Factors, without_autocast


def sum_of_mean_squares(
    u: Tensor, weights: Tensor, factors: Factors, parameters: Factors | None = None
) -> Tensor:
    """Mean squares of the entries of v_a and v_b, summed over tokens and over the 2 c vectors.

    Args:
        u: bottlenecks, ``(T, c R)``.
        weights: weight of each token, ``(T,)``.
        factors: factors in the dtype of `u`.
        parameters: what `factors` are detached copies of; None if they get the gradients.

    Returns:
        A scalar in float32, or float64 of float64.
    """
    trained = factors if parameters is None else parameters
    result: Tensor = MeanSquaresFunction.apply(
        u, weights, *trained[1:-1], *factors[1:-1], factors.num_ranks
    )
    return result


def _projections(factors: Sequence[Tensor | None]) -> tuple[tuple[int, int], ...]:
    """Projections whose vectors each of W_a_in, W_a_mid, W_b_gate, W_b_up and W_b_down makes."""
    inputs = sum(w is not None for w in factors[2:4])  # gate and up; one of them may be missing
    down = inputs, inputs + 1
    return (0, inputs), down, (0, 1), (inputs - 1, inputs), down


class MeanSquaresFunction(torch.autograd.Function):
    """`sum_of_mean_squares`, with gradients for u and for all factors but W_down."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, weights: Tensor, *arguments: Any) -> Tensor:
        *tensors, k = arguments
        trained, used = tensors[:5], tensors[5:]
        with without_autocast(u):
            places = _projections(used)
            parts, masked = _components(u, weights, used[0].shape[0] // (places[0][1] * k))
            squares = _symmetric_product(masked.mT, parts)
            grams = torch.zeros_like(squares)
            for w, place in zip(used, places, strict=True):
                if w is not None:
                    w = w.unflatten(0, (-1, parts.shape[2]))
                    grams[k * place[0] : k * place[1]] += _symmetric_product(w, w.mT) / w.shape[2]
            ctx.save_for_backward(u, weights, squares, grams, *used)
            ctx.num_ranks, ctx.dtypes = k, [None if t is None else t.dtype for t in trained]
            return (squares * grams).sum() / k

    @staticmethod
    # the products record no graph, so a second derivative would be wrong: this makes it an error
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        u, weights, squares, grams, *used = ctx.saved_tensors
        k, scale = ctx.num_ranks, 2 * grad / ctx.num_ranks
        wants_u, _, *wants = ctx.needs_input_grad
        du = None
        gradients: list[Tensor | None] = []
        with without_autocast(u):
            if wants_u:
                _, masked = _components(u, weights, grams.shape[1])
                gram, size = _scaled(grams, u.dtype)
                du = _product(masked, gram).mul_(size * scale).to(u.dtype)
                du = du.transpose(0, 1).flatten(1)
            for w, place, wanted, dtype in zip(
                used, _projections(used), wants[:5], ctx.dtypes, strict=True
            ):
                if not wanted:
                    gradients.append(None)
                    continue
                square, size = _scaled(squares[k * place[0] : k * place[1]], w.dtype)
                found = _product(square, w.unflatten(0, (-1, square.shape[2])))
                gradients.append(found.mul_(size * (scale / w.shape[1])).flatten(0, 1).to(dtype))
        # token weights, copies and num_ranks have none
        return (du, None, *gradients, *[None] * 6)


def _components(u: Tensor, weights: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """u by projection and component, ``(c k, T, r)``, and the same times the token weights."""
    parts = u.unflatten(1, (-1, rank)).transpose(0, 1)
    return parts, parts * weights.to(u.dtype).unsqueeze(-1)


def _product(a: Tensor, b: Tensor) -> Tensor:
    # through the dispatcher: FLOP counters fail at `bmm` with another output dtype
    found: Tensor = torch.ops.npt_fast.batched_product(a, b)
    return found


def _symmetric_product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``, known to be symmetric: a quarter of it is not computed, but transposed."""
    if a.shape[1] % 2:
        return _product(a, b)
    (top, bottom), (left, right) = a.chunk(2, 1), b.chunk(2, 2)
    corner = _product(top, right)
    columns = (_product(top, left), corner.mT), (corner, _product(bottom, right))
    return torch.cat([torch.cat(column, 1) for column in columns], 2)


def _scaled(gram: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gram matrices ``(n, r, r)`` in a dtype, divided by their largest entries ``(n, 1, 1)``.

    float16 ends at 65,504, and the square of a token may be more.
    """
    size = gram.abs().amax((1, 2), keepdim=True).clamp_min(torch.finfo(gram.dtype).tiny)
    return (gram / size).to(dtype), size
