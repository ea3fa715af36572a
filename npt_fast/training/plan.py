"""Plan in which order a model's layers are converted, and measure how far that goes.

A short run that trains all layers is enough: each layer alone tells how hard it is to replace, and
the layers that are closest to the base model come first. A random order is the control.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from time import perf_counter

from torch import nn

from npt_fast.arguments import Positive, check_arguments
from npt_fast.config import Progress
from npt_fast.errors import ModelError
from npt_fast.hf.convert import components, decoder_layers, disabled, status
from npt_fast.hf.tokenizer import Tokenizer
from npt_fast.layer_names import LayerList, check_layers, chosen_layers
from npt_fast.tables import Report
from npt_fast.text_sources import TextData, data_name
from npt_fast.training.evaluation import Evaluation, open_evaluation
from npt_fast.training.teacher_pass import trained_layers

COUNTS = (1, 3, 10, 20, 30)


@dataclass(frozen=True, slots=True)
class Measured:
    """How close the model is to its base model with some of its NP layers on, the others off.

    Attributes:
        layers: layers that were on, ascending.
        tokens: number of positions of the held-out text.
        kl: mean KL(base model, NPT model) on the held-out text, in nats; None if it is not finite.
        perplexity_ratio: perplexity of the NPT model over that of the base model on that text;
            None if it is not finite.
        worst: the largest ``kl`` and the largest ``perplexity_ratio`` on texts of other kinds, as
            in `npt_fast.Evaluation`.
        nbytes: bytes of the layers' NP weights.
        seconds: time that the measurement took, on all these texts.
    """

    layers: tuple[int, ...]
    tokens: int
    kl: float | None
    perplexity_ratio: float | None
    worst: Mapping[str, float | None]
    nbytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Prefix:
    """The first layers of the plan's order, and as many of a random order.

    Attributes:
        count: number of layers.
        planned: the plan's first layers together.
        control: the random order's first layers together.
    """

    count: int
    planned: Measured
    control: Measured


@dataclass(frozen=True, slots=True, repr=False)
class Plan(Report):
    """The results of `npt.plan`.

    Attributes:
        data: name of the text that `Measured.kl` was measured on.
        seed: seed of the random order.
        order: layers in the order in which to convert them: the lowest KL alone comes first, and
            of equal ones the lower layer.
        random_order: the same layers in a random order.
        alone: each layer alone, in the plan's order.
        prefixes: the first layers of both orders, by ascending count; the last has all layers.
    """

    data: str
    seed: int
    order: tuple[int, ...]
    random_order: tuple[int, ...]
    alone: tuple[Measured, ...]
    prefixes: tuple[Prefix, ...]

    @property
    def facts(self) -> dict[str, object]:
        """The order and how close the model stays, in short."""
        together = self.prefixes[-1].planned
        return {
            "order": ", ".join(map(str, self.order)),
            "KL of the first alone": self.alone[0].kl,
            "KL of all": together.kl,
            "data": self.data,
        }


@check_arguments
def plan(
    model: nn.Module,
    tokenizer: Tokenizer,
    data: TextData = "python-docs",
    *,
    layers: LayerList | None = None,
    counts: Sequence[Positive] = COUNTS,
    seed: int = 42,
    windows: Positive = 10,
    max_length: Positive = 512,
    batch_size: Positive = 4,
    special_tokens: bool = True,
    first_tokens: Sequence[str] = (),
    text_column: str | None = None,
    chat_template: str | Path | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Plan in which order layers are converted: those that are closest to the base model first.

    Each layer is evaluated alone, which gives the order. Then its first layers are evaluated
    together, and as many layers of a random order. No set of layers is evaluated twice. Afterwards
    the same NP layers are on as before.

    Args:
        model: model with NP layers, as from a short run that trained all of them.
        tokenizer: the model's tokenizer.
        data: text, as for `npt_fast.evaluate`; only what training holds out is used.
        layers: layers to plan, as for `npt_fast.disabled`; all NP layers that are on if not given.
        counts: numbers of layers to measure together; larger ones than there are layers mean all,
            which are always measured.
        seed: seed of the random order.
        windows: number of windows of each evaluation.
        max_length: as for `npt_fast.evaluate`, and so are the following.
        batch_size: windows per batch.
        special_tokens: let the tokenizer add its special tokens, such as BOS, to each document.
        first_tokens: texts that rows of a sampled text begin with.
        text_column: column of the documents, as for `npt_fast.evaluate`.
        chat_template: file of a chat template, likewise.
        progress: called while a text is sampled, and after each evaluation with their number.

    Raises:
        DataError: the text cannot be read, or there is too little of it.
        ModelError: no NP layer is on, or one of `layers` is not.
        OptionError: `layers` is empty or names a layer twice, or a count is below 1.
    """
    on = list(trained_layers(model))
    if layers is not None:
        check_layers(layers)
    chosen = sorted(chosen_layers(layers, on, len(decoder_layers(model))))
    for layer in chosen:
        if layer not in on:
            raise ModelError(f"layer {layer} is no NP layer that is on; these are {on}")
    evaluate = open_evaluation(
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
    )
    found: dict[tuple[int, ...], Measured] = {}

    def measure(activity: str, sets: Iterable[Sequence[int]]) -> list[Measured]:
        wanted = [tuple(sorted(layers)) for layers in sets]
        fresh = [layers for layers in dict.fromkeys(wanted) if layers not in found]
        for number, layers in enumerate(fresh, 1):
            found[layers] = _measured(model, layers, evaluate)
            if progress is not None:
                progress(activity, number, len(fresh))
        return [found[layers] for layers in wanted]

    alone = sorted(measure("Each layer alone", [[layer] for layer in chosen]), key=_distance)
    order = [layer for one in alone for layer in one.layers]
    random_order = Random(seed).sample(chosen, len(chosen))
    numbers = sorted({min(count, len(chosen)) for count in (*counts, len(chosen))})
    firsts = [each[:count] for count in numbers for each in (order, random_order)]
    together = measure("Layers together", firsts)
    prefixes = map(Prefix, numbers, together[::2], together[1::2])
    return Plan(
        data_name(data), seed, tuple(order), tuple(random_order), tuple(alone), tuple(prefixes)
    )


def _measured(
    model: nn.Module, layers: tuple[int, ...], evaluate: Callable[[], Evaluation]
) -> Measured:
    """Evaluate with these layers on, which are on already, and all others off."""
    start = perf_counter()
    with disabled(model, [layer for layer in components(model) if layer not in layers]):
        figures = evaluate()
    seconds = perf_counter() - start
    nbytes = sum(one.nbytes for one in status(model) if one.layer in layers)
    near = figures.closeness
    return Measured(
        layers, near.tokens, near.kl, near.perplexity_ratio, figures.worst, nbytes, seconds
    )


def _distance(measured: Measured) -> float:
    return math.inf if measured.kl is None else measured.kl
