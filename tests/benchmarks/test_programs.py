"""Programs and their children end at the deadline; tests are reported one by one."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

import pytest

from npt_fast.benchmarks import programs
from npt_fast.benchmarks.programs import Program, run_tests
from npt_fast.benchmarks.rows import NOT_RUN


def test_lines_and_the_exit_code() -> None:
    code = "import sys; print('a'); print('b', file=sys.stderr); sys.exit(3)"
    program = Program([sys.executable, "-c", code], math.inf)
    assert sorted(program.lines()) == ["a", "b"]
    assert program.code == 3


def test_the_deadline_ends_it_and_its_children() -> None:
    code = (
        "import subprocess, sys; child = [sys.executable, '-c', 'import time; time.sleep(600)']\n"
        "print(subprocess.Popen(child).pid, flush=True); import time; time.sleep(600)"
    )
    for seconds in (2, 10, 60):  # a busy machine may take a while until the first line
        program = Program([sys.executable, "-c", code], time.monotonic() + seconds)
        lines = list(program.lines())
        assert program.code is None
        if lines:
            break
    (child,) = lines
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or "\nState:\tZ" in _status(child):
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child is alive")


def _status(pid: str) -> str:
    file = Path(f"/proc/{pid}/status")
    return file.read_text() if file.exists() else "\nState:\tZ"


@pytest.fixture
def tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A test file with one test for each outcome."""
    monkeypatch.setattr(programs, "find_spec", lambda name: name == "pytest")
    file = tmp_path / "test_some.py"
    file.write_text(
        "import pytest\n"
        "def test_right(): print('no newline', end='')\n"
        "def test_wrong(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='no need')\n"
        "def test_not(): pass\n"
        "@pytest.fixture\n"
        "def broken(): raise ValueError('in the fixture')\n"
        "def test_broken(broken): pass\n"
    )
    return file


@pytest.mark.parametrize("processes", [1, 2])
def test_tests_are_counted_by_file(
    tests: Path, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if processes > 1:
        monkeypatch.undo()  # pytest-xdist is there
    *_, row = run_tests([str(tests)], math.inf, processes=processes)
    assert row["status"] == "failed"
    assert (row["passed"], row["failed"], row["skipped"]) == (1, 2, 1)
    for words in (
        "test_wrong: assert 1 == 2",
        "test_broken: ValueError: in the fixture",
        "no need",
    ):
        assert words in row["detail"]


def test_files_that_cannot_be_collected_are_failures(tests: Path) -> None:
    tests.write_text("import nothing_of_that_name\n")
    # a file has several rows if the machine is so busy that pytest takes longer than _EVERY
    (row,) = {row["what"]: row for row in run_tests([str(tests)], math.inf)}.values()
    assert row["status"] == "failed" and "nothing_of" in row["detail"]
    (row,) = run_tests([str(tests.with_name("missing.py"))], math.inf)
    assert row["status"] == "failed" and "exit code 4" in row["detail"]


def test_a_deadline_keeps_what_came_before(tests: Path) -> None:
    tests.write_text("import time\ndef test_a(): pass\ndef test_b(): time.sleep(600)\n")
    for seconds in (6, 20, 60):  # a busy machine may take a while until the first test
        rows = list(run_tests([str(tests)], time.monotonic() + seconds))
        if len(rows) > 1:
            break
    first, last = rows[0], rows[-1]
    assert (first["status"], first["passed"]) == ("ok", 1)
    assert last["status"] == NOT_RUN
