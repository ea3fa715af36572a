"""Speed of decoding text with NP layers on SmolLM2-135M, compared with its base model.

Models are bfloat16 and their NP layers come from a checkpoint by `npt_fast.load`, as users have
them. ``python -m benchmarks.bench_generate`` (``make bench-generate``) prints a table and saves it
in ``benchmarks/results``; ``pytest benchmarks/bench_generate.py`` runs the same under
pytest-benchmark. All ways take turns in every round, directly after the base model, and the ratio
is to that generation, so that a busy minute slows both alike. Casts and launches are counted.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import npt_fast as npt
from npt_fast.benchmarks.harness import MB, Timed, machine_facts, report, save, time_in_turn
from npt_fast.benchmarks.step_counts import Counts, counts_of_token
from npt_fast.hf.base_model import load_base_model
from npt_fast.hf.convert import components
from npt_fast.hf.model_folder import SMOLLM2
from npt_fast.tables import markdown_table
from npt_fast.testing import implementation

LAYERS = (1, 3, 30)
RANK, NUM_RANKS = 256, 1  # the defaults
PROMPT, TOKENS = 32, 32
BASE = "base model"
# way -> options of `npt.load`, and the implementation that computes NP layers
WAYS: dict[str, tuple[dict[str, Any], str]] = {
    "npt.load": ({}, "auto"),
    "npt.load, trainable": ({"trainable": True}, "auto"),
    "npt.load, int8": ({"factors": "int8"}, "auto"),
    # v_a and v_b are formed for every token
    "the original's procedure": ({"trainable": True}, "reference"),
}


class Way(NamedTuple):
    """A model, the implementation of its NP layers, and how many there are."""

    model: Any
    implementation: str
    layers: int


@cache
def ways() -> dict[str, Way]:
    """All ways by name, the base model first."""
    base, _ = load_base_model(SMOLLM2, dtype="bfloat16")
    found = {BASE: Way(base, "auto", 0)}
    for count in LAYERS:
        checkpoint = _checkpoint(base, count)
        for name, (options, how) in WAYS.items():
            model = npt.load(copy.deepcopy(base), checkpoint, **options)
            found[f"{count} NP layer{'s' * (count > 1)}, {name}"] = Way(model, how, count)
    return found


def _checkpoint(base: Any, count: int) -> Path:
    """A checkpoint of `count` layers in the middle of the model, with random factors."""
    torch.manual_seed(0)
    model = copy.deepcopy(base)
    depth = model.config.num_hidden_layers
    first = (depth - count) // 2
    options = npt.NPTConfig(layers=range(first, first + count), rank=RANK, num_ranks=NUM_RANKS)
    npt.convert(model, options)
    for component in components(model).values():
        for name, parameter in component.named_parameters():
            if name.startswith("w_b"):  # zeros, as training begins, would be no work for some CPUs
                nn.init.normal_(parameter, std=1e-3)
    return npt.save(model, Path(tempfile.mkdtemp(prefix="npt-fast-bench-")) / "checkpoint")


def generation(way: Way) -> Callable[[], None]:
    """A function that generates `TOKENS` tokens after a prompt, greedily."""
    ids = torch.arange(100, 100 + PROMPT).unsqueeze(0)

    def generate() -> None:
        with implementation(way.implementation):
            out = way.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=TOKENS,
                # no end-of-text token may end one of them earlier
                min_new_tokens=TOKENS,
                do_sample=False,
            )
        if out.shape[1] != PROMPT + TOKENS:
            raise AssertionError(f"{out.shape[1] - PROMPT} tokens, not {TOKENS}")

    return generate


class Row(NamedTuple):
    """Times of one way, and counts of one token."""

    times: Timed
    counts: Counts


def run_rounds(rounds: int) -> dict[str, Row]:
    """Run all ways in turn, each after the base model, and count one token of each."""
    counts = {name: counted(way) for name, way in ways().items()}
    runs = {name: generation(way) for name, way in ways().items()}
    times = time_in_turn(runs[BASE], runs, rounds)
    return {name: Row(times[name], counts[name]) for name in runs}


def counted(way: Way) -> Counts:
    """Casts, operations and launches of one decoded token."""
    launches = way.implementation == "auto"  # the reference launches no kernels of ours
    with implementation(way.implementation):
        return counts_of_token(way.model, launches=launches)


def ways_table(found: dict[str, Row]) -> str:
    """The ways as a Markdown table."""
    heads = ("model", "tokens/s", "x base", "min", "max", "casts", "cast MB", "torch ops",
             "launches")  # fmt: skip
    body = []
    for name, (times, counts) in found.items():
        body.append(
            (
                name, f"{TOKENS / statistics.median(times.seconds):.1f}",
                *(f"{ratio:.2f}" for ratio in times.ratios()), str(counts.casts),
                f"{counts.cast_bytes / MB:.1f}", str(counts.operations),
                "-" if counts.launches is None else str(counts.launches),
            )
        )  # fmt: skip
    return markdown_table(heads, body)


NOTE = f"""\
`x base` is the time of generating {TOKENS} tokens after {PROMPT}, divided by the base model's right
before: the median of the rounds, smaller is faster. Casts, their bytes (read and written) and
operations of torch are those of one decoded token on this CPU. Launches are those of our Triton
kernels for the same token, counted as if on sm_90."""


def save_results(found: dict[str, Row], rounds: int) -> Path:
    """Write the table and the raw numbers; return the path of the table."""
    facts = machine_facts("torch", "transformers") | {
        "threads": str(torch.get_num_threads()),
        "model": "SmolLM2-135M, bfloat16, 30 layers, KV cache",
        "NP layers": f"triple, num_ranks {NUM_RANKS}, rank {RANK}, random",
        "command": f"`make bench-generate`; medians of {rounds} rounds in turn",
    }
    rows = {
        name: times._asdict() | {"counts": counts._asdict()}
        for name, (times, counts) in found.items()
    }
    text = f"{ways_table(found)}\n\n{NOTE}"
    return save("generate", "Decoding", facts, text, {"machine": facts, "rows": rows})


@pytest.mark.parametrize("name", [BASE, *(f"{n}, {way}" for n in LAYERS for way in WAYS)])
def test_generation(benchmark: Any, name: str) -> None:
    """One row of the table, as pytest-benchmark sees it."""
    benchmark.group = f"{TOKENS} tokens, SmolLM2-135M"
    benchmark.name = name
    benchmark.pedantic(generation(ways()[name]), rounds=3, warmup_rounds=1)


if __name__ == "__main__":
    report(__doc__, run_rounds, ways_table, save_results)
