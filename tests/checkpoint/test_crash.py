"""A merge that is killed, interrupted or raced leaves its target absent, old, or complete."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from npt_fast.checkpoint.merge import merge
from tests.checkpoint.killing import Runner
from tests.checkpoints import adamw_state, layer_weights, write_checkpoint

CLI = Path(sys.executable).with_name("npt-fast")
PLANNING, WRITING = 20, 50
"""Number of system calls at which a merge is killed, before it writes and while it does."""

_IMPORTS = """
from npt_fast.checkpoint.merge import merge as write
from npt_fast.checkpoint import verify
"""


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    runner = Runner(_IMPORTS)
    yield runner
    runner.close()


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@dataclass(frozen=True)
class Case:
    """Inputs, and the two contents that the target may have: old, or the result of the merge."""

    inputs: list[Path]
    old: Path
    new: dict[str, bytes]

    def prepare(self, folder: Path, *, force: bool) -> Path:
        """Empty `folder`, put an old checkpoint at the target if `force`; returns the target."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if force:
            shutil.copytree(self.old, folder / "out")
        return folder / "out"

    def state(self, target: Path) -> str:
        """State of the target: ``"absent"``, ``"old"`` or ``"new"``; anything else fails."""
        if not os.path.lexists(target):
            return "absent"
        found = content(target)
        if found == self.new:
            return "new"
        assert found == content(self.old), f"neither old nor new: {sorted(found)}"
        return "old"


def make_case(folder: Path, *, steps: int, **shape: Any) -> Case:
    """Two checkpoints of one layer each, and the expected bytes from an undisturbed merge."""
    inputs = []
    for layer in (3, 5):
        weights = layer_weights(layer, **shape)
        state = adamw_state(weights, steps=steps) if steps else None
        inputs.append(
            write_checkpoint(
                folder / f"in{layer}", weights, training_state=state, config={"model_name": "m"}
            )
        )
    old = folder / "old"
    old.mkdir()
    for name in ("npt_weights.pt", "merge_summary.json", "npt_weights-00001-of-00002.safetensors"):
        (old / name).write_bytes(f"old {name}".encode())
    merge(inputs, folder / "expected")
    return Case(inputs, old, content(folder / "expected"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("small"), steps=2)


@pytest.fixture(scope="module")
def medium(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """20 MB, so that copying takes a good part of the time."""
    shape = {"d": 2048, "f": 8192, "rank": 64, "modulation": "triple"}
    return make_case(tmp_path_factory.mktemp("medium"), steps=0, **shape)


def check_after_kill(
    case: Case, runner: Runner, target: Path, *, force: bool, verify: bool = False
) -> str:
    """State of the target after a kill; a second merge must succeed and leave nothing behind."""
    state = case.state(target)
    assert state in (("old", "new") if force else ("absent", "new"))
    if force or state == "absent":
        code, said = runner.run(case.inputs, target, force=force)
        assert code == 0, said
    assert case.state(target) == "new"
    assert os.listdir(target.parent) == ["out"]
    return state


@pytest.mark.slow
@pytest.mark.parametrize("force", [False, True])
def test_killed_around_system_calls(
    small: Case, runner: Runner, tmp_path: Path, force: bool
) -> None:
    target = small.prepare(tmp_path / "work", force=force)
    code, events = runner.run(small.inputs, target, force=force, at=0)
    assert code == 0, events
    assert small.state(target) == "new"
    last = int(events)
    # the first half of the calls is planning, which leaves nothing
    points = random.Random(1).sample(range(1, last - WRITING), PLANNING)
    points += [*range(last - WRITING, last)]
    states: Counter[str] = Counter()
    for point in points:
        target = small.prepare(tmp_path / "work", force=force)
        code, said = runner.run(small.inputs, target, force=force, at=point)
        assert code == -signal.SIGKILL, f"at {point} of {last}: {code}, {said}"
        states[check_after_kill(small, runner, target, force=force)] += 1
    assert states["new"] > 0 and states["old" if force else "absent"] > PLANNING


@pytest.mark.parametrize("force", [False, True])
def test_killed_at_any_time(medium: Case, runner: Runner, tmp_path: Path, force: bool) -> None:
    target = medium.prepare(tmp_path / "work", force=force)
    began = time.perf_counter()
    assert runner.run(medium.inputs, target, force=force)[0] == 0
    duration = time.perf_counter() - began
    numbers = random.Random(2)
    killed = 0
    for _ in range(200):
        target = medium.prepare(tmp_path / "work", force=force)
        after = numbers.uniform(0, duration)
        code, said = runner.run(medium.inputs, target, force=force, after=after)
        assert code in (0, -signal.SIGKILL), said
        check_after_kill(medium, runner, target, force=force)
        killed += code != 0
        if killed == 30:
            return
    pytest.fail(f"only {killed} of 200 merges were still running when killed")


def test_killed_while_verifying(small: Case, runner: Runner, tmp_path: Path) -> None:
    target = small.prepare(tmp_path / "work", force=False)
    code, events = runner.run(small.inputs, target, verify=True, at=0)
    assert code == 0, events
    verified = content(target)
    last = int(events)
    for point in random.Random(3).sample(range(last // 2, last), 15):
        target = small.prepare(tmp_path / "work", force=False)
        code, said = runner.run(small.inputs, target, verify=True, at=point)
        assert code == -signal.SIGKILL, said
        if target.exists():
            assert content(target) == verified
        else:
            code, said = runner.run(small.inputs, target, verify=True)
            assert code == 0, said
            assert content(target) == verified
        assert os.listdir(target.parent) == ["out"]


def test_what_a_killed_merge_leaves_is_hidden(small: Case, runner: Runner, tmp_path: Path) -> None:
    """So neither a user nor a glob takes it for a checkpoint."""
    target = small.prepare(tmp_path / "work", force=False)
    events = int(runner.run(small.inputs, target, at=0)[1])
    left = set()
    for point in range(events // 2, events, events // 30):
        target = small.prepare(tmp_path / "work", force=False)
        runner.run(small.inputs, target, at=point)
        left.update(name for name in os.listdir(target.parent) if name != "out")
    assert left
    assert all(name.startswith(".out.npt-fast-") for name in left)


# --- signals

# The command line with one call of the library replaced by one that never returns, so that the
# signal arrives at a known place.
_BLOCKED = """
import os, sys, time
name, *arguments = sys.argv[1:]
def block(*args, **kwargs):
    print("ready", flush=True)
    time.sleep(60)
if name == "plan":
    import npt_fast.checkpoint.merge as module
    module.plan_merge = block
elif name == "rmtree":  # interrupted once, and again while it cleans up
    import shutil
    real = shutil.rmtree
    def slow(*args, **kwargs):
        print("cleaning", flush=True)
        time.sleep(0.2)
        real(*args, **kwargs)
    shutil.rmtree, os.fsync = slow, block
else:
    setattr(os, name, block)
from npt_fast.cli.main import main
main(arguments)
"""


def interrupt(case: Case, target: Path, where: str, number: int, *more: str) -> tuple[int, str]:
    """Exit code and stderr of a merge that gets a signal while it runs `where`."""
    command = [sys.executable, "-c", _BLOCKED, where, "merge", "--output", str(target), *more]
    command += ["--checkpoints", *map(str, case.inputs)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", process.communicate()
    process.send_signal(number)
    if where == "rmtree":
        assert process.stdout.readline() == "cleaning\n"
        process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


PLACES = ["plan", "copy_file_range", "fsync", "posix_fadvise", "rmtree"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", PLACES)
def test_signals_leave_nothing(
    small: Case, tmp_path: Path, where: str, number: signal.Signals
) -> None:
    target = small.prepare(tmp_path / "work", force=False) / "new" / "out"
    more = ["--verify"] if where == "posix_fadvise" else []
    code, errors = interrupt(small, target, where, number, *more)
    assert code == 128 + number
    lines = [line for line in errors.splitlines() if not line.startswith("Warning: ")]
    assert len(lines) <= 1 and "Traceback" not in errors
    assert os.listdir(tmp_path / "work") == []


@pytest.mark.parametrize("where", PLACES)
def test_an_interrupted_replacement_keeps_the_old(small: Case, tmp_path: Path, where: str) -> None:
    target = small.prepare(tmp_path / "work", force=True)
    more = ["--verify"] if where == "posix_fadvise" else []
    code, _ = interrupt(small, target, where, signal.SIGINT, "--force", *more)
    assert code == 130
    assert small.state(target) == "old"
    assert os.listdir(target.parent) == ["out"]


# --- races


def start_cli(case: Case, target: Path, *more: str) -> subprocess.Popen[str]:
    command = [CLI, "merge", "--output", target, "--checkpoints", *case.inputs, *more]
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_of_two_merges_at_once_one_wins(medium: Case, tmp_path: Path) -> None:
    for attempt in range(3):
        target = medium.prepare(tmp_path / f"work{attempt}", force=False)
        processes = [start_cli(medium, target) for _ in range(2)]
        outputs = [process.communicate(timeout=120) for process in processes]
        codes = [process.returncode for process in processes]
        assert sorted(codes) == [0, 1], outputs
        said = outputs[codes.index(1)][1].splitlines()
        errors = [line for line in said if not line.startswith("Warning: ")]
        assert len(errors) == 1
        assert errors[0].startswith("Error: ") and str(target) in errors[0]
        assert medium.state(target) == "new"
        assert os.listdir(target.parent) == ["out"]


def test_merges_that_replace_at_once_leave_one_of_them(medium: Case, tmp_path: Path) -> None:
    target = medium.prepare(tmp_path / "work", force=True)
    processes = [start_cli(medium, target, "--force") for _ in range(3)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert medium.state(target) == "new"
    assert os.listdir(target.parent) == ["out"]
