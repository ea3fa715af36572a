"""Speed and memory of one training step on SmolLM2-135M, on this machine.

It trains 1, 3 and all 30 layers together on a base model in bfloat16; parameters of NP layers are
float32. The baseline is the original's procedure (design.md#training-step): run the base model
through all layers to its logits, then the student through all layers with v_a and v_b formed;
direct loss and loss of the logits, backward, AdamW. A forward of the base model stands beside them.

``python -m benchmarks.bench_train`` (``make bench-train``) prints a table and saves it in
``benchmarks/results``; ``pytest benchmarks/bench_train.py`` gives the same steps to
pytest-benchmark. Every way runs in its own process and the processes take turns, so that a busy
minute slows all of them alike.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import npt_fast as npt
from npt_fast.benchmarks.harness import MB, ROOT, machine_facts, save
from npt_fast.functional import heads_of
from npt_fast.hf.base_model import load_base_model
from npt_fast.hf.convert import components, decoder_layers
from npt_fast.hf.model_folder import SMOLLM2
from npt_fast.tables import markdown_table
from npt_fast.testing import implementation
from npt_fast.training.curriculum import Stage
from npt_fast.training.distillation import Distillation

LAYERS = {1: range(15, 16), 3: range(14, 17), 30: range(30)}  # of 30, in the middle
RANK, NUM_RANKS = 256, 1  # the original's defaults, and ours
BATCH, LENGTH = 4, 512
TEACHER = Stage("teacher", 1, 0.0, 0.0)
DTYPE = "bfloat16"
WAYS = {
    "base model": "the base model's forward, without logits",
    "original": "all layers twice, logits, v_a and v_b formed",
    "equal losses": "ours, with the same two losses",
    "defaults": "ours, teacher stage, direct loss alone",
}


def make_step(way: str, count: int) -> Callable[[], float]:
    """One optimizer step of a way for `count` layers on a fixed batch; returns the loss."""
    torch.manual_seed(0)
    model, _ = load_base_model(SMOLLM2, dtype=DTYPE)
    ids = torch.randint(0, model.config.vocab_size, (BATCH, LENGTH))
    if way == "base model":

        def forward() -> float:
            with torch.no_grad():
                model(ids, use_cache=False, logits_to_keep=1)
            return 0.0

        return forward
    npt.convert(model, npt.NPTConfig(layers=LAYERS[count], rank=RANK, num_ranks=NUM_RANKS))
    parts = components(model).values()
    for part in parts:
        # ΔW is not 0 in the middle of training
        torch.nn.init.normal_(heads_of(part.factors)[0][1], std=1e-3)
    optimizer = torch.optim.AdamW([p for part in parts for p in part.parameters()], lr=1e-4)
    losses: Callable[[], torch.Tensor]
    if way == "original":
        losses = functools.partial(_original, model, ids)
    else:
        both = way == "equal losses"
        distillation = Distillation(
            model,
            loss="mse" if both else "relative",
            direct_weight=10.0,
            fidelity_weight=float(both),
        )
        losses = lambda: distillation(ids, stage=TEACHER).total / ids.numel()  # noqa: E731

    def step() -> float:
        loss = losses()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def _original(model: Any, ids: torch.Tensor) -> torch.Tensor:
    parts, layers = components(model), decoder_layers(model)
    seen: dict[tuple[str, int], torch.Tensor] = {}

    def recorded(name: str, layer: int, module: torch.nn.Module, index: int | None = None) -> Any:
        def hook(_: Any, args: Any, output: Any) -> None:
            seen[name, layer] = output if index is None else output[index]

        return module.register_forward_hook(hook)

    with torch.no_grad(), npt.disabled(model):
        hooks = []
        for layer in parts:
            hooks.append(recorded("attention", layer, layers[layer].get_submodule("self_attn"), 0))
            hooks.append(recorded("mlp", layer, layers[layer].get_submodule("mlp")))
        teacher = model(ids, use_cache=False).logits.float()
        for hook in hooks:
            hook.remove()
    handles = [recorded("output", layer, part) for layer, part in parts.items()]
    with implementation("reference"):
        student = model(ids, use_cache=False).logits.float()
    for handle in handles:
        handle.remove()
    direct = torch.stack(
        [
            (seen["output", layer] - seen["attention", layer] - seen["mlp", layer])
            .float().square().mean()
            for layer in parts
        ]
    ).sum()  # fmt: skip
    loss: torch.Tensor = 10.0 * direct + (student - teacher).square().mean()
    return loss


def _serve(way: str, count: int) -> None:
    """Take a step for each line on stdin; print its seconds, the peak memory and the loss."""
    step = make_step(way, count)
    # resets VmHWM: loading the model does not count
    Path("/proc/self/clear_refs").write_text("5")
    before = _memory("VmRSS")
    for _ in sys.stdin:
        begun = time.perf_counter()
        loss = step()
        seconds = time.perf_counter() - begun
        print(json.dumps([seconds, _memory("VmHWM") - before, loss]), flush=True)


def _memory(name: str) -> int:
    match = re.search(rf"{name}:\s*([0-9]+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def run_rounds(rounds: int, count: int) -> dict[str, tuple[list[float], int]]:
    """Run all ways of training `count` layers in turn.

    Returns:
        By way: seconds of each round, and peak bytes beyond what the loaded model takes.
    """
    servers = {
        way: subprocess.Popen(
            [sys.executable, "-m", "benchmarks.bench_train", "--serve", way, str(count)], cwd=ROOT,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for way in WAYS
    }  # fmt: skip
    found: dict[str, tuple[list[float], int]] = {way: ([], 0) for way in WAYS}
    for number in range(rounds + 1):  # the first one warms up
        for way, server in servers.items():
            assert server.stdin is not None and server.stdout is not None
            server.stdin.write("\n")
            server.stdin.flush()
            seconds, peak, _ = json.loads(server.stdout.readline())
            times = found[way][0]
            found[way] = ([*times, seconds] if number else times, peak)
        print(f"  {count} layers: round {number} of {rounds}", file=sys.stderr)
    for server in servers.values():
        server.communicate()
    return found


Found = dict[int, dict[str, tuple[list[float], int]]]
"""By number of layers: what `run_rounds` returns."""


def ways_table(found: Found) -> str:
    """The ways as a Markdown table."""
    heads = (
        "layers", "way", "what it does", "s per step", "min", "max", "tokens/s", "times faster",
        "peak MB", "times less",
    )  # fmt: skip
    body = [(str(count), *row) for count, of_count in found.items() for row in _rows(of_count)]
    return markdown_table(heads, body)


def _rows(found: dict[str, tuple[list[float], int]]) -> Iterator[tuple[str, ...]]:
    tokens = BATCH * LENGTH
    slow, most = statistics.median(found["original"][0]), found["original"][1]
    for way, (times, peak) in found.items():
        median = statistics.median(times)
        yield (
            way, WAYS[way], f"{median:.2f}", f"{min(times):.2f}", f"{max(times):.2f}",
            f"{tokens / median:.0f}", f"{slow / median:.1f}", f"{peak / MB:.0f}",
            f"{most / peak:.1f}",
        )  # fmt: skip


def save_results(found: Found, rounds: int) -> Path:
    """Write the table and the raw numbers; return the path of the table."""
    facts = machine_facts("torch", "transformers") | {
        "threads": str(torch.get_num_threads()),
        "model": f"SmolLM2-135M, {DTYPE}, 30 layers",
        "trained": f"float32 parameters, triple, num_ranks {NUM_RANKS}, rank {RANK}",
        "batch": f"{BATCH} windows of {LENGTH} tokens",
        "command": f"`make bench-train`; medians of {rounds} rounds in turn",
    }
    note = (
        "Peak is the memory of a step beyond the model, which all ways share. The base model's row "
        "trains nothing."
    )
    rows = {
        count: {way: {"seconds": times, "peak": peak} for way, (times, peak) in ways.items()}
        for count, ways in found.items()
    }
    text = f"{ways_table(found)}\n\n{note}"
    return save("train", "One training step", facts, text, {"machine": facts, "rows": rows})


@pytest.mark.parametrize("count", LAYERS)
@pytest.mark.parametrize("way", WAYS)
def test_training_step(benchmark: Any, way: str, count: int) -> None:
    """One row of the table, as pytest-benchmark sees it."""
    benchmark.group = f"training step, SmolLM2-135M, NP layers: {count}"
    benchmark.name = way
    benchmark.pedantic(make_step(way, count), rounds=3, warmup_rounds=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="steps of each way")
    parser.add_argument("--no-save", action="store_true", help="only print")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        way, count = options.serve
        _serve(way, int(count))
        return
    found = {count: run_rounds(options.rounds, count) for count in LAYERS}
    print(ways_table(found))
    if not options.no_save:
        print(f"Saved to {save_results(found, options.rounds)}")


if __name__ == "__main__":
    main()
