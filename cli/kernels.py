"""``npt-fast kernels``: compile the kernels and compute their cost, without a GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import asdict
from typing import Annotated

from cyclopts import App, Parameter
from cyclopts.validators import Number

from npt_fast.cli.output import print_json, say
from npt_fast.errors import NPTError
from npt_fast.kernels import roofline as arithmetic
from npt_fast.tables import markdown_table

app = App(name="kernels", help="Compile the kernels and count their work, without a GPU.")

ARCHS = "sm_75,sm_80,sm_89,sm_90,sm_100,sm_120,gfx942"
KNOWN = {*ARCHS.split(","), "sm_86", "sm_103", "sm_121", "gfx950"}

Size = Annotated[int | None, Parameter(validator=Number(gte=1))]

TITLE = "Roofline: arithmetic, not measured"
ASSUMPTIONS = (
    "one layer; bfloat16; gate, up and down modulated; no biases; base model frozen",
    "FLOPs count matrix products only; each weight is read once and each gradient written once",
    "every launch reads and writes its activations once; nothing stays cached between launches",
    "peaks are the vendor's; floor is the larger of compute and memory time, with the other hidden",
    "exposed: activations that launches without products move; in turn: products first, then those",
    "v_a/v_b at best: each vector is written and read once; eager: what kernels/reference.py does",
)


def _known_archs(_: type, names: str) -> None:
    unknown = set(names.split(",")) - KNOWN
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))}: not one of {', '.join(sorted(KNOWN))}")


@app.default
def compile_kernels(
    *,
    arch: Annotated[str, Parameter(validator=_known_archs)] = ARCHS,
    jobs: Size = None,
    max_spill: Annotated[int, Parameter(validator=Number(gte=0))] = 0,
    json: bool = False,
) -> int:
    """Compile every kernel for named GPUs, without having one, and show the machine code's figures.

    npt-fast kernels --arch sm_90,gfx942

    The exit code is 3 if a kernel spills registers, lacks matrix instructions, needs more shared
    memory than the GPU has, or computes in float64. This says nothing about speed.

    Parameters
    ----------
    arch
        GPU architectures, separated by commas.
    jobs
        Number of processes; defaults to the number of cores.
    max_spill
        Bytes per thread that a kernel may spill. Tiles are chosen for the newest Triton, where none
        does.
    json
        Print everything as JSON.
    """
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise NPTError("TRITON_INTERPRET is set, and the interpreter does not compile: unset it")
    from rich.console import Console
    from rich.progress import track

    from npt_fast.kernels import aot

    names = arch.split(",")
    console = Console(stderr=True)
    found = list(
        track(
            aot.compile_all(names, jobs=jobs or os.cpu_count() or 1, max_spill=max_spill),
            "Compiling",
            total=sum(map(aot.case_count, names)),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
    )
    if json:
        print_json([{**asdict(one), "ok": one.ok} for one in found])
    else:
        heads = (
            "arch", "kernel", "config", "registers", "spill B", "shared B", "warps/SM", "mma",
            "instruction", "global accesses, bits:count", "ok",
        )  # fmt: skip
        rows = [
            (
                one.arch, one.kernel, one.config, str(one.registers), str(one.spill_bytes),
                str(one.shared_bytes), str(one.warps_per_sm), str(one.mma), one.mma_kind,
                one.accesses, "ok" if one.ok else "; ".join(one.problems),
            )
            for one in found
        ]  # fmt: skip
        say(f"Compiled by {aot.COMPILER} without a GPU; says nothing about speed")
        say()
        print(markdown_table(heads, rows))
    bad = [one for one in found if not one.ok]
    print(f"{len(found)} compiled, {len(bad)} with problems", file=sys.stderr)
    return 3 if bad else 0


def _listed(what: str, names: Iterable[str]) -> str:
    return f"{what}: one of {', '.join(names)}."


def _check(
    *,
    model: str | None = None,
    hidden: int | None = None,
    intermediate: int | None = None,
    gpu: str | None = None,
    **others: object,
) -> None:
    """Reject an unknown model, wrong widths or an unknown GPU before anything is computed."""
    arithmetic.shape_of(model, hidden, intermediate)
    if gpu is not None:
        arithmetic.gpu_of(gpu)


@app.command(validator=_check)
def roofline(
    *,
    model: Annotated[
        str | None, Parameter(help=_listed("Model whose sizes are taken", arithmetic.MODELS))
    ] = None,
    hidden: Size = None,
    intermediate: Size = None,
    rank: Size = None,
    num_ranks: Size = None,
    tokens: Annotated[int, Parameter(validator=Number(gte=1))] = 8192,
    gpu: Annotated[
        str, Parameter(help=_listed("GPU whose peaks are taken", arithmetic.GPUS))
    ] = "h100",
    json: bool = False,
) -> None:
    """Compute FLOPs, bytes and least times of a modulated MLP, with and without v_a and v_b.

    npt-fast kernels roofline --model llama-3.2-1b --tokens 8192 --gpu h100

    Parameters
    ----------
    hidden
        Model width D, instead of --model.
    intermediate
        MLP width F, instead of --model.
    rank
        Rank r of a component; defaults to 512 for llama-3.2-1b and to 64 otherwise.
    num_ranks
        Number of components k; defaults to 8.
    tokens
        Tokens of all sequences together. Decode takes 64 at most; with more it is shown for one.
    json
        Print everything as JSON.
    """
    shape = arithmetic.shape_of(model, hidden, intermediate, num_ranks, rank)
    peaks = arithmetic.gpu_of(gpu)
    costs = list(arithmetic.costs(shape, tokens))
    kept = arithmetic.saved_bytes_by_form(shape, tokens)
    if json:
        passes = [
            {
                **asdict(cost),
                "compute_ms": cost.compute_ms(peaks),
                "memory_ms": cost.memory_ms(peaks),
                "floor_ms": cost.floor_ms(peaks),
                "in_turn_ms": cost.launch_by_launch_ms(peaks),
            }
            for cost in costs
        ]
        document = {
            "title": TITLE,
            "assumptions": ASSUMPTIONS,
            "model": model,
            "shape": {**asdict(shape), "joined": shape.joined},
            "tokens": tokens,
            "gpu": {
                "name": gpu,
                "peaks": "the vendor's",
                "tflops": peaks.tflops,
                "tb_per_s": peaks.bandwidth,
            },
            "passes": passes,
            "kept_for_backward": kept,
        }
        print_json(document)
        return
    say(TITLE)
    say(
        f"{model or 'Widths'}: D={shape.hidden}, F={shape.intermediate}, k={shape.num_ranks} "
        f"components of rank r={shape.rank} (R={shape.joined})"
    )
    say(f"{gpu}: {peaks.tflops:g} TFLOP/s dense bfloat16, {peaks.bandwidth:g} TB/s")
    say("Times in ms, traffic in MB")
    say()
    heads = (
        "pass", "form", "GFLOP", "activations", "weights", "compute", "memory", "floor",
        "exposed", "in turn",
    )  # fmt: skip
    rows = [
        (
            f"{cost.phase}, T={cost.tokens}", cost.form, f"{cost.flops / 1e9:.1f}",
            f"{cost.activations / 1e6:.1f}", f"{cost.weights / 1e6:.1f}",
            f"{cost.compute_ms(peaks):.3f}", f"{cost.memory_ms(peaks):.3f}",
            f"{cost.floor_ms(peaks):.3f}", f"{cost.exposed / 1e6:.1f}",
            f"{cost.launch_by_launch_ms(peaks):.3f}",
        )
        for cost in costs
    ]  # fmt: skip
    print(markdown_table(heads, rows))
    say()
    memory = [(form, f"{count / 1e6:.1f}") for form, count in kept.items()]
    print(markdown_table((f"saved for backward, T={tokens}", "MB"), memory))
    say()
    for line in ASSUMPTIONS:
        say(f"- {line}")
