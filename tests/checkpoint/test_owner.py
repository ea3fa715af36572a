"""Whether a process has ended; this is never claimed of one that may still run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from npt_fast.checkpoint import owner
from npt_fast.checkpoint.owner import is_gone, own_mark

MARK = "from npt_fast.checkpoint.owner import own_mark; print(own_mark(), flush=True); input()"


def test_this_process_is_not_gone() -> None:
    assert len(own_mark()) == 24
    assert not is_gone(own_mark())


def test_another_process_is_gone_once_it_has_ended() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", MARK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    mark = process.stdout.readline().strip()
    assert mark != own_mark()
    assert not is_gone(mark)
    process.communicate("\n")
    assert is_gone(mark)


def test_a_killed_process_is_gone_though_nobody_asked_for_its_exit_code() -> None:
    """This happens in a container whose first process collects no exit codes."""
    process = subprocess.Popen(
        [sys.executable, "-c", MARK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    mark = process.stdout.readline().strip()
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert is_gone(mark)
    process.communicate()


def test_a_process_number_that_was_given_again_is_another_process() -> None:
    mark = own_mark()
    start = int(mark[14:], 16)
    assert is_gone(f"{mark[:14]}{start + 1:010x}")


def test_a_process_that_proc_hides_is_not_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``hidepid``, other users' processes are not in ``/proc``."""
    mark = own_mark()
    monkeypatch.setattr(owner, "_start", lambda pid: None)
    assert not is_gone(mark)

    def refuse(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    assert not is_gone(mark)


def test_other_machines_are_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    mark = own_mark()
    ended = f"{mark[:14]}{0:010x}"
    assert is_gone(ended)
    monkeypatch.setattr(owner, "_place", lambda: "0" * 8)
    assert not is_gone(ended)


@pytest.mark.parametrize("mark", ["", "0" * 12, "x" * 24, "0" * 25])
def test_what_is_no_mark_is_not_judged(mark: str) -> None:
    assert not is_gone(mark)


def test_a_program_name_with_brackets_and_spaces(tmp_path: Path) -> None:
    """The second field of /proc/PID/stat is the name in brackets, and may contain brackets."""
    program = tmp_path / "a) 1 (b"
    program.symlink_to("/bin/sleep")
    process = subprocess.Popen([program, "30"])
    try:
        while b"(a) 1 (b)" not in Path(f"/proc/{process.pid}/stat").read_bytes():
            pass
        start = owner._start(process.pid)
        assert start is not None and start >= (owner._start(os.getpid()) or 0)
    finally:
        process.kill()
        process.wait()
