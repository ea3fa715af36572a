"""How well a model with NP layers stands for its base model, on text that it was not trained on."""

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
    """Figures in student mode: every layer on what the trained model itself computes.

    Attributes:
        tokens: positions that count, all of them, the first of every window too.
        perplexity: of the model with its NP layers.
        base_perplexity: of the base model on the same text.
        kl: mean KL(base, model) over all positions, nats.
        top1_agreement: share of positions where both find the same next token likeliest.
        loss: what training minimises.
        direct: error of every layer.
    """

    tokens: int
    perplexity: float
    base_perplexity: float
    kl: float
    top1_agreement: float
    loss: float
    direct: Mapping[int, float]


def collate(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Windows to a batch: ``input_ids (B, S)``, ``windows (B,)``, a mask where there is padding."""
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    mask = batch.pop("attention_mask")
    # the trainer counts labels to weigh tokens equally over a whole optimizer step
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
        distillation: a `Distillation`, wrapped for several processes or not.
        windows: as `TokenWindows.held_out_windows` gives them.
        batch_size: windows at a time.
        device: of the model.
        sum_over_processes: sums over processes, each with windows of its own.
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
    return math.exp(value) if value < 700 else math.inf


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    data: str = "python-docs",
    *,
    windows: int = 100,
    max_length: int = 512,
    batch_size: int = 4,
) -> Evaluation:
    """Evaluate a model with NP layers on held-out text: what training with these options holds out.

    Args:
        model: with converted layers; those that are off count as the base model's.
        tokenizer: of the model.
        data: as `TrainOptions.data`.
        windows: how many.
        max_length: tokens per window.
        batch_size: windows at a time.

    Raises:
        DataError: the text cannot be read, or is too little.
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
    """What the model finds likeliest to follow a text."""
    inputs = encode(tokenizer, prompt, return_tensors="pt").to(model.device)
    found = model.generate(
        **inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
    text: str = tokenizer.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


def default_device() -> str:
    """A GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"
