"""Measure how close a model with NP layers comes to its base model on held-out text."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from npt_fast.arguments import Positive, check_arguments
from npt_fast.checkpoint.certificate import Certificate, Closeness, finite_or_none, worst_of
from npt_fast.config import Progress
from npt_fast.errors import DataError, ModelError, NPTWarning
from npt_fast.hf.convert import components
from npt_fast.hf.tokenizer import DEFAULT_READING, Reading, Tokenizer, read
from npt_fast.tables import Report
from npt_fast.text_sources import TextData
from npt_fast.training.data import default_data, open_windows
from npt_fast.training.distillation import Distillation, Losses
from npt_fast.training.other_texts import other_texts


@dataclass(frozen=True, slots=True, repr=False)
class Figures(Report):
    """Results on one text in student mode: each layer reads what the NPT model itself computes.

    Attributes:
        tokens: number of positions measured, including the first of each window.
        perplexity: perplexity of the NPT model.
        base_perplexity: perplexity of the base model on the same text.
        perplexity_ratio: `perplexity` over `base_perplexity`.
        kl: mean KL(base model, NPT model) over all positions, in nats.
        top1_agreement: share of positions where both models rank the same next token first.
        loss: the loss that training minimises, mean over tokens.
        direct: direct loss of each layer, mean over tokens.
    """

    tokens: int
    perplexity: float
    base_perplexity: float
    perplexity_ratio: float
    kl: float
    top1_agreement: float
    loss: float
    direct: Mapping[int, float]

    @property
    def facts(self) -> dict[str, object]:
        """The figures that compare two models, in short."""
        return {
            "KL": f"{self.kl:.4g} nats",
            "perplexity": f"{self.perplexity:.4g}",
            "base model's perplexity": f"{self.base_perplexity:.4g}",
            "top-1 agreement": f"{self.top1_agreement:.4g}",
            "tokens": self.tokens,
        }

    def numbers(self) -> dict[str, float]:
        """The figures by the names that Trainer has for them, without the prefix ``eval_``."""
        found = {f.name: getattr(self, f.name) for f in fields(Figures) if f.name != "direct"}
        return {**found, **{f"direct_layer_{n}": value for n, value in self.direct.items()}}

    @property
    def closeness(self) -> Closeness:
        """The figures that a certificate keeps."""
        return Closeness(
            self.tokens, finite_or_none(self.kl), finite_or_none(self.perplexity_ratio)
        )


@dataclass(frozen=True, slots=True, repr=False)
class Evaluation(Figures):
    """Figures on text like the training text, as in `Figures`, and on texts of other kinds.

    Attributes:
        texts: figures on each text of another kind: ``news``, ``story``, ``code`` and ``french``.
        worst: the largest ``kl`` and the largest ``perplexity_ratio`` over `texts`, each by itself;
            None for a figure that is not finite.
    """

    texts: Mapping[str, Figures]
    worst: Mapping[str, float | None]

    @property
    def facts(self) -> dict[str, object]:
        """The same, and the worst of the texts of other kinds."""
        worst = {f"worst {name}": value for name, value in self.worst.items()}
        return {**super(Evaluation, self).facts, **worst}

    @classmethod
    def of(cls, held_out: Figures, texts: Mapping[str, Figures]) -> Evaluation:
        """Join the figures on the held-out text and those on texts of other kinds."""
        worst = worst_of(figures.closeness for figures in texts.values())
        return cls(**asdict(held_out), texts=texts, worst=worst)

    def metrics(self) -> dict[str, float]:
        """The figures by the names that the log has for them (design.md#metrics)."""
        return {
            "eval_loss/total": self.loss,
            "eval/perplexity": self.perplexity,
            "eval/base_perplexity": self.base_perplexity,
            "eval/perplexity_ratio": self.perplexity_ratio,
            "eval/kl": self.kl,
            "eval/top1_agreement": self.top1_agreement,
            **{f"eval_mlp_direct_loss/layer_{n}": value for n, value in self.direct.items()},
            **{f"eval_kl/{name}": text.kl for name, text in self.texts.items()},
            **{f"eval_perplexity_ratio/{n}": t.perplexity_ratio for n, t in self.texts.items()},
            **{f"eval_worst/{n}": math.nan if v is None else v for n, v in self.worst.items()},
        }

    def certificate(self, data: str | None, step: int | None = None) -> Certificate:
        """What checkpoints record of an evaluation.

        Args:
            data: name of the text that was held out.
            step: optimizer steps taken, if known.
        """
        texts = {name: figures.closeness for name, figures in self.texts.items()}
        return Certificate(tuple(self.direct), step, data, self.closeness, texts)


_INPUTS = ("input_ids", "attention_mask", "labels")


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


def evaluate_windows(
    distillation: Callable[..., Losses],
    windows: Sequence[Mapping[str, Tensor]],
    *,
    batch_size: int,
    device: torch.device,
    sum_over_processes: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Figures:
    """Evaluate on the windows of one text.

    Args:
        distillation: a `Distillation`, or one wrapped for several processes.
        windows: windows of one text, as `TokenWindows.held_out_windows` returns them.
        batch_size: windows per batch.
        device: device of the model.
        sum_over_processes: adds up a tensor of sums over processes that evaluate other windows.
    """
    batches = (
        collate(windows[start : start + batch_size]) for start in range(0, len(windows), batch_size)
    )
    return evaluate_batches(
        distillation, batches, device=device, sum_over_processes=sum_over_processes
    )


@torch.no_grad()
def evaluate_batches(
    distillation: Callable[..., Losses],
    batches: Iterable[Mapping[str, Tensor]],
    *,
    device: torch.device,
    sum_over_processes: Callable[[Tensor], Tensor],
) -> Figures:
    """Evaluate on batches of ``input_ids``, with or without ``attention_mask`` and ``labels``; the
    other arguments are those of `evaluate_windows`.

    Raises:
        DataError: there is no batch, or no token to predict.
    """
    sums: Tensor | None = None
    layers: list[int] = []
    for batch in batches:
        inputs = {name: batch[name].to(device) for name in _INPUTS if name in batch}
        losses = distillation(**inputs, evaluate=True)
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
    if sums is None:
        raise DataError("there is nothing to evaluate on: the data set is empty")
    loss, base_loss, predicted, kl, agreed, tokens, whole, *direct = sum_over_processes(
        sums
    ).tolist()
    if not predicted:
        raise DataError("there is nothing to evaluate on: no row has a second token that counts")
    return Figures(
        tokens=int(tokens),
        perplexity=_exp(loss / predicted),
        base_perplexity=_exp(base_loss / predicted),
        perplexity_ratio=_exp((loss - base_loss) / predicted),
        kl=kl / tokens,
        top1_agreement=agreed / tokens,
        loss=whole / tokens,
        direct={layer: value / tokens for layer, value in zip(layers, direct, strict=True)},
    )


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf  # exp(710) overflows a float


@check_arguments
def evaluate(
    model: nn.Module,
    tokenizer: Tokenizer,
    data: TextData | None = None,
    *,
    windows: Positive = 100,
    max_length: Positive = 512,
    batch_size: Positive = 4,
    special_tokens: bool = True,
    first_tokens: Sequence[str] = (),
    text_column: str | None = None,
    chat_template: str | Path | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluate a model with NP layers on the text that training with these options holds out.

    It measures four texts of other kinds as well, which are in the package: a model that is close
    on text like its training text may be far away on another.

    Args:
        model: model with NP layers; layers that are off count as part of the base model.
        tokenizer: the model's tokenizer.
        data: text, as for `TrainOptions.data`; or a data set: a ``datasets.Dataset`` or
            ``IterableDataset``, or any iterable of such rows, of texts, or of lists of token ids,
            which starts anew whenever it is iterated. By default ``medium``, or ``self`` where that
            cannot be streamed, of which an `NPTWarning` tells.
        windows: number of windows.
        max_length: tokens per window.
        batch_size: windows per batch.
        special_tokens: let the tokenizer add its special tokens, such as BOS, to each document.
        first_tokens: texts that rows of a sampled text begin with, as for `sample_text`.
        text_column: column of the documents, as for `TrainOptions`, and so is `chat_template`.
        chat_template: file of a chat template.
        progress: called while a text is sampled, as by `sample_text`.

    Raises:
        DataError: the text cannot be read, or there is too little of it, or an object is no data
            set, or it lacks the column.
        ModelError: the model has no NP layers, or all are off; or the tokenizer has no chat
            template for chats.
    """
    if data is None:
        data = default_data(lambda line: warnings.warn(NPTWarning(line), stacklevel=5))
    return open_evaluation(
        model,
        tokenizer,
        data,
        windows=windows,
        max_length=max_length,
        batch_size=batch_size,
        special_tokens=special_tokens,
        first_tokens=first_tokens,
        text_column=text_column,
        chat_template=chat_template,
        progress=progress,
    )()


def open_evaluation(
    model: nn.Module,
    tokenizer: Any,
    data: TextData,
    *,
    windows: int,
    max_length: int,
    batch_size: int,
    special_tokens: bool,
    first_tokens: Sequence[str],
    text_column: str | None,
    chat_template: str | Path | None,
    progress: Progress | None,
) -> Callable[[], Evaluation]:
    """Read the texts of `evaluate`, whose arguments and errors these are.

    Returns:
        Evaluates the model with the NP layers that are on when it is called.
    """
    if not any(part.enabled for part in components(model).values()):
        raise ModelError("the model has no NP layers that are on")
    held_out = open_windows(
        data,
        model,
        tokenizer,
        max_length=max_length,
        held_out=windows,
        special_tokens=special_tokens,
        first_tokens=first_tokens,
        text_column=text_column,
        chat_template=chat_template,
        progress=progress,
    ).held_out_windows()
    texts = other_texts(model, tokenizer, special_tokens=special_tokens)
    device = next(model.parameters()).device
    distillation = Distillation(model)

    def measure(windows: Sequence[Mapping[str, Tensor]]) -> Figures:
        return evaluate_windows(distillation, windows, batch_size=batch_size, device=device)

    return lambda: Evaluation.of(
        measure(held_out), {name: measure(text) for name, text in texts.items()}
    )


def prompt_inputs(
    tokenizer: Any, prompt: str, reading: Reading, device: torch.device
) -> dict[str, Tensor]:
    """A prompt as ``generate`` takes it: ``input_ids`` and ``attention_mask``, ``(1, tokens)``."""
    ids = torch.tensor([read(tokenizer, prompt, reading).ids], device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def continue_text(
    model: Any, tokenizer: Any, prompt: str, tokens: int, reading: Reading = DEFAULT_READING
) -> str:
    """Continue a text greedily by `tokens` tokens; return what follows the prompt."""
    inputs = prompt_inputs(tokenizer, prompt, reading, model.device)
    found = model.generate(
        **inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
    text: str = tokenizer.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text
