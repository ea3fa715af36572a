"""Measure what injections do to right and injected answers, for 24 countries and their capitals.

    python examples/country_capitals.py experiments/merged_11_13_23 > tables.md

The last token of each country's prompts receives the modulation of the next country in the list.
Paraphrases and unrelated prompts are controls. The results are in docs/transfer_report.md.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

import npt_fast as npt
from npt_fast.hf.base_model import load_base_model
from npt_fast.hf.convert import decoder_layers
from npt_fast.hf.tokenizer import first_token, read
from npt_fast.tables import markdown_table
from npt_fast.transfer.compare import divergences
from npt_fast.transfer.trace import trace

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo",
    "China": "Beijing", "Russia": "Moscow", "Egypt": "Cairo", "England": "London",
    "Greece": "Athens", "Austria": "Vienna", "Poland": "Warsaw", "Sweden": "Stockholm",
    "Norway": "Oslo", "Ireland": "Dublin", "Portugal": "Lisbon", "Hungary": "Budapest",
    "Turkey": "Ankara", "Canada": "Ottawa", "Cuba": "Havana", "Kenya": "Nairobi", "Peru": "Lima",
    "Iran": "Tehran", "Iraq": "Baghdad",
}  # fmt: skip
PROMPT = "The capital of {} is"
PARAPHRASES = [
    "The capital city of {} is",
    "{}'s capital is",
    "The government of {} has its seat in the city of",
]
CONTROLS = [
    "Two plus two is", "The sun rises in the", "Water freezes at", "The opposite of hot is",
    "The colour of the sky is", "A dog is a kind of", "The largest planet is",
    "Shakespeare wrote", "Bread is made from", "The first month of the year is",
    "Cows give", "The heart pumps", "A triangle has three", "Bees make",
    "The Earth goes around the", "She opened the door and", "import numpy as", "Once upon a",
    "My favourite food is", "The chemical symbol of gold is", "Fish live in",
    "The author of the book is", "The answer to the question is", "The price of the car is",
]  # fmt: skip
MODES = ("replace", "blend", "add", "exact-blend", "exact-add")
STRENGTHS = (0.5, 1.0, 2.0, 3.0)


class Batch:
    """Prompts in a KV cache, all but the last token, so that an injection reads one token."""

    def __init__(self, model: Any, tokenizer: Any, prompts: Sequence[str]) -> None:
        self.model = model
        rows = [read(tokenizer, prompt).ids for prompt in prompts]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        self.mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        self.places = (self.mask.cumsum(1) - 1).clamp_min(0)
        self.last = ids[:, -1:]
        with torch.no_grad():
            self.cache = model(
                input_ids=ids[:, :-1], attention_mask=self.mask[:, :-1],
                position_ids=self.places[:, :-1], use_cache=True, logits_to_keep=1,
            ).past_key_values  # fmt: skip

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Logits of the next token, ``(prompts, vocab)``, under the injection that is active."""
        out = self.model(
            input_ids=self.last, attention_mask=self.mask, position_ids=self.places[:, -1:],
            past_key_values=self.cache, use_cache=True,
        )  # fmt: skip
        self.cache.crop(-1)
        logits: Tensor = out.logits[:, -1].float()
        return logits


class Row(NamedTuple):
    """A prompt, with the first token of the right answer and of the injected answer."""

    group: str
    prompt: str
    right: int
    injected: int


def main() -> None:
    """Print the tables."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    begun = time.perf_counter()
    model, tokenizer = load_base_model("smollm2-135m")
    countries = list(CAPITALS)
    sources = [*countries[1:], countries[0]]

    def first(country: str) -> int:
        return first_token(tokenizer, f" {CAPITALS[country]}")

    rows = [
        Row(group, text.format(country), first(country), first(source))
        for group, texts in (("prompt", [PROMPT]), ("paraphrase", PARAPHRASES))
        for text in texts
        for country, source in zip(countries, sources, strict=True)
    ] + [
        Row("control", text, first(source), first(source))
        for text, source in zip(CONTROLS, sources, strict=True)
    ]
    assert all(row.right != row.injected for row in rows if row.group != "control")
    trace_pairs(model, tokenizer, countries, sources)
    prompts = [row.prompt for row in rows]
    base = Batch(model, tokenizer, prompts).logits()

    npt.load(model, sys.argv[1])
    layers = [status.layer for status in npt.status(model)]
    heads = [
        "source", "mode", "strength",
        "right", "injected", "above", "top",
        "right, p", "injected, p", "above, p",
        "KL, c", "kept, c", "injected, c",
    ]  # fmt: skip
    for on in ([layers[-1]], layers):
        off = [layer for layer in layers if layer not in on]
        with npt.disabled(model, off) if off else nullcontext():
            batch = Batch(model, tokenizer, prompts)
            before = batch.logits()
            body = [
                ["base model", "-", "-", *figures(rows, base, base)],
                ["no injection", "-", "-", *figures(rows, base, before)],
            ]
            for kind, mode, strength in settings():
                found = [modulation(model, tokenizer, source, kind) for source in sources]
                # the last token is read alone, behind a cache, so to `inject` it is a generated one
                with npt.inject(
                    model, found * (len(rows) // len(found)), mode=mode, strength=strength,
                    when="decode",
                ):  # fmt: skip
                    after = batch.logits()
                body.append([kind, mode, f"{strength:g}", *figures(rows, before, after)])
        print(f"## NP layers {', '.join(map(str, on))}\n\n{markdown_table(heads, body)}\n")
    print(f"{time.perf_counter() - begun:.0f} s, {torch.get_num_threads()} threads")


def settings() -> Iterator[tuple[str, Any, float]]:
    """Source, mode and strength of each row of the table."""
    yield from product(["last"], MODES, STRENGTHS)
    yield from product(["sequence"], ["replace"], STRENGTHS)


def modulation(model: Any, tokenizer: Any, country: str, kind: str) -> npt.Modulation:
    """Extract at the prompt's last token, or the mean over prompt and answer (`sequence`)."""
    text = PROMPT.format(country)
    if kind == "last":
        return npt.extract(model, tokenizer, text)
    text = f"{text} {CAPITALS[country]}"
    return npt.extract(model, tokenizer, text, position="all", reduce="mean")


def figures(rows: Sequence[Row], before: Tensor, after: Tensor) -> list[str]:
    """Cells of a row: mean probabilities and shares in each group of prompts."""
    probabilities = after.softmax(-1)
    right = torch.tensor([row.right for row in rows])
    injected = torch.tensor([row.injected for row in rows])
    p_right, p_injected = (probabilities.gather(1, t[:, None])[:, 0] for t in (right, injected))
    top = after.argmax(-1)
    kl = torch.tensor(divergences(before, after))
    asked, reworded, control = (
        torch.tensor([row.group == group for row in rows])
        for group in ("prompt", "paraphrase", "control")
    )

    def share(found: Tensor, group: Tensor) -> str:
        return f"{int(found[group].sum())}/{int(group.sum())}"

    def mean(values: Tensor, group: Tensor) -> str:
        return f"{values[group].mean().item():.3f}"

    above = p_injected > p_right
    return [
        mean(p_right, asked), mean(p_injected, asked),
        share(above, asked), share(top == injected, asked),
        mean(p_right, reworded), mean(p_injected, reworded), share(above, reworded),
        f"{kl[control].median().item():.3f}", share(top == before.argmax(-1), control),
        mean(p_injected, control),
    ]  # fmt: skip


def trace_pairs(
    model: Any, tokenizer: Any, countries: Sequence[str], sources: Sequence[str]
) -> None:
    """Patch the attention outputs themselves in the base model: an upper bound for injections."""
    strongest: list[int] = []
    flips: list[int] = []  # layers whose patch puts the injected answer on top
    others: list[int] = []  # layers whose patch puts another answer on top
    tracked = torch.zeros(len(decoder_layers(model)), 2)  # mean probability: right, injected
    for country, source in zip(countries, sources, strict=True):
        answers = [f" {CAPITALS[name]}" for name in (country, source)]
        found = trace(
            model, tokenizer, PROMPT.format(source), PROMPT.format(country), tracked=answers
        )
        strongest += found.strongest.layers
        for patch in found.decisive:
            (flips if patch.top == found.tracked[1] else others).extend(patch.layers)
        tracked += torch.tensor([patch.tracked for patch in found.patches]) / len(countries)
    body = [
        [
            str(layer),
            *(str(layers.count(layer)) for layers in (strongest, flips, others)),
            *(f"{value:.3f}" for value in tracked[layer].tolist()),
        ]
        for layer in sorted({*strongest, *flips, *others})
    ]
    heads = ["layer", "strongest", "injected on top", "another on top", "right", "injected"]
    print(f"## Attention outputs, base model\n\n{markdown_table(heads, body)}\n")


if __name__ == "__main__":
    main()
