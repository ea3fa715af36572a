"""Losses against their formulas in float64 and against torch's losses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from npt_fast.config import LossKind
from npt_fast.training import losses
from npt_fast.training.losses import (
    agreement,
    bounded_errors,
    direct_errors,
    fidelity_sum,
    sink_errors,
)

BATCH, LENGTH, WIDTH, VOCABULARY = 3, 5, 6, 11
KINDS: list[LossKind] = ["relative", "mse"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def head() -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Linear(WIDTH, VOCABULARY, bias=False, dtype=torch.float64)


def hidden_states() -> tuple[Tensor, Tensor]:
    """Return hidden states of the student, with gradients, and of the teacher."""
    student, teacher = (2 * normal(BATCH, LENGTH, WIDTH, seed=seed) for seed in (1, 2))
    return student.requires_grad_(), teacher


def padding() -> Tensor:
    """The rows have 5, 3 and 1 tokens."""
    return (torch.arange(LENGTH) < torch.tensor([[5], [3], [1]])).to(torch.float64)


# ---- errors of a layer ----


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_of_each_token(kind: LossKind) -> None:
    output, target = normal(2, 3, WIDTH, seed=1).requires_grad_(), normal(2, 3, WIDTH, seed=2)
    found = direct_errors(output, target, kind)
    assert found.shape == (2, 3)
    for row in range(2):
        for token in range(3):
            pairs = zip(output[row, token].tolist(), target[row, token].tolist(), strict=True)
            squares = [((y - t) ** 2, t**2) for y, t in pairs]
            error = sum(e for e, _ in squares)
            error /= WIDTH if kind == "mse" else sum(t for _, t in squares)
            assert found[row, token].item() == pytest.approx(error, rel=1e-12)
    (gradient,) = torch.autograd.grad(found.sum(), output)
    size = WIDTH if kind == "mse" else target.square().sum(-1, keepdim=True)
    torch.testing.assert_close(gradient, 2 * (output - target).detach() / size)


def test_relative_errors_do_not_depend_on_the_length_of_the_target() -> None:
    """An attention sink counts as much as any other token; it would dominate a plain mean.

    In the base model's float16 its square is infinite.
    """
    output, target = normal(1, 2, WIDTH, seed=1), normal(1, 2, WIDTH, seed=2)
    scale = torch.tensor([1.0, 5000.0], dtype=torch.float64).view(1, 2, 1)
    found = direct_errors(output * scale, target * scale, "relative")
    torch.testing.assert_close(found, direct_errors(output, target, "relative"))
    low = direct_errors((output * scale).half(), (target * scale).half(), "relative")
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), found, rtol=1e-2, atol=0)


def test_bounded_errors() -> None:
    """The truth is Huber's loss of the relative distance, spelled out."""
    errors = torch.tensor([0.0, 0.2, 1.0, 9.0, 0.2, 9.0], dtype=torch.float64)
    lengths = torch.tensor([1.0, 1.0, 1.0, 1.0, 10.0, 10.0], dtype=torch.float64)
    attention = functional.normalize(normal(6, WIDTH), dim=-1) * lengths[:, None]
    found = bounded_errors(errors, attention, torch.tensor(4.0, dtype=torch.float64))
    for error, length, value in zip(*(t.tolist() for t in (errors, lengths, found)), strict=True):
        turn = min(1.0, 4.0 / length**2)  # the usual square is 4
        distance = math.sqrt(error)
        expected = error if distance <= turn else turn * (2 * distance - turn)
        assert value == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("length", [0.0, 1.0, 30.0])
def test_no_token_has_a_large_gradient(length: float) -> None:
    """However far off it is; with an error of 0 and without attention nothing is NaN."""
    target = functional.normalize(normal(1, 4, WIDTH), dim=-1)
    attention = torch.full((1, 4, WIDTH), length / math.sqrt(WIDTH), dtype=torch.float64)
    steps = torch.tensor([0.0, 0.01, 10.0, 1e6], dtype=torch.float64).view(1, 4, 1)
    output = (target + steps * functional.normalize(normal(1, 4, WIDTH, seed=1), dim=-1)).detach()
    output.requires_grad_()
    errors = direct_errors(output, target, "relative")
    typical = torch.tensor(1.0, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(bounded_errors(errors, attention, typical).sum(), output)
    lengths = gradient.norm(dim=-1).flatten()
    turn = 1 / max(length, 1) ** 2
    expected = [2 * min(step, turn) for step in steps.flatten().tolist()]
    torch.testing.assert_close(lengths, torch.tensor(expected, dtype=torch.float64))


def test_no_target_is_no_division_by_zero() -> None:
    zero = torch.zeros(1, 1, WIDTH)
    assert direct_errors(zero, zero, "relative").item() == 0
    assert direct_errors(zero, zero, "mse").item() == 0


# ---- difference in predictions ----


def spelled_out(student: Tensor, teacher: Tensor, weights: Tensor, kind: LossKind) -> Tensor:
    """Compute the loss with all logits at once (design.md#losses)."""
    matrix = head().weight
    ours, theirs = student @ matrix.T, teacher @ matrix.T
    if kind == "mse":
        errors = ((ours - theirs) ** 2).sum(-1) / VOCABULARY
    else:
        p, q = theirs.exp(), ours.exp()
        p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
        errors = (p * (p / q).log()).sum(-1)
    return (errors * weights).sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 4, 5, 14, 15, 2048])
def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch, kind: LossKind, chunk: int) -> None:
    """Value and gradient are the same for chunks that end inside a row, at its end, or past it."""
    monkeypatch.setattr(losses, "_CHUNK", chunk)
    student, teacher = hidden_states()
    matrix = head()
    found = fidelity_sum(student, teacher, matrix, padding(), kind)
    (gradient,) = torch.autograd.grad(found, student)
    expected = spelled_out(student, teacher, padding(), kind)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    (wanted,) = torch.autograd.grad(expected, student)
    torch.testing.assert_close(gradient, wanted, rtol=1e-11, atol=1e-14)
    assert not gradient[padding() == 0].any() and gradient[padding() == 1].any()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_exist_for_one_chunk_at_a_time(
    monkeypatch: pytest.MonkeyPatch, kind: LossKind
) -> None:
    monkeypatch.setattr(losses, "_CHUNK", 4)
    matrix = head()
    tokens: list[int] = []

    def counted(hidden: Tensor) -> Tensor:
        tokens.append(hidden.shape[0])
        logits: Tensor = matrix(hidden)
        return logits

    student, teacher = hidden_states()
    found = fidelity_sum(student, teacher, counted, padding(), kind)
    node: Any = found.grad_fn
    assert [saved.shape for saved in node.saved_tensors] == [student.shape]  # no logits are kept
    found.backward()
    assert max(tokens) == 4 and sum(tokens) == 2 * BATCH * LENGTH  # each is computed once


@pytest.mark.parametrize("kind", KINDS)
def test_equal_predictions_are_no_difference(kind: LossKind) -> None:
    student, _ = hidden_states()
    same = fidelity_sum(student, student.detach(), head(), padding(), kind)
    assert abs(same.item()) < 1e-12
    (gradient,) = torch.autograd.grad(same, student)
    assert gradient.abs().max() < 1e-12


def test_fidelity_is_kl_of_torchs_distributions() -> None:
    student, teacher = hidden_states()
    p, q = (torch.distributions.Categorical(logits=head()(t)) for t in (teacher, student))
    expected = (torch.distributions.kl_divergence(p, q) * padding()).sum()
    found = fidelity_sum(student, teacher, head(), padding(), "relative")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


# ---- agreement ----


@pytest.mark.parametrize("chunk", [4, 2048])
def test_agreement(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(losses, "_CHUNK", chunk)
    student, teacher = hidden_states()
    student = teacher + 0.3 * student  # so that some predictions agree and some do not
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)
    weights, matrix = padding(), head()
    found = agreement(student, teacher, matrix, ids, weights)
    ours, theirs = matrix(student), matrix(teacher)
    # as in transformers: a label per token, logits shifted by one, padding is -100
    labels = ids.masked_fill(weights == 0, -100)[:, 1:].flatten()

    def cross_entropy(logits: Tensor) -> Tensor:
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels, reduction="sum")

    torch.testing.assert_close(found.loss, cross_entropy(ours), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.base_loss, cross_entropy(theirs), rtol=1e-12, atol=0)
    assert found.predicted.item() == 4 + 2 + 0  # nothing predicts the first token of a row
    assert found.tokens.item() == 5 + 3 + 1
    torch.testing.assert_close(
        found.kl, spelled_out(student, teacher, weights, "relative"), rtol=1e-12, atol=0
    )
    same = (ours.argmax(-1) == theirs.argmax(-1)) & (weights == 1)
    assert 0 < same.sum() < 9, "a case that shows nothing"
    assert found.agreed.item() == same.sum().item()


def test_what_stands_in_the_padding_does_not_matter() -> None:
    student, teacher = hidden_states()
    ids = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) % VOCABULARY
    where = padding() == 0
    other = [t.detach().masked_fill(where[..., None], 7.0) for t in (student, teacher)]
    first = agreement(student, teacher, head(), ids, padding())
    second = agreement(*other, head(), ids.masked_fill(where, 2), padding())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ---- the first token ----


def test_sink_errors_are_relative_to_the_layers_output() -> None:
    generator = torch.Generator().manual_seed(3)
    output, target, hidden = (
        torch.randn(BATCH, LENGTH, 8, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    found = sink_errors(output, target, hidden)
    first = [(t[:, 0] ** 2).sum(-1) for t in (output - target, hidden)]
    torch.testing.assert_close(found.double(), first[0] / first[1], rtol=1e-6, atol=0)
    other = output.clone()
    other[:, 1:] += 1
    assert torch.equal(sink_errors(other, target, hidden), found)
