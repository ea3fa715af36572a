"""Time one layer of a model by all ways to compute it; the library behind ``npt-fast bench``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from npt_fast.benchmarks.device import DTYPE, INTERPRETED, ON_GPU
from npt_fast.benchmarks.kernel_cases import OPS, OURS, PROVIDERS, Case, cases
from npt_fast.benchmarks.kernel_timing import Ceilings, as_row, ceilings, time_case
from npt_fast.benchmarks.rows import Row
from npt_fast.benchmarks.workloads import Shapes, workload
from npt_fast.errors import BenchmarkError, suggestion
from npt_fast.kernels.roofline import DECODE_TOKENS
from npt_fast.pictures.figure import figure_class, save

DEFAULT_OPS = ("modulated_mlp", "decode") if ON_GPU else ("modulated_mlp",)
"""Default ops; on a CPU decoding is computed like everything else."""
TOKENS = (1, 64, 2048) if ON_GPU else (1, 16, 128)
"""Default numbers of tokens; a CPU would take minutes for 2048."""
LEAST = 5.0
"""Least budget in seconds."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The ops, sizes and providers to time.

    Attributes:
        ops: names of `kernel_cases.OPS`.
        model: a name of `roofline.MODELS`, or widths as ``D,F``.
        tokens: numbers of tokens; decode is timed for those up to 64.
        num_ranks: number of components k; None takes the model's.
        rank: rank r; None takes the model's.
        dtype: name of the dtype of all tensors; None means bfloat16 on a GPU, float32 otherwise.
        against: names of `kernel_cases.PROVIDERS` to time besides our own; eager is the op in plain
            torch. None means reference and base, for ops that have them.

    Raises:
        BenchmarkError: an op, model or provider is unknown, or unavailable here.
    """

    ops: Sequence[str] = DEFAULT_OPS
    model: str = "llama-3.2-1b"
    tokens: Sequence[int] = TOKENS
    num_ranks: int | None = None
    rank: int | None = None
    dtype: str | None = None
    against: Sequence[str] | None = None

    def __post_init__(self) -> None:
        for what, words, known in (("op", self.ops, OPS), ("provider", self.against, PROVIDERS)):
            for word in words or ():
                if word not in known:
                    hint = suggestion(word, known)
                    raise BenchmarkError(f"no {what} {word!r}{hint} ({', '.join(known)})")
        if INTERPRETED and self.dtype == "bfloat16":
            raise BenchmarkError("Triton's interpreter computes bfloat16 wrongly: use float32")
        try:
            self._shapes()
        except ValueError as error:
            raise BenchmarkError(str(error)) from None
        found = {name for case in self.cases() for name in case.providers}
        if not found:
            raise BenchmarkError(f"decode takes {DECODE_TOKENS} tokens at most: nothing to time")
        if missing := [name for name in self.against or () if name not in (*found, "eager")]:
            names = ", ".join(name for name in PROVIDERS if name in found)
            why = "for these ops" if ON_GPU else "for these ops, or without a GPU"
            raise BenchmarkError(f"{', '.join(missing)} is unavailable {why}; available: {names}")

    def _shapes(self) -> Shapes:
        layers = [
            workload(self.model, tokens, self.num_ranks, self.rank, self._dtype)
            for tokens in sorted(set(self.tokens))
        ]
        few = {name: layer for name, layer in layers if layer.tokens <= DECODE_TOKENS}
        return Shapes(dict(layers), few)

    def cases(self) -> list[Case]:
        """All cases; nothing is on the device yet."""
        return [case for op in self.ops for case in cases(op, self._shapes())]

    def ceilings(self) -> Ceilings | None:
        """The best rates of the device; None in the interpreter."""
        return ceilings(self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype) if self.dtype else DTYPE
        assert isinstance(dtype, torch.dtype)
        return dtype

    def rows(self, deadline: float = math.inf) -> Iterator[Row]:
        """A row for each provider of each case, as they are timed.

        Args:
            deadline: time of `time.monotonic` after which rows are reported as not run.
        """
        limits = self.ceilings()
        names = (*OURS, *(("reference", "base") if self.against is None else self.against))
        for case in self.cases():
            about = {
                "direction": case.what, "tokens": case.workload.tokens, "baseline": case.baseline
            }  # fmt: skip
            for timing in time_case(case, names, deadline):
                yield about | as_row(timing, limits)


def title(bench: Bench, facts: dict[str, str]) -> str:
    """One line that describes a picture or a table."""
    _, layer = workload(bench.model, 1, bench.num_ranks, bench.rank)
    device = facts["device"] if ON_GPU or INTERPRETED else facts["cpu"]
    dtype = bench.dtype or str(DTYPE).removeprefix("torch.")
    return (
        f"One layer of {bench.model} (D={layer.hidden}, F={layer.intermediate}), "
        f"k={layer.num_ranks}, r={layer.rank}, {dtype}, {device}"
    )


_COLOURS = {
    "factored": "#0072b2", "eager": "#0072b2", "gemm": "#009e73", "fused": "#56b4e9",
    "decode": "#cc79a7", "triton": "#009e73", "reference": "#d55e00", "base": "#555555",
    "compile": "#e69f00", "liger": "#8c6d31",
}  # fmt: skip
"""Colours by provider; people with any colour vision can tell them apart."""


def plot(bench: Bench, rows: Sequence[Row], facts: dict[str, str], path: str | Path) -> None:
    """Draw time against tokens, and the least time by the device's ceilings.

    Raises:
        BenchmarkError: nothing was timed.
        NPTError: matplotlib is missing, or the file cannot be written.
    """
    timed = [row for row in rows if "ms" in row and row["launch"] != "stream, L2"]
    panels: dict[str, list[Row]] = {}
    for row in timed:
        panels.setdefault(f"{row['op']}, {row['direction']}", []).append(row)
    if not panels:
        raise BenchmarkError(f"{path}: nothing was timed, so there is nothing to draw")
    figure = figure_class()(
        figsize=(max(6.0, 4.2 * len(panels)), 4.6), layout="constrained", facecolor="white"
    )
    for axes, name in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _panel(axes, name, panels[name])
    entries = [axes.get_legend_handles_labels() for axes in figure.axes]
    shown = {
        label: handle
        for handles, labels in entries
        for handle, label in zip(handles, labels, strict=True)
    }
    figure.legend(
        shown.values(), shown, loc="outside lower center", ncols=len(shown), frameon=False
    )
    figure.suptitle(title(bench, facts))
    save(figure, path)


def _panel(axes: Any, name: str, rows: Sequence[Row]) -> None:
    from matplotlib.ticker import LogLocator

    floors: dict[int, float] = {}
    lines: dict[str, list[Row]] = {}
    for row in rows:
        lines.setdefault(row["provider"], []).append(row)
        if row["provider"] not in ("base", "compile-base", "liger"):
            floors[row["tokens"]] = row["of ceiling"] * row["ms"]
    for provider, found in lines.items():
        tokens = [row["tokens"] for row in found]
        colour = _COLOURS.get(provider)
        axes.plot(tokens, [row["ms"] for row in found], "o-", ms=4, color=colour, label=provider)
        low, high = ([row[key] for row in found] for key in ("p20", "p80"))
        axes.fill_between(tokens, low, high, alpha=0.2, color=colour, linewidth=0)
    axes.plot(
        list(floors), list(floors.values()), "--", color="black", linewidth=1,
        label="floor of a modulated MLP, by this device's ceilings",
    )  # fmt: skip
    axes.set(xscale="log", yscale="log", title=name, xlabel="tokens", ylabel="milliseconds a call")
    axes.set_xticks(list(floors), [str(tokens) for tokens in floors])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(which="major", color="0.9")
