"""Speed and memory of one training step on SmolLM2-135M, one layer in the middle, on this machine.

The baseline is the original's procedure (design.md#training-step): run the base model through all
layers to its logits, then the student through all layers with v_a and v_b formed; direct loss and
loss of the logits, backward, AdamW. ``python -m benchmarks.bench_train`` (``make bench-train``)
prints a table and saves it in ``benchmarks/results``; ``pytest benchmarks/bench_train.py`` gives
the same steps to pytest-benchmark. Every way runs in its own process and the processes take turns,
so that a busy minute slows all of them alike.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import npt_fast as npt
from npt_fast.benchmarks.harness import MB, ROOT, machine_facts, save
from npt_fast.hf.base_model import SMOLLM2, load_base_model
from npt_fast.hf.convert import components, decoder_layers
from npt_fast.tables import markdown_table
from npt_fast.testing import implementation
from npt_fast.training.curriculum import Stage
from npt_fast.training.distillation import Distillation

LAYER = 15  # of 30
RANK, NUM_RANKS = 256, 1  # the original's defaults, and ours
BATCH, LENGTH = 4, 512
TEACHER = Stage("teacher", 1, 0.0, 0.0)
WAYS = {
    "original": "all layers twice, logits, v_a and v_b formed",
    "equal losses": "ours, with the same two losses",
    "defaults": "ours, teacher stage, direct loss alone",
}


def make_step(way: str) -> Callable[[], float]:
    """One optimizer step of a way on a fixed batch; returns the loss."""
    torch.manual_seed(0)
    model, _ = load_base_model(SMOLLM2)
    npt.convert(model, npt.NPTConfig(layers=[LAYER], rank=RANK, num_ranks=NUM_RANKS))
    component = components(model)[LAYER]
    torch.nn.init.normal_(component.w_b_gate, std=1e-3)  # ΔW is not 0 in the middle of training
    optimizer = torch.optim.AdamW(component.parameters(), lr=1e-4)
    ids = torch.randint(0, model.config.vocab_size, (BATCH, LENGTH))
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
    layer = decoder_layers(model)[LAYER]
    seen: dict[str, torch.Tensor] = {}

    def record(name: str, index: int | None) -> Callable[..., None]:
        def hook(_: Any, args: Any, output: Any) -> None:
            seen[name] = output if index is None else output[index]

        return hook

    with torch.no_grad(), npt.disabled(model):
        hooks = [
            layer.get_submodule("self_attn").register_forward_hook(record("attention", 0)),
            layer.get_submodule("mlp").register_forward_hook(record("mlp", None)),
        ]
        teacher = model(ids, use_cache=False).logits
        for hook in hooks:
            hook.remove()
    handle = components(model)[LAYER].register_forward_hook(record("output", None))
    with implementation("reference"):
        student = model(ids, use_cache=False).logits
    handle.remove()
    direct = (seen["output"] - seen["attention"] - seen["mlp"]).square().mean()
    loss: torch.Tensor = 10.0 * direct + (student - teacher).square().mean()
    return loss


def _serve(way: str) -> None:
    """Take a step for each line on stdin; print its seconds, the peak memory and the loss."""
    step = make_step(way)
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


def run_rounds(rounds: int) -> dict[str, tuple[list[float], int]]:
    """Run all ways in turn.

    Returns:
        By way: seconds of each round, and peak bytes beyond what the loaded model takes.
    """
    servers = {
        way: subprocess.Popen(
            [sys.executable, "-m", "benchmarks.bench_train", "--serve", way], cwd=ROOT,
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
        print(f"  round {number} of {rounds}", file=sys.stderr)
    for server in servers.values():
        server.communicate()
    return found


def ways_table(found: dict[str, tuple[list[float], int]]) -> str:
    """The ways as a Markdown table."""
    tokens = BATCH * LENGTH
    slow, most = statistics.median(found["original"][0]), found["original"][1]
    heads = ("way", "what it does", "s per step", "min", "max", "tokens/s", "times faster",
             "peak MB", "times less")  # fmt: skip
    body = []
    for way, (times, peak) in found.items():
        median = statistics.median(times)
        body.append(
            (
                way, WAYS[way], f"{median:.2f}", f"{min(times):.2f}", f"{max(times):.2f}",
                f"{tokens / median:.0f}", f"{slow / median:.1f}", f"{peak / MB:.0f}",
                f"{most / peak:.1f}",
            )
        )  # fmt: skip
    return markdown_table(heads, body)


def save_results(found: dict[str, tuple[list[float], int]], rounds: int) -> Path:
    """Write the table and the raw numbers; return the path of the table."""
    facts = machine_facts("torch", "transformers") | {
        "threads": str(torch.get_num_threads()),
        "model": "SmolLM2-135M, float32, 30 layers",
        "trained": f"layer {LAYER}, triple, num_ranks {NUM_RANKS}, rank {RANK}",
        "batch": f"{BATCH} windows of {LENGTH} tokens",
        "command": f"`make bench-train`; medians of {rounds} rounds in turn",
    }
    note = "Peak is the memory of a step beyond the model, which all ways share."
    rows = {way: {"seconds": times, "peak": peak} for way, (times, peak) in found.items()}
    text = f"{ways_table(found)}\n\n{note}"
    return save("train", "One training step", facts, text, {"machine": facts, "rows": rows})


@pytest.mark.parametrize("way", WAYS)
def test_training_step(benchmark: Any, way: str) -> None:
    """One row of the table, as pytest-benchmark sees it."""
    benchmark.group = "training step, SmolLM2-135M"
    benchmark.name = way
    benchmark.pedantic(make_step(way), rounds=3, warmup_rounds=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="steps of each way")
    parser.add_argument("--no-save", action="store_true", help="only print")
    parser.add_argument("--serve", choices=list(WAYS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        _serve(options.serve)
        return
    found = run_rounds(options.rounds)
    print(ways_table(found))
    if not options.no_save:
        print(f"Saved to {save_results(found, options.rounds)}")


if __name__ == "__main__":
    main()
