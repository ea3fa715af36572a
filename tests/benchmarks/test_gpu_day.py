"""The GPU day's command, run without a GPU: it is complete, ends in time, fails when it must, and
always leaves a report."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from npt_fast.benchmarks import gpu_day, gpu_worker
from npt_fast.benchmarks.device import INTERPRETER
from npt_fast.benchmarks.gpu_day import parse
from npt_fast.benchmarks.gpu_parts import PARTS, Day, small_ops
from npt_fast.benchmarks.gpu_report import ALL_OF_IT, Report
from npt_fast.benchmarks.gpu_worker import Late, Worker
from npt_fast.benchmarks.kernel_cases import OPS, PROVIDERS, Case, cases
from npt_fast.benchmarks.kernel_checks import Prepared
from npt_fast.benchmarks.rows import NOT_RUN, STOPPED, Row
from npt_fast.benchmarks.workloads import TINY
from npt_fast.errors import BenchmarkError
from npt_fast.kernels import roofline, swiglu
from tests.benchmarks.days import Crashing, Failing, Stuck
from tests.forked import forkserver

ROOT = Path(__file__).parents[2]
# no GPU even if there is one: this tests the command
ENVIRONMENT = os.environ | {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
COMMAND = (sys.executable, "-m", "benchmarks.gpu_day", "--tiny")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )


def report_in(folder: Path) -> tuple[dict[str, Any], str]:
    """Content of the JSON file, and the tables."""
    (tables,) = folder.glob("*.md")
    (data,) = folder.glob("*.json")
    return json.loads(data.read_bytes()), tables.read_text()


@pytest.mark.slow
def test_a_stopped_day_is_gone_on_with_to_its_end(tmp_path: Path) -> None:
    """Without a GPU, graphs are skipped, and a second call tries them again: the first need not."""
    first = [name for name in PARTS if name != "graphs"]
    whole = [*COMMAND, "--budget", "900", "--output", str(tmp_path / "day")]
    with subprocess.Popen(
        [*whole, "--only", ",".join(first)], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            if "forward, tiny" in line:  # while timings run
                process.send_signal(signal.SIGTERM)
                break
        process.stdout.read()
    assert process.returncode == 128 + signal.SIGTERM
    document, text = report_in(tmp_path / "day")
    assert list(document["parts"]) == first and "which call they are of" not in text
    statuses = {name: {r["status"] for r in p["rows"]} for name, p in document["parts"].items()}
    assert statuses["environment"] == statuses["values"] == {"ok"}
    assert {"ok", STOPPED} <= statuses["timings"]
    behind = first[first.index("timings") + 1 :]
    assert all(statuses[name] == {STOPPED} for name in behind)

    result = run(*whole, "--merge")
    assert result.returncode == 0, result.stdout + result.stderr
    document, text = report_in(tmp_path / "day")
    assert len(document["runs"]) == 2 and "Rows say which call they are of" in text
    of_call = {name: {row["run"] for row in p["rows"]} for name, p in document["parts"].items()}
    assert of_call.pop("environment") == of_call.pop("values") == {1}
    assert 0 in of_call.pop("timings") and all(calls == {0} for calls in of_call.values())
    assert list(document["parts"]) == list(PARTS)
    for name, part in document["parts"].items():
        found = {row["status"] for row in part["rows"]}
        assert found and found <= {"ok", "skipped"}, part["rows"]
        assert part["done"] or "skipped" in found, name
        assert f"\n## {name}\n" in text
    timed = [
        row for name in ("timings", "compilers", "small_ops")
        for row in document["parts"][name]["rows"]
    ]  # fmt: skip
    for case in (case for op in OPS for case in cases(op, TINY)):
        what = f"{case.what}, {case.shape}"
        providers = {r.get("provider") for r in timed if (r["op"], r["what"]) == (case.op, what)}
        assert providers == set(case.providers), case
        assert f"\n### {case.op}\n" in text
    for row in timed:  # no time of the interpreter is reported as speed
        assert not {"ms", "ratio", "GB/s", "TFLOP/s", "of ceiling"} & set(row)
    assert f"- device: {INTERPRETER}\n" in text


@pytest.mark.slow
def test_without_a_gpu_reports_are_only_merged(tmp_path: Path) -> None:
    for part in ("values", "large"):
        report = new_report()
        report.add(part, "a", {"what": "a", "status": "ok"})
        report.write(tmp_path / part)
    files = [str(file) for part in ("values", "large") for file in (tmp_path / part).glob("*.json")]
    command = ("-m", "npt_fast.benchmarks.gpu_day", "--output", str(tmp_path / "both"), "--merge")
    result = run(sys.executable, *command, *files)
    assert result.returncode == 0 and "nothing was run" in result.stdout, result.stderr
    document, _ = report_in(tmp_path / "both")
    assert list(document["parts"]) == ["values", "large"] and len(document["runs"]) == 2


def test_wrong_values_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = swiglu.swiglu_fwd
    monkeypatch.setattr(swiglu, "swiglu_fwd", lambda gate, up: right(gate, up) * 1.001)
    jobs = small_ops(Day(tiny=True, ops=("swiglu",), providers=("triton",)))
    rows = [row for job in jobs for row in job.run(math.inf)]
    bad = [row for row in rows if row["status"] != "ok"]
    assert {(row["what"].split(",")[0], row["provider"]) for row in bad} == {("forward", "triton")}
    assert all(row["status"] == "wrong" and "allowed" in row["detail"] for row in bad)
    assert all(("interpreter ms" in row) == (row["status"] == "ok") for row in rows)


@pytest.fixture
def quick_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that are forks of one that has imported torch; in use each imports it anew."""
    monkeypatch.setattr(gpu_worker, "get_context", lambda _: forkserver())


@pytest.mark.usefixtures("quick_worker")
def test_a_crash_ends_one_process() -> None:
    worker = Worker(Crashing())
    try:
        with pytest.raises(RuntimeError, match="its process ended with signal SIGABRT"):
            worker.jobs("timings", math.inf)
        assert worker.jobs("environment", math.inf) == ["environment"]
    finally:
        worker.stop()


@pytest.mark.usefixtures("quick_worker")
def test_what_does_not_answer_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_worker, "_GRACE", 0.2)
    worker = Worker(Stuck())
    try:
        worker.jobs("environment", math.inf)
        with pytest.raises(Late):
            worker.jobs("timings", time.monotonic() + 0.1)
        assert worker.jobs("environment", math.inf) == ["environment"]
    finally:
        worker.stop()


class Script:
    """A fake worker: part -> jobs, each a list of statuses or an error to raise."""

    def __init__(self, parts: dict[str, dict[str, list[str] | BaseException]]) -> None:
        self._parts = parts
        self.ran: list[tuple[str, str]] = []

    def jobs(self, part: str, deadline: float) -> list[str]:
        return list(self._parts[part])

    def run(self, part: str, index: int, deadline: float) -> Iterator[Row]:
        job, found = list(self._parts[part].items())[index]
        self.ran.append((part, job))
        if isinstance(found, BaseException):
            raise found
        for number, status in enumerate(found):
            yield {"what": f"{job} {number}", "status": status}

    def stop(self) -> None:
        pass


def new_report(device: str = "a device") -> Report:
    report = Report(dict.fromkeys(PARTS, "words"))
    report.runs.append({"device": device})
    return report


def statuses(report: Report, part: str) -> dict[str, str]:
    return {row["what"]: row["status"] for row in report.rows(part)}


def go(
    script: Script,
    report: Report,
    end: float = math.inf,
    output: Path | None = None,
    *,
    whole: bool = True,
) -> None:
    gpu_day.Call(script, report, end, output, whole).run(list(script._parts))  # type: ignore[arg-type]


def test_nothing_is_begun_when_the_budget_is_over() -> None:
    script = Script({"values": {"a": ["ok"]}, "model": {"b": ["ok"]}})
    report = new_report()
    go(script, report, time.monotonic() + 1.0)
    assert script.ran == []
    for part in ("values", "model"):
        assert set(statuses(report, part).values()) == {NOT_RUN}


def test_a_part_has_its_share_of_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that takes too long is cut off, and the parts after it get their turn."""
    now = [0.0]
    monkeypatch.setattr(gpu_day, "time", SimpleNamespace(monotonic=lambda: now[0]))

    class Slow(Script):
        def run(self, part: str, index: int, deadline: float) -> Iterator[Row]:
            assert deadline < now[0] + 2 * PARTS[part].seconds
            now[0] += 2 * PARTS["values"].seconds if part == "values" else 0
            yield from super().run(part, index, deadline)

    script = Slow({"values": {"a": ["ok"], "b": ["ok"]}, "model": {"c": ["ok"]}})
    report = new_report()
    go(script, report, 1000.0)
    assert script.ran == [("values", "a"), ("model", "c")]
    assert statuses(report, "values") == {"a 0": "ok", "b": NOT_RUN}


def test_errors_of_jobs_stop_nothing() -> None:
    jobs: dict[str, list[str] | BaseException] = {
        "a": RuntimeError("exit code 1"), "b": ["ok"], "c": Late("no answer"), "d": ["ok"]
    }  # fmt: skip
    report = new_report()
    go(Script({"values": jobs}), report)
    expected = {"a": "failed", "b 0": "ok", "c": NOT_RUN, "d 0": "ok"}
    assert statuses(report, "values") == expected and report.bad
    assert [report.has("values", job) for job in jobs] == [True, True, False, True]


def test_whatever_stops_it_leaves_a_report(tmp_path: Path) -> None:
    stop = SystemExit(143)
    script = Script({"values": {"a": ["ok"], "b": stop, "c": ["ok"]}, "model": {"d": ["ok"]}})
    with pytest.raises(SystemExit):
        go(script, new_report(), output=tmp_path)
    document, text = report_in(tmp_path)
    found = {r["what"]: r["status"] for p in document["parts"].values() for r in p["rows"]}
    assert found == {"a 0": "ok", "b": STOPPED, "c": STOPPED, "all of it": STOPPED}
    assert text.count(STOPPED) >= 3


def test_a_merged_report_is_gone_on_with(tmp_path: Path) -> None:
    """Finished work is not repeated; rows that said it was missing are replaced."""
    first = new_report()
    go(Script({"values": {"a": ["ok"], "b": ["ok", NOT_RUN]}}), first)
    first.add("model", "all of it", {"what": "all of it", "status": NOT_RUN})
    first.write(tmp_path)
    second = new_report()
    second.merge(first.file(tmp_path))
    script = Script({"values": {"a": ["ok"], "b": ["ok", "ok"]}, "model": {"c": ["ok"]}})
    go(script, second)
    assert script.ran == [("values", "b"), ("model", "c")]
    assert statuses(second, "values") == {"a 0": "ok", "b 0": "ok", "b 1": "ok"}
    assert statuses(second, "model") == {"c 0": "ok"}
    assert [row["run"] for row in second.rows("values")] == [1, 0, 0]


def test_what_was_skipped_or_restricted_is_not_done() -> None:
    report = new_report()
    go(Script({"values": {"a": ["skipped"], "b": ["ok"]}}), report)
    assert not report.has("values", "a") and report.has("values", "b")
    go(Script({"model": {"c": ["ok"]}}), report, whole=False)
    assert not report.has("model", "c")
    go(Script({"values": {"a": ["ok"]}}), report)
    assert statuses(report, "values") == {"a 0": "ok", "b 0": "ok"}


@pytest.mark.parametrize("found", ["ok", "skipped"])
def test_a_part_that_has_started_is_not_said_to_be_missing(found: str, tmp_path: Path) -> None:
    stopped = new_report()
    stopped.add("values", ALL_OF_IT, {"what": ALL_OF_IT, "status": STOPPED})
    stopped.write(tmp_path)
    report = new_report()
    report.merge(stopped.file(tmp_path))
    go(Script({"values": {"a": [found]}}), report, whole=False)
    assert statuses(report, "values") == {"a 0": found}


def test_a_list_that_comes_late_is_no_failure() -> None:
    class Slow(Script):
        def jobs(self, part: str, deadline: float) -> list[str]:
            raise Late("no answer")

    report = new_report()
    go(Slow({"values": {}}), report)
    assert statuses(report, "values") == {"all of it": NOT_RUN} and not report.bad
    go(Script({"values": {"a": ["ok"]}}), report)
    assert statuses(report, "values") == {"a 0": "ok"}


@pytest.mark.usefixtures("quick_worker")
def test_a_device_that_fails_costs_the_job_that_broke_it() -> None:
    worker = Worker(Failing())
    try:
        assert worker.jobs("environment", math.inf) == ["environment"]
        with pytest.raises(RuntimeError, match="its process ended with exit code 1"):
            worker.jobs("timings", math.inf)
        assert worker.jobs("environment", math.inf) == ["environment"]
    finally:
        worker.stop()


def test_rows_of_an_op_are_one_table() -> None:
    report = new_report()
    for op, what in (("decode", "a"), ("paths", "b"), ("decode", "c"), ("paths", "d")):
        report.add("timings", "job", {"op": op, "what": what, "status": "ok"})
    text = report.markdown()
    assert text.count("### decode") == text.count("### paths") == 1


def test_reports_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    other = new_report("another device")
    other.add("values", "a", {"what": "a", "status": "ok"})
    other.write(tmp_path)
    with pytest.raises(BenchmarkError, match="is of another device, another device; this is a dev"):
        new_report().merge(other.file(tmp_path))
    none = '{"device": "x", "runs": [], "parts": {}}'
    for content in ("{}", "[]", "nonsense", none, none.replace("{}", '{"values": 5}')):
        file = tmp_path / "junk.json"
        file.write_text(content)
        with pytest.raises(BenchmarkError, match=r"junk.json is no report"):
            Report({}).merge(file)
    with pytest.raises(BenchmarkError, match="No such file"):
        new_report().merge(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--tiny --budget 5", "--budget 5: nothing can be done in less than 30 s"),
        ("--tiny --budget nan", "--budget nan: nothing can be done"),
        ("--tiny --only valeus", "there is no 'valeus'; did you mean 'values'?"),
        ("--tiny --ops decod", "there is no 'decod'; did you mean 'decode'?"),
        ("--tiny --providers gem", "there is no 'gem'; did you mean 'gemm'?"),
        ("--tiny --shapes (", "--shapes: missing )"),
        ("--tiny --merge", "--merge: name files"),
        ("--tiny --only values,", "there is no ''"),
        (f"--tiny --output {__file__}", "--output"),
    ],
)
def test_wrong_usage_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: str, words: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(arguments.split())
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and words in line


NO_GPU = "no GPU here; with TRITON_INTERPRET=1, --tiny"


def test_without_a_gpu_and_interpreter_it_says_what_works() -> None:
    """In a process of its own, since what can run is found out when the module is imported."""
    environment = ENVIRONMENT | {"TRITON_INTERPRET": "0"}
    result = subprocess.run(COMMAND, cwd=ROOT, env=environment, capture_output=True, text=True)
    (line,) = result.stderr.splitlines()
    assert result.returncode == 2 and NO_GPU in line


@pytest.mark.parametrize("interpreted", [False, True])
def test_without_a_gpu_only_tiny_runs(
    interpreted: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_day, "ON_GPU", False)
    monkeypatch.setattr(gpu_day, "INTERPRETED", interpreted)
    with pytest.raises(SystemExit) as stopped:
        parse([])
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and NO_GPU in line


def test_the_installed_package_has_no_tests_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npt_fast.benchmarks.programs.CHECKOUT", False)
    (job,) = PARTS["values"].jobs(Day(tiny=True, ops=OPS, providers=PROVIDERS))
    (row,) = job.run(math.inf)
    assert (row["status"], row["detail"]) == ("skipped", "needs a checkout")


@pytest.mark.parametrize("case", cases("modulated_mlp", TINY), ids=str)
def test_products_are_counted_as_the_roofline_counts_them(case: Case) -> None:
    problem = TINY.training[case.shape]
    shape = roofline.Shape(problem.hidden, problem.intermediate, problem.num_ranks, problem.rank)
    prepared = Prepared(case)
    expected, base = roofline.forward_flops(shape), 2 * roofline.base_parameters(shape)
    if case.what != "forward":
        expected, base = expected + roofline.backward_flops(shape), 2 * base
    for name, flops in (("factored", expected), ("reference", expected), ("base", base)):
        assert prepared.exact(name)[1] == problem.tokens * flops


def test_every_provider_has_a_name_that_can_be_asked_for() -> None:
    found = {name for op in OPS for case in cases(op, TINY) for name in case.providers}
    assert found | {"liger"} == set(PROVIDERS)  # Liger's needs a GPU


@pytest.mark.slow
def test_every_op_has_its_benchmark() -> None:
    files = [f"benchmarks/bench_{op}.py" for op in OPS]
    command = (sys.executable, "-m", "pytest", "-q", "--benchmark-disable")
    result = run(*command, "-k", "eager or factored", *files)
    assert result.returncode == 0, result.stdout + result.stderr
    count = sum(len(cases(op, TINY)) for op in OPS)
    assert f"{count} passed" in result.stdout
