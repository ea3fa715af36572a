"""The command for a GPU, tried out without one: it is complete, honest, and fails when it must."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from npt_fast.benchmarks import gpu_day
from npt_fast.benchmarks.device import INTERPRETER
from npt_fast.benchmarks.gpu_day import SECTIONS, Day
from npt_fast.benchmarks.kernel_cases import OPS, TINY, Case, Prepared, cases
from npt_fast.benchmarks.kernel_timing import attempt
from npt_fast.kernels import roofline

ROOT = Path(__file__).parents[2]
# where there is a GPU, too, this is about the command
ENVIRONMENT = os.environ | {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip


def report(folder: Path) -> tuple[dict[str, Any], str]:
    """The JSON file, and the tables."""
    (tables,) = folder.glob("*.md")
    (data,) = folder.glob("*.json")
    return json.loads(data.read_bytes()), tables.read_text()


@pytest.mark.slow
def test_all_of_it_runs_on_a_tiny_problem(tmp_path: Path) -> None:
    result = run("-m", "benchmarks.gpu_day", "--tiny", "--output", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    document, text = report(tmp_path)
    assert list(document["sections"]) == list(SECTIONS)
    assert all(section["rows"] for section in document["sections"].values())
    assert all(f"\n## {name}\n" in text for name in SECTIONS)
    timed = document["sections"]["timings"]["rows"]
    for case in (case for op in OPS for case in cases(op, TINY)):
        what = f"{case.what}, {case.shape}"
        providers = [r["provider"] for r in timed if (r["op"], r["what"]) == (case.op, what)]
        # Liger's are there with a GPU alone
        assert providers == [name for name in case.providers if "liger" not in name]
        assert f"\n### {case.op}\n" in text
        assert all(f"| {provider} " in text for provider in providers)
    assert f"- device: {INTERPRETER}\n" in text


@pytest.mark.slow
def test_wrong_values_are_refused_and_no_times_of_the_interpreter_pass_for_speed(
    tmp_path: Path,
) -> None:
    planted = (
        "import sys\n"
        "from npt_fast.benchmarks import gpu_day\n"
        "from npt_fast.kernels import swiglu\n"
        "right = swiglu.swiglu_fwd\n"
        "swiglu.swiglu_fwd = lambda gate, up: right(gate, up) * 1.001\n"
        "sys.exit(gpu_day.main(sys.argv[1:]))"
    )
    options = ("--tiny", "--only", "timings", "--ops", "swiglu", "--output", str(tmp_path))
    assert run("-c", planted, *options).returncode == 1
    document, text = report(tmp_path)
    rows = document["sections"]["timings"]["rows"]
    bad = [row for row in rows if row["status"] != "ok"]
    assert {(row["what"].split(",")[0], row["provider"]) for row in bad} == {("forward", "triton")}
    assert all(row["status"] == "wrong" and "allowed" in row["detail"] for row in bad)
    for row in rows:
        assert ("interpreter ms" in row) == (row["status"] == "ok")
        assert not {"ms", "ratio", "GB/s", "TFLOP/s", "of ceiling"} & set(row)
    assert f"- device: {INTERPRETER}\n" in text


def test_a_section_that_breaks_off_keeps_its_rows_and_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(day: Day) -> Iterator[gpu_day.Row]:
        yield {"what": "something", "status": "ok"}
        raise RuntimeError("no more")

    monkeypatch.setitem(SECTIONS, "memory", broken)
    day = Day(tiny=True, ops=OPS)
    first, last = gpu_day.run_section("memory", day, tmp_path, alone=True)["rows"]
    assert first["status"] == "ok"
    assert (last["status"], last["detail"]) == ("failed", "RuntimeError: no more")


def test_a_crash_ends_one_process() -> None:
    _, status, detail = attempt(partial(gpu_day.apart, os.abort))
    assert status == "failed" and "terminated abruptly" in detail


@pytest.mark.parametrize("case", cases("modulated_mlp", TINY), ids=str)
def test_products_are_counted_as_the_roofline_counts_them(case: Case) -> None:
    problem = TINY.training[case.shape]
    shape = roofline.Shape(problem.hidden, problem.intermediate, problem.num_ranks, problem.rank)
    prepared = Prepared(case)
    expected, base = roofline.forward_flops(shape), 2 * roofline.base_parameters(shape)
    if case.what != "forward":
        expected, base = expected + roofline.backward_flops(shape), 2 * base
    for name, flops in (("eager", expected), ("reference", expected), ("base MLP", base)):
        assert prepared.exact(name)[1] == problem.tokens * flops


@pytest.mark.slow
def test_every_op_has_its_benchmark() -> None:
    files = [f"benchmarks/bench_{op}.py" for op in OPS]
    result = run("-m", "pytest", "-q", "--benchmark-disable", "-k", "eager", *files)
    assert result.returncode == 0, result.stdout + result.stderr
    count = sum(len(cases(op, TINY)) for op in OPS)
    assert f"{count} passed" in result.stdout
