"""The folder of a run: who may write into it, and which checkpoints stay."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from npt_fast.checkpoint.training_run import BEST, FINAL
from npt_fast.errors import TrainingError
from npt_fast.training.run_directory import RunDirectory
from tests.checkpoints import contents

# opens a run's folder, says how that went, and stays until its input ends
OPEN = """
import sys
from pathlib import Path
from npt_fast.errors import TrainingError
from npt_fast.training.run_directory import RunDirectory
try:
    run = RunDirectory(Path(sys.argv[1]), resuming=True)
    print("open", flush=True)
    sys.stdin.read()
except TrainingError as error:
    print(error, flush=True)
"""


def other_process(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", OPEN, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().rstrip("\n")


def write(run: RunDirectory, *steps: int) -> None:
    """Write files that stand for checkpoints and tell their step."""
    for step in steps:
        run.checkpoint(step).mkdir(parents=True)
        (run.checkpoint(step) / "npt_weights.pt").write_bytes(b"%d" % step)
        (run.checkpoint(step) / "config.json").write_bytes(b"{}")


def refusal(folder: Path, *, resuming: bool = True) -> str:
    with pytest.raises(TrainingError) as caught:
        RunDirectory(folder, resuming=resuming)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"{folder}: ")
    return message


# ---- one run at a time ----


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_training_works_where_locks_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def flock(fd: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    run = RunDirectory(tmp_path / "run", resuming=False)
    write(run, 1)
    run.link(1, FINAL)
    assert contents(run.checkpoint(FINAL)) == contents(run.checkpoint(1))
    run.close()


def test_one_run_at_a_time_in_this_process(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "mine"
    run = RunDirectory(folder, resuming=False)
    assert folder.is_dir()
    message = refusal(folder)
    assert "another run is training into it" in message and "--wandb_name" in message
    other = RunDirectory(tmp_path / "runs" / "yours", resuming=False)  # each has its own lock
    other.close()
    run.close()
    RunDirectory(folder, resuming=False).close()
    assert not folder.exists(), "a lock leaves no file behind"


def test_one_run_at_a_time_in_all_processes(tmp_path: Path) -> None:
    """The lock holds until the other process is gone, however it ends."""
    run = RunDirectory(tmp_path, resuming=False)
    with other_process(tmp_path) as process:
        message = said(process)
        assert message.startswith(f"{tmp_path}: another run is training into it")
    run.close()
    with other_process(tmp_path) as process:
        assert said(process) == "open"
        assert "another run" in refusal(tmp_path)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        RunDirectory(tmp_path, resuming=False).close()


def test_programs_that_a_run_starts_do_not_hold_its_lock(tmp_path: Path) -> None:
    """A tracker's service outlives the run; the next run must not wait for it."""
    run = RunDirectory(tmp_path, resuming=False)
    command = [sys.executable, "-c", "input(print('runs', flush=True))"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, close_fds=False, **pipes) as process:
        assert said(process) == "runs"
        run.close()
        RunDirectory(tmp_path, resuming=False).close()
        process.communicate("\n")


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert "File exists" in refusal(tmp_path / "file")
    with pytest.raises(TrainingError, match="Not a directory"):
        RunDirectory(tmp_path / "file" / "run", resuming=False)


# ---- whose checkpoints ----


def test_another_runs_checkpoints_are_not_mixed_with_new_ones(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, resuming=False)
    write(run, 100)
    run.close()
    message = refusal(tmp_path, resuming=False)
    assert "checkpoints of another run" in message and "--resume_from" in message
    assert contents(run.checkpoint(100))["npt_weights.pt"] == b"100"
    run = RunDirectory(tmp_path, resuming=True)  # the refused run holds no lock
    assert list(run.checkpoint_steps()) == [100]
    run.close()


def test_step_0_is_a_checkpoint_too(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, resuming=False)
    write(run, 0)
    run.close()
    assert "checkpoints of another run" in refusal(tmp_path, resuming=False)


def test_a_run_that_saved_nothing_may_be_started_again(tmp_path: Path) -> None:
    (tmp_path / "training_log.jsonl").write_text("")
    (tmp_path / "checkpoints").mkdir()
    RunDirectory(tmp_path, resuming=False).close()


JUNK = [
    "checkpoint-",
    "checkpoint-x",
    "checkpoint--5",
    "checkpoint-+5",
    "checkpoint-5.0",
    "checkpoint-1_000",
    "checkpoint-007",  # 7 would be another folder
    "checkpoint-٣",  # a digit, but not ASCII
    "checkpoint-5-old",
    ".checkpoint-5.npt-fast-0123456789ab",  # left by a killed run
    "Checkpoint-5",
    "best",
    "final",
]


def test_junk_is_ignored_and_left(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for name in JUNK:
        (folder / name).mkdir(parents=True)
    (folder / "checkpoint-12").write_text("a file")
    run = RunDirectory(tmp_path, resuming=False)  # none of these belongs to a run
    assert list(run.checkpoint_steps()) == []
    write(run, 3, 4)
    assert list(run.checkpoint_steps()) == [3, 4]
    run.keep_last(1)
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [*JUNK, "checkpoint-12", "checkpoint-4"]
    )
    run.close()


# ---- which stay ----


def test_the_newest_stay_by_number_not_by_name(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, resuming=False)
    write(run, 10000, 9000, 0, 8000)
    assert list(run.checkpoint_steps()) == [0, 8000, 9000, 10000]
    run.keep_last(4)
    assert list(run.checkpoint_steps()) == [0, 8000, 9000, 10000]
    run.keep_last(2)
    assert list(run.checkpoint_steps()) == [9000, 10000]
    run.keep_last(9)
    assert list(run.checkpoint_steps()) == [9000, 10000]
    assert not run.checkpoint(8000).exists()
    run.close()


def test_what_a_longer_run_left_beyond_this_step_stays(tmp_path: Path) -> None:
    """Resumed at 300 of 1000: keeping the highest numbers would remove what is written now."""
    run = RunDirectory(tmp_path, resuming=True)
    write(run, 100, 200, 300, 900, 1000)
    run.keep_last(2, newest=300)
    assert list(run.checkpoint_steps()) == [200, 300, 900, 1000]
    run.close()


def test_best_and_final_outlive_what_they_name(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, resuming=False)
    write(run, 1, 2, 3)
    run.link(1, BEST)
    run.link(3, FINAL)
    run.keep_last(1)
    assert list(run.checkpoint_steps()) == [3]
    assert contents(run.checkpoint(BEST)) == {"config.json": b"{}", "npt_weights.pt": b"1"}
    assert contents(run.checkpoint(FINAL))["npt_weights.pt"] == b"3"
    run.close()


# ---- second names ----


def test_a_second_name_takes_no_space(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, resuming=False)
    write(run, 7)
    run.link(7, BEST)
    first, second = run.checkpoint(7), run.checkpoint(BEST)
    assert second.is_dir() and not second.is_symlink()
    assert contents(second) == contents(first)
    for file in first.iterdir():
        assert file.samefile(second / file.name) and file.stat().st_nlink == 2
    run.close()


def test_a_second_name_is_replaced_at_once(tmp_path: Path) -> None:
    """A reader finds the old or the new checkpoint, complete; nothing else remains."""
    run = RunDirectory(tmp_path, resuming=False)
    write(run, 1, 2)
    (run.checkpoint(1) / "training_state.pt").write_bytes(b"only in the first")
    run.link(1, BEST)
    reader = os.open(run.checkpoint(BEST), os.O_RDONLY | os.O_DIRECTORY)
    run.link(2, BEST)
    assert contents(run.checkpoint(BEST)) == contents(run.checkpoint(2))
    assert contents(run.checkpoint(1))["npt_weights.pt"] == b"1", "the first one itself stays"
    assert os.fstat(reader).st_ino != run.checkpoint(BEST).stat().st_ino, "exchanged, not refilled"
    os.close(reader)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["best", "checkpoint-1", "checkpoint-2"]
    run.close()


def test_a_second_name_that_fails_leaves_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(tmp_path, resuming=False)
    write(run, 1, 2)
    run.link(1, BEST)

    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.link", full)
    monkeypatch.setattr("shutil.copyfileobj", full)
    with pytest.raises(Exception, match="No space left") as caught:
        run.link(2, BEST)
    assert "\n" not in str(caught.value)
    assert contents(run.checkpoint(BEST))["npt_weights.pt"] == b"1"
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {
        "best",
        "checkpoint-1",
        "checkpoint-2",
    }
    run.close()


def test_a_second_name_where_links_are_impossible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(tmp_path, resuming=False)
    write(run, 1)

    def refuse(*args: object, **options: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    run.link(1, FINAL)
    assert contents(run.checkpoint(FINAL)) == contents(run.checkpoint(1))
    run.close()


def test_a_new_folder_in_which_nothing_was_written_is_removed(tmp_path: Path) -> None:
    kept, used, new = (tmp_path / name for name in ("kept", "used", "new"))
    kept.mkdir()
    for folder in (kept, used, new):
        run = RunDirectory(folder, resuming=False)
        if folder == used:
            (folder / "training_log.jsonl").write_text("")
        run.close()
        run.close()
    assert kept.exists() and used.exists() and not new.exists()
