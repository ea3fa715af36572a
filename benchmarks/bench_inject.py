"""Speed of generating text with an injection, compared with no injection, on this machine.

It uses SmolLM2-135M with the two trained layers of tests/data, greedy decoding, and an injection
into both layers. ``python -m benchmarks.bench_inject`` prints a table and saves it in
``benchmarks/results``; ``pytest benchmarks/bench_inject.py`` runs the same under pytest-benchmark.
Every generation directly follows one with no injection, and the ratio is to that one, so that a
busy minute slows both alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import npt_fast as npt
from npt_fast.benchmarks.harness import (
    ROOT,
    Timed,
    machine_facts,
    report,
    save,
    time_in_turn,
)
from npt_fast.hf.base_model import load_base_model
from npt_fast.hf.model_folder import SMOLLM2
from npt_fast.hf.tokenizer import read
from npt_fast.tables import markdown_table

CHECKPOINTS = ("layer11/checkpoint-800", "layer13/checkpoint-600")
TOKENS = 64
SOURCE = "The capital of France is"
PROMPT = (
    "Berlin lies on the Spree and has been the capital of Germany, with an interruption, since "
    "1871. Travellers who come by train arrive at the central station, from which it is a walk of "
    "a few minutes to the parliament. The capital of Germany is"
)
# way -> options of the injection
WAYS: dict[str, dict[str, Any]] = {
    "replace, last token of the prompt": {"mode": "replace"},
    "replace, all tokens, generated ones too": {
        "mode": "replace", "position": "all", "when": "both",
    },
    "blend, all tokens, generated ones too": {
        "mode": "blend", "strength": 0.5, "position": "all", "when": "both",
    },
    "exact-add, all tokens, generated ones too": {
        "mode": "exact-add", "position": "all", "when": "both",
    },
}  # fmt: skip


class Setup(NamedTuple):
    """A model with trained layers, the modulation to inject, and the prompt's ids."""

    model: Any
    modulation: npt.Modulation
    ids: torch.Tensor


@cache
def setup() -> Setup:
    """The setup in float32, loaded once."""
    model, tokenizer = load_base_model(SMOLLM2)
    for checkpoint in CHECKPOINTS:
        npt.load(model, ROOT / "tests/data/smollm2_135m" / checkpoint)
    ids = torch.tensor([read(tokenizer, PROMPT).ids])
    return Setup(model, npt.extract(model, tokenizer, SOURCE), ids)


def generation(options: dict[str, Any] | None) -> Callable[[], list[int]]:
    """A function that generates `TOKENS` tokens, and returns how many tokens each pass read.

    Args:
        options: options of the injection; None means no injection.
    """
    model, modulation, ids = setup()

    def generate() -> list[int]:
        lengths: list[int] = []

        def note(_: Any, args: Any, kwargs: Any) -> None:
            lengths.append(kwargs["input_ids"].shape[1])

        hook = model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
        context = nullcontext() if options is None else npt.inject(model, modulation, **options)
        with context:
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=TOKENS,
                # no end-of-text token may end one of both earlier
                min_new_tokens=TOKENS,
                do_sample=False,
            )
        hook.remove()
        if out.shape[1] != ids.shape[1] + TOKENS:
            raise AssertionError(f"{out.shape[1] - ids.shape[1]} tokens, not {TOKENS}")
        return lengths

    return generate


class Row(NamedTuple):
    """Times of one way, and how many tokens each pass read."""

    times: Timed
    lengths: list[int]


def run_rounds(rounds: int) -> dict[str, Row]:
    """Run all ways in turn, each after a generation with no injection."""
    generate = {way: generation(options) for way, options in WAYS.items()}
    lengths: dict[str, list[int]] = {}

    def noting(way: str) -> None:
        lengths[way] = generate[way]()

    times = time_in_turn(generation(None), {way: partial(noting, way) for way in WAYS}, rounds)
    return {way: Row(times[way], lengths[way]) for way in WAYS}


def ways_table(found: dict[str, Row]) -> str:
    """The ways as a Markdown table."""
    heads = ("injection", "s", "without, s", "ratio", "min", "max", "passes, tokens")
    body = []
    for way, (times, lengths) in found.items():
        body.append(
            (
                way, f"{statistics.median(times.seconds):.2f}",
                f"{statistics.median(times.baseline):.2f}",
                *(f"{ratio:.3f}" for ratio in times.ratios()), passes(lengths),
            )
        )  # fmt: skip
    return markdown_table(heads, body)


def passes(lengths: list[int]) -> str:
    """``[43, 1, 1, 1]`` -> ``1 of 43, 3 of 1``."""
    counts = {n: lengths.count(n) for n in lengths}
    return ", ".join(f"{count} of {n}" for n, count in counts.items())


def save_results(found: dict[str, Row], rounds: int) -> Path:
    """Write the table and the raw numbers; return the path of the table."""
    facts = machine_facts("torch", "transformers") | {
        "threads": str(torch.get_num_threads()),
        "model": "SmolLM2-135M, float32, NP layers 11 and 13 (tests/data), KV cache",
        "task": f"{setup().ids.shape[1]} tokens of prompt, {TOKENS} generated, greedy",
        "command": f"`python -m benchmarks.bench_inject`; medians of {rounds} rounds in turn",
    }
    note = (
        "`ratio` is the median of the rounds' ratios, each to the generation with nothing injected "
        "right before.\nThe last column counts how often the model ran over how many tokens: "
        "the prompt once, then token by token."
    )
    rows = {way: times._asdict() | {"lengths": lengths} for way, (times, lengths) in found.items()}
    text = f"{ways_table(found)}\n\n{note}"
    document = {"machine": facts, "rows": rows}
    return save("inject", "Generating with an injection", facts, text, document)


@pytest.mark.parametrize("way", WAYS)
def test_generation(benchmark: Any, way: str) -> None:
    """One row of the table, as pytest-benchmark sees it."""
    benchmark.group = f"{TOKENS} tokens, SmolLM2-135M"
    benchmark.name = way
    benchmark.pedantic(generation(WAYS[way]), rounds=3, warmup_rounds=1)


if __name__ == "__main__":
    report(__doc__, run_rounds, ways_table, save_results)
