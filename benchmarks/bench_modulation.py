"""Memory and time of a modulated MLP, compared with its definition and its GEMMs alone.

``pytest benchmarks/bench_modulation.py`` times a training step (forward and backward, with frozen
MLP weights) against ``impl="reference"``, which forms v_a and v_b, and a forward pass against its
matrix products alone. The baseline runs before every round, so that a busy minute slows both alike.
The ratio, a median over the rounds, is in the row's name and fails nothing. Activations and weights
are float32, or bfloat16 beside float32 factors, as in training on a 16-bit base model. The bytes
that autograd saves for backward are counted and must equal the formula.

It runs one thread unless OMP_NUM_THREADS is set. With more threads, each of the reference's many
small operations waits for the slowest thread, and on a busy machine the ratio comes out several
times too good.

``python -m benchmarks.bench_modulation`` runs all of this and saves the tables in
``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from npt_fast.benchmarks.harness import MB, machine_facts, save
from npt_fast.benchmarks.saved_bytes import (
    FACTORED,
    FORMS,
    REFERENCE,
    Form,
    Inputs,
    formula_bytes,
    kept_bytes,
)
from npt_fast.functional import heads_of, modulated_mlp
from npt_fast.kernels.factored import MLPWeights
from npt_fast.tables import markdown_table
from npt_fast.testing import Problem, make_inputs, named_tensors

ROUNDS = 7
THREADS = int(os.environ.get("OMP_NUM_THREADS", "1"))

# The widths of Llama-3.2-1B. With 128 components and 512 tokens the reference keeps 8 GB, and its
# process grows to 15 GB; half the tokens leave room for whatever else the machine does.
_LLAMA_1B = partial(Problem, hidden=2048, intermediate=8192)
PROBLEMS = (
    _LLAMA_1B(tokens=512, num_ranks=8, rank=128),
    _LLAMA_1B(tokens=256, num_ranks=128, rank=16),
)


def run(inputs: Inputs, form: Form = FACTORED) -> Tensor:
    """The modulated MLP of `inputs`, ``(T, D)``."""
    x, h, weights, factors = inputs
    options: dict[str, Any] = {"impl": form.impl, "save_probe": form.save_probe}
    return modulated_mlp(x, h, weights.gate, weights.up, weights.down, factors, **options)


def training_inputs(problem: Problem, dtype: torch.dtype) -> Inputs:
    """Inputs of which all but the MLP's weights require gradients, as in training."""
    x, h, weights, factors = make_inputs(problem, dtype=dtype)
    return x, h, MLPWeights._make(w if w is None else w.detach() for w in weights), factors


def mixed_inputs(problem: Problem) -> Inputs:
    """The same in bfloat16, with factors in float32."""
    x, h, weights, _ = training_inputs(problem, torch.bfloat16)
    return x, h, weights, training_inputs(problem, torch.float32)[3]


def step(inputs: Inputs, form: Form = FACTORED) -> None:
    """Forward and backward, with gradients of x, h and the factors."""
    trained = [tensor for tensor in named_tensors(*inputs).values() if tensor.requires_grad]
    y = run(inputs, form)
    torch.autograd.grad(y, trained, torch.ones_like(y))


def bare_gemms(inputs: Inputs) -> Callable[[], None]:
    """Only the matrix products of a forward with triple modulation; outputs are preallocated."""
    x, h, weights, m = inputs
    (_, gate), (_, up), (mid, down) = heads_of(m)
    z = torch.randn(len(h), len(gate), dtype=h.dtype)
    inner = torch.randn(len(h), len(weights.gate), dtype=h.dtype)
    pairs = [
        (x, m.w_down), (h, m.w_a_in.t()),
        (h, weights.gate.t()), (z, gate),
        (h, weights.up.t()), (z, up),
        (inner, weights.down.t()), (inner, mid.t()), (z, down),
    ]  # fmt: skip
    products = [
        (a.detach(), b.detach().to(h.dtype), torch.empty(len(a), b.shape[1], dtype=h.dtype))
        for a, b in pairs
    ]

    def multiply() -> None:
        for a, b, out in products:
            torch.mm(a, b, out=out)

    return multiply


def flops(function: Callable[[], object]) -> int:
    """FLOPs of the matrix products in a call."""
    with FlopCounterMode(display=False) as counter:
        function()
    return int(counter.get_total_flops())


def saved_bytes(inputs: Inputs, form: Form) -> int:
    """Bytes that autograd saves for backward of the modulated MLP."""
    return kept_bytes(inputs, lambda: run(inputs, form))


@dataclass(frozen=True, slots=True)
class Saved:
    """Bytes that one form of one problem saves for backward, counted and by formula."""

    problem: Problem
    form: str
    dtype: str
    measured: int
    formula: int


def measure_saved(problem: Problem, inputs: Inputs) -> list[Saved]:
    """All forms, in the dtype of the inputs."""
    return [
        Saved(
            problem, form.name, dtype_name(inputs),
            saved_bytes(inputs, form), formula_bytes(problem, form, inputs[0].dtype),
        )
        for form in FORMS
    ]  # fmt: skip


def dtype_name(inputs: Inputs) -> str:
    """The activations' dtype as text."""
    return str(inputs[0].dtype).removeprefix("torch.")


def label(problem: Problem) -> str:
    """The sizes in which our problems differ, as text."""
    return f"k={problem.num_ranks} r={problem.rank} T={problem.tokens}"


@pytest.fixture(scope="module", autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=PROBLEMS, ids=label)
def problem(request: pytest.FixtureRequest) -> Problem:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def case(request: pytest.FixtureRequest, problem: Problem) -> tuple[Problem, Inputs]:
    """A problem and its inputs, with factors in float32."""
    if request.param == "bfloat16":
        return problem, mixed_inputs(problem)
    return problem, training_inputs(problem, torch.float32)


def compare(
    benchmark: Any,
    problem: Problem,
    dtype: str,
    target: Callable[[], None],
    baseline: Callable[[], None],
    name: str,
) -> None:
    """Time `target`, each round directly after one of `baseline`, and report the ratio."""
    seconds: list[float] = []

    def time_baseline() -> None:
        start = time.perf_counter()
        baseline()
        seconds.append(time.perf_counter() - start)

    benchmark.pedantic(target, setup=time_baseline, rounds=ROUNDS, warmup_rounds=1)
    if benchmark.stats is None:  # --benchmark-disable
        return
    del seconds[0]  # the warm-up
    own = benchmark.stats.stats.data
    ratios = [a / b for a, b in zip(own, seconds, strict=True)]
    benchmark.extra_info.update(
        problem=asdict(problem), dtype=dtype, baseline=name, seconds=own, baseline_seconds=seconds,
        ratio=statistics.median(ratios), ratio_min=min(ratios), ratio_max=max(ratios),
    )  # fmt: skip
    benchmark.stats.name = f"{label(problem)} {dtype}: {statistics.median(ratios):.2f} x {name}"


@pytest.mark.benchmark(group="forward + backward")
def test_step(benchmark: Any, case: tuple[Problem, Inputs]) -> None:
    problem, inputs = case
    with torch.no_grad():
        y, expected = run(inputs), run(inputs, REFERENCE)
    error = 1e-5 if y.dtype == torch.float32 else 2e-2
    assert (y - expected).norm() < error * expected.norm()
    compare(
        benchmark, problem, dtype_name(inputs),
        lambda: step(inputs), lambda: step(inputs, REFERENCE), "impl='reference'",
    )  # fmt: skip


@pytest.mark.benchmark(group="forward")
def test_forward(benchmark: Any, case: tuple[Problem, Inputs]) -> None:
    """A forward in training, which saves what backward needs."""
    problem, inputs = case
    gemms = bare_gemms(inputs)
    assert flops(gemms) == flops(lambda: run(inputs))

    def forward() -> None:
        run(inputs)

    compare(benchmark, problem, dtype_name(inputs), forward, gemms, "its bare GEMMs")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_activations(problem: Problem, dtype: torch.dtype) -> None:
    inputs = training_inputs(problem, dtype)
    for saved in measure_saved(problem, inputs):
        assert saved.measured == pytest.approx(saved.formula, rel=0.02), saved


def speed_table(rows: Sequence[dict[str, Any]]) -> str:
    heads = ("what", "k, r, T", "dtype", "wall s", "baseline", "baseline s", "ratio", "min", "max")
    body = []
    for row in rows:
        times = (statistics.median(row[name]) for name in ("seconds", "baseline_seconds"))
        own, baseline = (f"{value:.2f}" for value in times)
        ratios = (f"{row[name]:.2f}" for name in ("ratio", "ratio_min", "ratio_max"))
        problem = label(Problem(**row["problem"]))
        body.append((row["what"], problem, row["dtype"], own, row["baseline"], baseline, *ratios))
    return markdown_table(heads, body)


def saved_table(rows: Sequence[Saved]) -> str:
    heads = ("k, r, T", "form", "dtype", "MB", "formula", "MB / formula", "formula at T=512")
    body = [
        (
            label(row.problem), row.form, row.dtype, f"{row.measured / MB:.1f}",
            f"{row.formula / MB:.1f}", f"{row.measured / row.formula:.4f}",
            f"{row.formula / row.problem.tokens * 512 / MB:.1f}",
        )
        for row in rows
    ]  # fmt: skip
    return markdown_table(heads, body)


NOTES = """\
Llama-3.2-1B widths (D=2048, F=8192), gate, up and down modulated. In rows of bfloat16 the factors
are float32 at rest, as in training.
`ratio` is the median of the rounds' ratios, each to the round of the baseline just before it.
The bare GEMMs write to outputs made in advance. Freeing what was kept is part of every time.
k=128 has 256 tokens, not 512, at which the reference would keep 8.1 GB (last column).

Saved: storages that autograd keeps for backward, each once, as a whole: x, h and everything
computed from them; no weights. Per token the formula is, with e bytes per element,
e (2D + 6R + 2F) + 12k for the factored form, 3R instead of 6R without probes, and
e (2D + 3R + 4F + 3k (D + F) + 3k) for the reference, R = k r (design.md#saved-activations)."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--no-save", action="store_true", help="only print")
    options = parser.parse_args()
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        code = pytest.main([__file__, "-q", f"--benchmark-json={report.name}"])
        if code:
            return int(code)
        benchmarks = json.loads(Path(report.name).read_bytes())["benchmarks"]
    speed = [{"what": row["group"], **row["extra_info"]} for row in benchmarks]
    saved = [
        row
        for problem in PROBLEMS
        for dtype in (torch.bfloat16, torch.float32)
        for row in measure_saved(problem, training_inputs(problem, dtype))
    ]
    facts = machine_facts("torch") | {
        "threads": str(THREADS),
        "command": f"`python -m benchmarks.bench_modulation`; {ROUNDS} rounds",
    }
    tables = f"{speed_table(speed)}\n\n{saved_table(saved)}"
    print("\n".join(f"{name}: {value}" for name, value in facts.items()))
    print(tables)
    if options.no_save:
        return 0
    document = {"machine": facts, "speed": speed, "saved": [asdict(row) for row in saved]}
    text = f"{tables}\n\n{NOTES}"
    path = save("modulation", "Modulated MLP: time and memory", facts, text, document)
    print(f"Saved to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
