"""Distances between what the base model and the trained model compute, per token.

Low precision is widened to float32; float64 stays, so that the formulas can be checked exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from npt_fast.config import LossKind

_TINY = torch.finfo(torch.float32).tiny
_CHUNK = 2048  # tokens whose logits exist at one time


def direct_errors(output: Tensor, target: Tensor, kind: LossKind) -> Tensor:
    """Error of a layer's output.

    Tokens that serve as attention sinks are thousands of times longer than the rest and drown it in
    a plain mean; relative to its target every token counts the same.

    Args:
        output: ``(B, S, D)``.
        target: ``(B, S, D)``.
        kind: ``"relative"``: squared error over squared target; ``"mse"``: mean squared error.

    Returns:
        ``(B, S)``.
    """
    target = _wide(target)
    squares = (_wide(output) - target).square()
    if kind == "mse":
        return squares.mean(-1)
    return squares.sum(-1) / target.square().sum(-1).clamp_min(_TINY)


def sink_errors(output: Tensor, target: Tensor, hidden: Tensor) -> Tensor:
    """Error at the first token, relative to the hidden state that leaves the layer.

    Nearly every token attends to the first one, so an error there is an error everywhere; in a mean
    over tokens it is one of many. What comes after a layer normalizes its output: an error matters
    by its share of that, much where a layer writes an attention sink, not at all where one stands.

    Args:
        output: ``(B, S, D)``.
        target: ``(B, S, D)``.
        hidden: output of the base model's layer, ``(B, S, D)``.

    Returns:
        ``(B,)``.
    """
    output, target, hidden = (_wide(tensor[:, 0]) for tensor in (output, target, hidden))
    return (output - target).square().sum(-1) / hidden.square().sum(-1).clamp_min(_TINY)


def fidelity_sum(
    student: Tensor,
    teacher: Tensor,
    head: Callable[[Tensor], Tensor],
    weights: Tensor,
    kind: LossKind,
) -> Tensor:
    """Difference in next-token predictions, summed over tokens; differentiable in `student`.

    Logits exist for 2048 tokens at a time and are made once: the gradient is taken with the value.

    Args:
        student: final hidden states of the trained model, ``(B, S, D)``.
        teacher: those of the base model, ``(B, S, D)``.
        head: hidden states to logits.
        weights: of the tokens, ``(B, S)``.
        kind: ``"relative"``: KL(teacher, student) in nats; ``"mse"``: mean squared difference of
            logits (design.md#losses).
    """
    result: Tensor = _Fidelity.apply(  # type: ignore[no-untyped-call]
        student, teacher, weights, head, kind
    )
    return result


class _Fidelity(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        weights: Tensor,
        head: Callable[[Tensor], Tensor],
        kind: LossKind,
    ) -> Tensor:
        sums, gradients = [], []
        for ours, theirs, weight in zip(*_chunks(student, teacher, weights), strict=True):
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                ours = ours.detach().requires_grad_(ctx.needs_input_grad[0])
                found = (_fidelity(_wide(head(ours)), _wide(head(theirs)), kind) * weight).sum()
            if ctx.needs_input_grad[0]:
                gradients += torch.autograd.grad(found, ours)
            sums.append(found.detach())
        if gradients:
            ctx.save_for_backward(torch.cat(gradients).view_as(student))
        return torch.stack(sums).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None, None, None


def _fidelity(ours: Tensor, theirs: Tensor, kind: LossKind) -> Tensor:
    if kind == "mse":
        return (ours - theirs).square().mean(-1)
    return functional.kl_div(
        ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)


class Agreement(NamedTuple):
    """Sums over tokens: how a model predicts, and how much as the base model does.

    Attributes:
        loss: of the trained model predicting the text, nats.
        base_loss: of the base model.
        predicted: tokens that were to be predicted.
        kl: KL(base, trained), nats.
        agreed: where both find the same token likeliest.
        tokens: number of tokens, for `kl` and `agreed`.
    """

    loss: Tensor
    base_loss: Tensor
    predicted: Tensor
    kl: Tensor
    agreed: Tensor
    tokens: Tensor


def agreement(
    student: Tensor,
    teacher: Tensor,
    head: Callable[[Tensor], Tensor],
    input_ids: Tensor,
    weights: Tensor,
) -> Agreement:
    """Compare predictions at all positions; shapes as in `fidelity_sum`, ``input_ids (B, S)``."""
    targets = functional.pad(input_ids[:, 1:], (0, 1))
    predicted = functional.pad(weights[:, 1:], (0, 1)) * weights
    sums = []
    for ours, theirs, target, real, weight in zip(
        *_chunks(student, teacher, targets, predicted, weights), strict=True
    ):
        ours, theirs = (_wide(head(hidden)).log_softmax(-1) for hidden in (ours, theirs))
        target = target.unsqueeze(-1)
        sums.append(
            torch.stack(
                (
                    -(ours.gather(-1, target).squeeze(-1) * real).sum(),
                    -(theirs.gather(-1, target).squeeze(-1) * real).sum(),
                    real.sum(),
                    ((theirs.exp() * (theirs - ours)).sum(-1) * weight).sum(),
                    ((ours.argmax(-1) == theirs.argmax(-1)) * weight).sum(),
                    weight.sum(),
                )
            )
        )
    return Agreement(*torch.stack(sums).double().sum(0))


def _wide(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _chunks(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return [tensor.flatten(0, 1).split(_CHUNK) for tensor in tensors]
