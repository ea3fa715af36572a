"""Failing output does not stop the work; the exit code reports it."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from npt_fast.cli import streams
from tests.checkpoints import layer_weights, write_checkpoint

PROGRAM = f"exec {sys.executable} -m npt_fast"


def bash(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["/bin/bash", "-c", f"{PROGRAM} {command}"],
        capture_output=True, text=True, check=False, cwd=folder, timeout=120,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "a", layer_weights(11), config={"model_name": "m"})
    return tmp_path


FULL = "Error: not all output could be printed: No space left on device; the work itself is done"


@pytest.mark.parametrize("verb", [
    "merge --checkpoints a --output out", "merge --checkpoints a --output out --json",
    "merge --checkpoints a --output out --verify", "analyze --checkpoint a", "verify a",
    "verify a --json", "--help", "merge --help", "--version",
])  # fmt: skip
def test_a_full_stdout(folder: Path, verb: str) -> None:
    result = bash(f"{verb} >/dev/full", folder)
    assert result.returncode == 4
    assert [line for line in result.stderr.splitlines() if "Warning" not in line] == [FULL]
    if verb.startswith("merge -") and "--help" not in verb:
        assert (folder / "out" / "npt_weights.pt").exists()
        assert bash("verify out", folder).returncode == 0


def test_a_failed_check_keeps_its_exit_code_on_a_full_stdout(folder: Path) -> None:
    (folder / "a" / "merge_summary.json").write_text("{")
    assert bash("verify a", folder).returncode == 3
    assert bash("verify a >/dev/full", folder).returncode == 3


@pytest.mark.parametrize("redirection", [
    ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", "2>/dev/full", ">&- 2>/dev/full",
])  # fmt: skip
def test_closed_streams_and_a_full_stderr_do_not_matter(folder: Path, redirection: str) -> None:
    for command, code in (
        ("merge --checkpoints a --output out --verify", 0),
        ("verify out", 0), ("analyze --checkpoint a", 0), ("--help", 0),
        ("verify nothing", 1), ("merge --checkpoints a --output out", 1), ("merge", 2),
    ):  # fmt: skip
        result = bash(f"{command} {redirection}", folder)
        assert result.returncode == code, command
        assert "Traceback" not in result.stderr and "Exception ignored" not in result.stderr
    assert bash("verify out", folder).returncode == 0  # nothing was printed into a file


def test_a_reader_that_has_seen_enough(folder: Path) -> None:
    result = bash("analyze --verbose --checkpoint a a a a a a a a | head -n 1", folder)
    assert result.stdout.strip() == "=" * 60
    assert "Traceback" not in result.stderr and "Exception ignored" not in result.stderr


def test_a_reader_of_warnings_that_goes_away_stops_nothing(folder: Path) -> None:
    command = f"exec 3> >(exec true); sleep 0.2; {PROGRAM} merge --checkpoints a --output out 2>&3"
    result = subprocess.run(
        ["/bin/bash", "-c", command], capture_output=True, text=True, check=False, cwd=folder,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    assert result.returncode == 0
    assert "Successfully merged" in result.stdout


# Ctrl-C when all is done, while Python clears up: modules register what is called then.
_LATE = """
import atexit, os, runpy, signal, sys
atexit.register(os.kill, os.getpid(), int(sys.argv.pop(1)))
runpy.run_module("npt_fast", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_when_all_is_done(folder: Path, number: int) -> None:
    result = subprocess.run(
        [sys.executable, "-c", _LATE, str(int(number)), "merge", "--checkpoints", "a",
         "--output", "out"],
        capture_output=True, text=True, check=False, cwd=folder,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    assert result.returncode == -number
    assert "Successfully merged" in result.stdout
    assert all(line.startswith("Warning: ") for line in result.stderr.splitlines())


# Ctrl-C at the moment when a module is imported, which takes a fifth of a second in all.
_INTERRUPTED = """
import os, runpy, signal, sys
wanted = sys.argv.pop(1)

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == wanted:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
runpy.run_module("npt_fast", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("module", [
    "npt_fast.cli.main", "cyclopts", "npt_fast.errors", "npt_fast.cli.streams", "rich.console",
    "npt_fast.cli.merge", "npt_fast.checkpoint.merge", "npt_fast.checkpoint.verify",
])  # fmt: skip
def test_an_interrupt_while_it_starts(folder: Path, module: str) -> None:
    command = [sys.executable, "-c", _INTERRUPTED, module, "merge", "--verify"]
    command += ["--checkpoints", "a", "--output", "out"]
    if module == "rich.console":
        command = [sys.executable, "-c", _INTERRUPTED, module, "--help"]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=folder,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    assert result.returncode == 130
    assert result.stderr.splitlines()[-1] == "Error: interrupted; nothing was left behind"
    assert "Traceback" not in result.stderr and "Exception ignored" not in result.stderr
    assert not (folder / "out").exists()


def test_little_is_imported_before_an_interrupt_is_answered() -> None:
    """Few modules load before Ctrl-C is handled; those that Python loads or holds do not count."""
    code = (
        "import os, sys; a = {*sys.modules}; import npt_fast.__main__; print(*({*sys.modules} - a))"
    )
    result = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    ours = {"npt_fast", "npt_fast.__main__", "npt_fast.hf", "npt_fast.hf.registration"}
    assert {*result.stdout.split()} <= {*ours, "__future__", *sys.builtin_module_names}


ASK = """
import os, subprocess, sys
from npt_fast.cli import streams
streams.install()
for ask in (input, sys.stdin.readline, sys.__stdin__.read, lambda: os.read(0, 9)):
    try:
        print(repr(ask()))
    except EOFError:
        print("EOF")
print(repr(subprocess.run(["cat"], capture_output=True).stdout))
print(repr(subprocess.run(["ls", "/proc/self/fd"], capture_output=True).stdout.split()[3:]))
streams.install()
print(list(streams.stdin()))
"""


def test_stdin_is_nobodys_but_ours(tmp_path: Path) -> None:
    """Python's own ways to read it, and child processes, find it empty."""
    result = subprocess.run(
        [sys.executable, "-c", ASK], input="y\nn\n", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.stderr == ""
    # the fourth descriptor of `ls` is the folder that it lists
    ends = ["EOF", "''", "''", "b''", "b''", "[b'3']", r"['y\n', 'n\n']"]
    assert result.stdout.splitlines() == ends


def test_a_stdin_that_somebody_has_replaced_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = io.StringIO("mine\n")
    monkeypatch.setattr(sys, "stdin", mine)
    streams.install()
    assert sys.stdin is mine and streams.stdin() is mine
