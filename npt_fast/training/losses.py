"""Losses per token: how far the student is from the teacher (design.md#losses).

Low precision is widened to float32; float64 stays, so that tests can check the formulas exactly.
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
_CHUNK = 2048  # tokens whose logits exist at once; with 49,152 words in float32 that is 400 MB


def counted(input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None) -> Tensor:
    """Which tokens of a batch count: all but padding and those whose label is -100, ``(B, S)``."""
    present = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    return present > 0 if labels is None else (present > 0) & labels.ne(-100)


def direct_errors(output: Tensor, target: Tensor, kind: LossKind) -> Tensor:
    """Error of the output of a layer's modulated MLP against its target, per token.

    Attention sinks are thousands of times longer than other tokens and dominate a plain mean.
    Relative to its target, each token counts the same.

    Args:
        output: ``(B, S, D)``.
        target: ``(B, S, D)``.
        kind: ``"relative"``: squared error over squared target; ``"mse"``: mean squared error.

    Returns:
        ``(B, S)``.
    """
    target = wide(target)
    squares = (wide(output) - target).square()
    if kind == "mse":
        return squares.mean(-1)
    return squares.sum(-1) / squared_length(target).clamp_min(_TINY)


def bounded_errors(errors: Tensor, attention: Tensor, typical: Tensor) -> Tensor:
    """Huber's loss of relative distances, whose squares are the relative errors.

    A token's gradient grows with its distance, which has no limit, and with the square of its
    attention output. So the loss turns linear at 1 for tokens with an attention output of usual
    size, and earlier, by that square, for larger ones (design.md#losses).

    Args:
        errors: squared errors over squared targets, ``(...)``.
        attention: attention outputs, ``(..., D)``.
        typical: the usual square of an attention output, a scalar.

    Returns:
        ``(...)``.
    """
    bound = typical / squared_length(attention).clamp_min(typical)
    squared = bound.square()
    return torch.where(
        errors <= squared, errors, 2 * bound * errors.maximum(squared).sqrt() - squared
    )


def squared_length(tensor: Tensor) -> Tensor:
    """Squared lengths of vectors ``(..., D)``, in float32 or more, ``(...)``."""
    return wide(tensor).square().sum(-1)


def sink_errors(output: Tensor, target: Tensor, hidden: Tensor) -> Tensor:
    """Error at the first token, relative to the hidden state that leaves the layer.

    Nearly every token attends to the first one, so an error there reaches all tokens, yet in a mean
    over tokens it counts once. The next norm rescales the layer's output, so the error is measured
    relative to it: it is large in a layer that writes an attention sink, and close to 0 in layers
    whose input holds the sink already.

    Args:
        output: ``(B, S, D)``.
        target: ``(B, S, D)``.
        hidden: output of the base model's layer, ``(B, S, D)``.

    Returns:
        ``(B,)``.
    """
    output, target, hidden = (wide(tensor[:, 0]) for tensor in (output, target, hidden))
    return (output - target).square().sum(-1) / hidden.square().sum(-1).clamp_min(_TINY)


def fidelity_sum(
    student: Tensor,
    teacher: Tensor,
    head: Callable[[Tensor], Tensor],
    weights: Tensor,
    kind: LossKind,
) -> Tensor:
    """Fidelity loss, summed over tokens; differentiable in `student`.

    Logits exist for 2048 tokens at a time and are computed once: the forward pass takes the
    gradient too.

    Args:
        student: final hidden states of the student, ``(B, S, D)``.
        teacher: final hidden states of the teacher, ``(B, S, D)``.
        head: maps hidden states to logits.
        weights: weights of the tokens, ``(B, S)``.
        kind: ``"relative"``: KL(teacher, student) in nats; ``"mse"``: mean squared difference of
            logits.
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
                found = (_fidelity(wide(head(ours)), wide(head(theirs)), kind) * weight).sum()
            if ctx.needs_input_grad[0]:
                # now, chunk by chunk: backward would need the logits of all chunks at once, or a
                # second time
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
    """Comparison of the student's predictions with the teacher's, summed over tokens.

    Attributes:
        loss: cross-entropy of the student on the text, in nats.
        base_loss: cross-entropy of the teacher, which is the base model, in nats.
        predicted: number of tokens predicted: all but the first of each row.
        kl: KL(teacher, student) in nats.
        agreed: number of positions where both rank the same token first.
        tokens: number of positions that `kl` and `agreed` sum over.
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
    """Compare predictions at all positions.

    Args:
        student: final hidden states of the student, ``(B, S, D)``.
        teacher: final hidden states of the teacher, ``(B, S, D)``.
        head: maps hidden states to logits.
        input_ids: the text, ``(B, S)``.
        weights: 1 for tokens, 0 for padding, ``(B, S)``.
    """
    targets = functional.pad(input_ids[:, 1:], (0, 1))
    predicted = functional.pad(weights[:, 1:], (0, 1)) * weights
    sums = []
    for ours, theirs, target, real, weight in zip(
        *_chunks(student, teacher, targets, predicted, weights), strict=True
    ):
        ours, theirs = (wide(head(hidden)).log_softmax(-1) for hidden in (ours, theirs))
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
    # float32 counts tokens exactly up to 2^24 only
    return Agreement(*torch.stack(sums).double().sum(0))


def wide(tensor: Tensor) -> Tensor:
    """Widen to float32 or more."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _chunks(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return [tensor.flatten(0, 1).split(_CHUNK) for tensor in tensors]
