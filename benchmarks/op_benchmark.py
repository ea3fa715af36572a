"""The cases and providers of `kernel_cases` under pytest-benchmark, for ``bench_<op>.py``."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch

from npt_fast.benchmarks.device import INTERPRETED, INTERPRETER, ON_GPU
from npt_fast.benchmarks.kernel_cases import Case, cases
from npt_fast.benchmarks.kernel_timing import ROUNDS, prepare, ratio_to_baseline
from npt_fast.benchmarks.workloads import REAL, TINY


class _DeviceClock:
    """A clock that advances only by what `compare` measured, so that device time is reported."""

    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


_clock = _DeviceClock()


def entries(op: str) -> list[Any]:
    """Parameters for `compare`: every case of an op with each of its providers."""
    label = f" ({INTERPRETER})" if INTERPRETED else ""
    return [
        pytest.param(
            case, name, id=f"{case.what}-{case.shape}-{name}",
            marks=pytest.mark.benchmark(group=f"{case}{label}", timer=_clock),
        )
        for case in cases(op, REAL if ON_GPU else TINY)
        for name in case.providers
    ]  # fmt: skip


def compare(benchmark: Any, case: Case, name: str) -> None:
    """Check a provider and time it, each round after one of the baseline."""
    prepared = prepare(case)
    try:
        prepared.check(name)
        time_both = ratio_to_baseline(prepared, name)
    except torch.OutOfMemoryError:
        pytest.skip("does not fit the device's memory")
    ratios: list[float] = []

    def one_round() -> None:
        milliseconds, ratio = time_both()
        ratios.append(ratio)
        _clock.seconds += milliseconds / 1e3

    benchmark.pedantic(one_round, rounds=ROUNDS)
    if benchmark.stats is not None and ON_GPU:  # neither --benchmark-disable nor the interpreter
        benchmark.extra_info.update(baseline=case.baseline, ratios=ratios)
        benchmark.stats.name = f"{name}: {statistics.median(ratios):.2f} x {case.baseline}"
