"""``npt-fast bench`` on a CPU, where its times are real, and in Triton's interpreter."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from npt_fast.benchmarks import bench as library
from npt_fast.benchmarks import kernel_timing
from tests.checkpoints import run
from tests.fork_server import Finished, ForkServer

SMALL = ("--model", "64,96", "--num_ranks", "2", "--np_rank", "8", "--tokens", "1,5")


COMPILED = {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
Bench = Callable[..., Finished]


@pytest.fixture(scope="module")
def bench(fork_server: ForkServer) -> Bench:
    """Runs the verb where Triton does not interpret."""
    return lambda *arguments: fork_server.run(("bench", *arguments), environment=COMPILED)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, bench: Bench) -> tuple[dict[str, Any], Path]:
    """Its JSON and its picture."""
    picture = tmp_path_factory.mktemp("bench") / "bench.svg"
    result = bench(*SMALL, "--json", "--plot", str(picture))
    assert result.code == 0, result.err
    return json.loads(result.out), picture


def test_every_way_is_timed_for_every_number_of_tokens(
    found: tuple[dict[str, Any], Path],
) -> None:
    document, _ = found
    assert document["ceilings"]["GB/s"] > 0 and document["machine"]["device"] == "cpu"
    rows = document["rows"]
    assert {(r["direction"], r["tokens"], r["provider"]) for r in rows} == {
        (direction, tokens, provider)
        for direction in ("forward", "forward + backward")
        for tokens in (1, 5)
        for provider in ("factored", "reference", "base")
    }
    for row in rows:
        assert row["status"] == "ok" and 0 < row["p20"] <= row["ms"] <= row["p80"]
        assert row["baseline"] == "factored"
        # the floor is that of the ceilings of the same run
        floor = max(
            row["GB/s"] / document["ceilings"]["GB/s"],
            row["TFLOP/s"] / document["ceilings"]["TFLOP/s"],
        )
        assert row["of ceiling"] == pytest.approx(floor)
    factored = [row for row in rows if row["provider"] == "factored"]
    assert all(row["ratio"] == 1 for row in factored)


def test_flops_and_bytes_are_those_of_the_layer(found: tuple[dict[str, Any], Path]) -> None:
    d, f, r = 64, 96, 16
    factors = 6 * d * r + 3 * f * r
    for row in found[0]["rows"]:
        if row["provider"] == "factored" and row["direction"] == "forward":
            flops = 2 * row["tokens"] * (3 * d * f + factors)
            moved = 4 * (3 * d * f + factors + 3 * row["tokens"] * d)
            assert row["TFLOP/s"] == pytest.approx(flops / row["ms"] / 1e9)
            assert row["GB/s"] == pytest.approx(moved / row["ms"] / 1e6)


def test_the_picture_says_what_it_shows(found: tuple[dict[str, Any], Path]) -> None:
    text = found[1].read_text()  # matplotlib writes each text as a comment beside its outlines
    for words in (
        "modulated_mlp, forward", "tokens", "milliseconds a call", "factored", "reference", "base",
        "floor of a modulated MLP", "D=64, F=96", "k=2, r=8, float32",
    ):  # fmt: skip
        assert words in text, words


def test_a_table_for_people(bench: Bench) -> None:
    result = bench(*SMALL[:-1], "3", "--op", "swiglu", "--against", "eager")
    assert result.code == 0, result.err
    assert "One layer of 64,96 (D=64, F=96), k=2, r=8, float32" in result.out
    assert "Ceilings measured in this run" in result.out and "x eager" in result.out
    assert "swiglu, backward:" in result.out


def test_the_interpreter_runs_our_kernels_and_claims_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, stdout, stderr = run(capsys, "bench", *SMALL[:-1], "3", "--op", "decode", "--json")
    assert code == 0, stderr
    document = json.loads(stdout)
    assert {"gemm", "fused", "decode"} <= {row["provider"] for row in document["rows"]}
    assert document["ceilings"] is None
    assert "times mean nothing" in document["machine"]["device"]
    assert not any("ms" in row for row in document["rows"])


def test_what_is_not_begun_in_time_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that advances by a second at every reading."""
    clock = count()
    stand_in = SimpleNamespace(monotonic=lambda: next(clock), perf_counter=time.perf_counter)
    monkeypatch.setattr(kernel_timing, "time", stand_in)
    options: dict[str, Any] = {"model": "64,96", "num_ranks": 2, "rank": 8}
    wanted = library.Bench(ops=["swiglu"], tokens=range(1, 6), against=[], **options)
    statuses = [row["status"] for row in wanted.rows(deadline=12)]
    late = statuses.index("not run: budget")
    assert late and set(statuses[:late]) == {"ok"} and set(statuses[late:]) == {"not run: budget"}
    assert len(statuses) == len([name for case in wanted.cases() for name in ("eager", "triton")])


def test_a_budget_too_small_for_anything(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "LEAST", 0.0)
        code, stdout, stderr = run(capsys, "bench", *SMALL, "--op", "swiglu", "--budget", "1e-9")
    assert code == 1 and not stdout
    assert stderr == "Error: budget 1e-09: nothing could be timed in it\n"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("--op decod", 1, "no op 'decod'; did you mean 'decode'?"),
        ("--against lige", 1, "no provider 'lige'; did you mean 'liger'?"),
        ("--against liger", 1, "liger is unavailable for these ops, or without a GPU; available:"),
        ("--model llama", 1, "unknown model 'llama'"),
        ("--model 0,8", 1, "unknown model '0,8'"),
        ("--op decode --tokens 128", 1, "decode takes 64 tokens at most"),
        ("--tokens 0", 2, "positive numbers separated by commas, got '0'"),
        ("--tokens 1,,2", 2, "positive numbers separated by commas"),
        ("--op swiglu,", 2, "names separated by commas"),
        ("--num_ranks 0", 2, "--num_ranks. Must be >= 1"),
        ("--dtype int8", 2, "dtype"),
        ("--budget 1", 1, "nothing can be timed in less than 5 s"),
        ("--budget nan", 1, "nothing can be timed"),
        ("--plot a.png", 1, "nothing to draw: interpreter: times mean nothing"),
        ("--tokens 99999999999999999999", 2, "positive numbers separated by commas"),
        ("--host", 1, "TRITON_INTERPRET"),
        ("--host --plot a.png", 1, "combine it with --json only"),
    ],
)
def test_bad_options_are_one_line(
    capsys: pytest.CaptureFixture[str], arguments: str, code: int, words: str
) -> None:
    found, stdout, stderr = run(capsys, "bench", *arguments.split())
    (line,) = stderr.splitlines()
    assert found == code and line.startswith("Error: ") and words in line and not stdout


def test_kernels_that_cannot_run_here_are_named(bench: Bench) -> None:
    result = bench("--against", "gemm")
    (line,) = result.err.splitlines()
    assert result.code == 1
    assert "gemm is unavailable for these ops, or without a GPU; available: factored," in line


@pytest.mark.parametrize(
    ("picture", "words"),
    [
        ("missing/a.png", "cannot be written: there is no folder missing"),
        ("a.nonsense", "the name must end in .png"),
    ],
)
def test_pictures_are_refused_before_the_work(bench: Bench, picture: str, words: str) -> None:
    result = bench("--plot", picture)
    (line,) = result.err.splitlines()
    assert result.code == 1 and words in line
