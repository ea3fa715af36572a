"""Speed of generating text with an injection, compared with no injection, on this machine.

It uses SmolLM2-135M with the two trained layers of tests/data, greedy decoding, and an injection
into both layers. ``python -m benchmarks.bench_inject`` prints a table and saves it in
``benchmarks/results``; ``pytest benchmarks/bench_inject.py`` runs the same under pytest-benchmark.
Every generation directly follows one with no injection, and the ratio is to that one, so that a
busy minute slows both alike.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import npt_fast as npt
from npt_fast.benchmarks.harness import ROOT, machine_facts, save
from npt_fast.hf.base_model import SMOLLM2, load_base_model
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
    ids = tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False).input_ids
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
    """Seconds of each round, those of the baseline before it, and tokens that each pass read."""

    seconds: list[float]
    baseline: list[float]
    lengths: list[int]


def run_rounds(rounds: int) -> dict[str, Row]:
    """Run all ways in turn, after a warm-up round."""
    baseline = generation(None)
    generate = {way: generation(options) for way, options in WAYS.items()}
    found = {way: Row([], [], []) for way in WAYS}
    for number in range(rounds + 1):
        for way, run in generate.items():
            begun = time.perf_counter()
            baseline()
            between = time.perf_counter()
            found[way].lengths[:] = run()
            if number:
                found[way].baseline.append(between - begun)
                found[way].seconds.append(time.perf_counter() - between)
        print(f"  round {number} of {rounds}", file=sys.stderr)
    return found


def ways_table(found: dict[str, Row]) -> str:
    """The ways as a Markdown table."""
    heads = ("injection", "s", "without, s", "ratio", "min", "max", "passes, tokens")
    body = []
    for way, (times, baseline, lengths) in found.items():
        ratios = [own / other for own, other in zip(times, baseline, strict=True)]
        body.append(
            (
                way, f"{statistics.median(times):.2f}", f"{statistics.median(baseline):.2f}",
                f"{statistics.median(ratios):.3f}", f"{min(ratios):.3f}", f"{max(ratios):.3f}",
                passes(lengths),
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
    rows = {way: row._asdict() for way, row in found.items()}
    text = f"{ways_table(found)}\n\n{note}"
    document = {"machine": facts, "rows": rows}
    return save("inject", "Generating with an injection", facts, text, document)


@pytest.mark.parametrize("way", WAYS)
def test_generation(benchmark: Any, way: str) -> None:
    """One row of the table, as pytest-benchmark sees it."""
    benchmark.group = f"{TOKENS} tokens, SmolLM2-135M"
    benchmark.name = way
    benchmark.pedantic(generation(WAYS[way]), rounds=3, warmup_rounds=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="generations of each way")
    parser.add_argument("--no-save", action="store_true", help="only print")
    options = parser.parse_args()
    found = run_rounds(options.rounds)
    print(ways_table(found))
    if not options.no_save:
        print(f"Saved to {save_results(found, options.rounds)}")


if __name__ == "__main__":
    main()
