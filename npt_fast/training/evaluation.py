"""Measure how close a model with NP layers comes to its base model on held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from npt_fast.errors import ModelError
from npt_fast.hf.convert import components
from npt_fast.hf.tokenizer import encode
from npt_fast.training.distillation import Distillation, Losses
from npt_fast.training.token_windows import TokenWindows


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Results in student mode: each layer reads what the NPT model itself computes.

    Attributes:
        tokens: number of positions measured, including the first of each window.
        perplexity: perplexity of the NPT model.
        base_perplexity: perplexity of the base model on the same text.
        kl: mean KL(base model, NPT model) over all positions, in nats.
        top1_agreement: share of positions where both models rank the same next token first.
        loss: the loss that training minimises, mean over tokens.
        direct: direct loss of each layer, mean over tokens.
    """

    tokens: int
    perplexity: float
    base_perplexity: float
    kl: float
    top1_agreement: float
    loss: float
    direct: Mapping[int, float]


def collate(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Stack windows into a batch.

    Returns:
        ``input_ids (B, S)``, ``windows (B,)``, ``labels (B, S)`` with -100 on padding, and
        ``attention_mask (B, S)`` if there is padding.
    """
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    mask = batch.pop("attention_mask")
    # Trainer counts labels, so that each token of an optimizer step has the same weight
    labels = batch["input_ids"].masked_fill(mask == 0, -100)
    padded = {} if bool(mask.all()) else {"attention_mask": mask}
    return {**padded, "input_ids": batch["input_ids"], "windows": batch["window"], "labels": labels}


@torch.no_grad()
def evaluate_windows(
    distillation: Callable[..., Losses],
    windows: Sequence[Mapping[str, Tensor]],
    *,
    batch_size: int,
    device: torch.device,
    sum_over_processes: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Evaluation:
    """Evaluate on windows.

    Args:
        distillation: a `Distillation`, or one wrapped for several processes.
        windows: windows as `TokenWindows.held_out_windows` returns them.
        batch_size: windows per batch.
        device: device of the model.
        sum_over_processes: adds up a tensor of sums over processes that evaluate other windows.
    """
    sums: Tensor | None = None
    layers: list[int] = []
    for start in range(0, len(windows), batch_size):
        batch = collate(windows[start : start + batch_size])
        del batch["labels"], batch["windows"]
        losses = distillation(**{k: v.to(device) for k, v in batch.items()}, evaluate=True)
        assert losses.agreement is not None
        layers = list(losses.direct)
        row = torch.stack(
            [
                *losses.agreement,
                losses.total.double(),
                *(d.double() for d in losses.direct.values()),
            ]
        )
        sums = row if sums is None else sums + row
    assert sums is not None
    loss, base_loss, predicted, kl, agreed, tokens, whole, *direct = sum_over_processes(
        sums
    ).tolist()
    return Evaluation(
        tokens=int(tokens),
        perplexity=_exp(loss / predicted),
        base_perplexity=_exp(base_loss / predicted),
        kl=kl / tokens,
        top1_agreement=agreed / tokens,
        loss=whole / tokens,
        direct={layer: value / tokens for layer, value in zip(layers, direct, strict=True)},
    )


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf  # exp(710) overflows a float


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    data: str = "python-docs",
    *,
    windows: int = 100,
    max_length: int = 512,
    batch_size: int = 4,
) -> Evaluation:
    """Evaluate a model with NP layers on the text that training with these options holds out.

    Args:
        model: model with NP layers; layers that are off count as part of the base model.
        tokenizer: the model's tokenizer.
        data: text, as for `TrainOptions.data`.
        windows: number of windows.
        max_length: tokens per window.
        batch_size: windows per batch.

    Raises:
        DataError: the text cannot be read, or there is too little of it.
        ModelError: the model has no NP layers, or all are off.
    """
    if not any(part.enabled for part in components(model).values()):
        raise ModelError("the model has no NP layers that are on")
    held_out = TokenWindows(
        data, tokenizer, max_length=max_length, held_out=windows
    ).held_out_windows()
    device = next(model.parameters()).device
    return evaluate_windows(Distillation(model), held_out, batch_size=batch_size, device=device)


@torch.no_grad()
def continue_text(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    """Continue a text greedily by `tokens` tokens; return what follows the prompt."""
    inputs = encode(tokenizer, prompt, return_tensors="pt").to(model.device)
    found = model.generate(
        **inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
    text: str = tokenizer.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text
