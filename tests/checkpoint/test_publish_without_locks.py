"""Publishing where locks do not work."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from npt_fast.checkpoint import publish
from npt_fast.checkpoint.merge import merge
from npt_fast.checkpoint.publish import StagedDirectory
from tests.checkpoint.staging import abandoned, content, names_in, stage
from tests.checkpoints import layer_weights, write_checkpoint


def other_process(target: Path, *, ended: bool) -> Path:
    """A staging directory of another process, which still runs or has ended."""
    code = (
        "import sys; from pathlib import Path\n"
        "from npt_fast.checkpoint.publish import StagedDirectory\n"
        "import npt_fast.checkpoint.publish as publish, errno, fcntl\n"
        "def refuse(*a): raise OSError(errno.ENOLCK, 'no locks')\n"
        "fcntl.flock = refuse\n"
        "staged = StagedDirectory(Path(sys.argv[1]), replace=False).__enter__()\n"
        "(staged.path / 'half').write_text('half')\n"
        "print(staged.path, flush=True); sys.stdin.read()\n"
        "import os; os._exit(1)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(target)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdin is not None
    path = Path(process.stdout.readline().strip())
    if ended:
        process.stdin.close()
        process.wait()
    else:
        _RUNNING.append(process)
    return path


_RUNNING: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def no_process_stays() -> Iterator[None]:
    yield
    while _RUNNING:
        process = _RUNNING.pop()
        process.kill()
        process.communicate()


@pytest.fixture(params=["refused", "without effect"])
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(fd: int, operation: int) -> None:
        if request.param == "refused":
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(publish.fcntl, "flock", flock)


@pytest.mark.usefixtures("no_locks")
def test_a_running_process_keeps_its_directory_without_locks(tmp_path: Path) -> None:
    theirs = other_process(tmp_path / "out", ended=False)
    with StagedDirectory(tmp_path / "out", replace=False) as staged:
        (staged.path / "a").write_bytes(b"mine")
        assert staged.left == [theirs]
        staged.publish()
    assert content(theirs) == {"half": b"half"}
    assert content(tmp_path / "out") == {"a": b"mine"}


@pytest.mark.usefixtures("no_locks")
def test_what_an_ended_process_left_is_removed_without_locks(tmp_path: Path) -> None:
    other_process(tmp_path / "out", ended=True)
    stage(tmp_path / "out", {"a": b"mine"})
    assert names_in(tmp_path) == ["out"]


@pytest.mark.usefixtures("no_locks")
@pytest.mark.parametrize("owner", ["", "0" * 24, "f" * 24])
def test_what_nobody_knows_the_owner_of_stays_without_locks(tmp_path: Path, owner: str) -> None:
    """Its name is from an earlier version or another machine."""
    left = tmp_path / f".out.npt-fast-{owner}{'0' * 12}"
    left.mkdir()
    with StagedDirectory(tmp_path / "out", replace=False) as staged:
        assert staged.left == [left]
        staged.publish()
    assert left.exists()


@pytest.mark.usefixtures("no_locks")
def test_a_merge_says_what_it_left_alone(tmp_path: Path) -> None:
    theirs = other_process(tmp_path / "out", ended=False)
    report = merge([write_checkpoint(tmp_path / "in", layer_weights(1))], tmp_path / "out")
    assert any(line.startswith(f"{theirs}: was not removed") for line in report.warnings)


@pytest.mark.parametrize("kind", ["nfs4", "lustre", "fuse.sshfs", "virtiofs", "wekafs", ""])
def test_only_locks_of_local_file_systems_are_trusted(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = abandoned(tmp_path / "out")  # this very process, which is running
    monkeypatch.setattr(publish, "filesystem_type", lambda path: kind)
    stage(tmp_path / "out", {"a": b"mine"})
    assert left.exists()


@pytest.mark.parametrize("swapped", [False, True], ids=["first rename", "second rename"])
@pytest.mark.parametrize("locks", ["locks", "no locks"])
def test_a_swap_that_goes_on_is_not_settled(
    tmp_path: Path, swapped: bool, locks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without renameat2 the old output has a third name until its process has finished the swap."""
    if locks == "no locks":
        monkeypatch.setattr(publish.fcntl, "flock", lambda fd, operation: None)
    target = tmp_path / "out"
    with StagedDirectory(target, replace=True) as other:
        aside = other.path.with_name(other.path.name + "-old")
        aside.mkdir()
        (aside / "a").write_bytes(b"old")
        if swapped:
            other.path.rename(target)
        with StagedDirectory(target, replace=True):
            assert content(aside) == {"a": b"old"}
            assert target.exists() == swapped


@pytest.mark.usefixtures("no_locks")
def test_a_swap_whose_process_has_ended_is_settled_without_locks(tmp_path: Path) -> None:
    target = tmp_path / "out"
    theirs = other_process(target, ended=True)
    aside = theirs.with_name(theirs.name + "-old")
    aside.mkdir()
    (aside / "a").write_bytes(b"old")
    with StagedDirectory(target, replace=True):
        assert content(target) == {"a": b"old"}
    assert names_in(tmp_path) == ["out"]


@pytest.mark.parametrize(
    "number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EBADF]
)
@pytest.mark.parametrize("replace", [False, True])
def test_publishing_works_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, replace: bool
) -> None:
    def flock(fd: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(publish.fcntl, "flock", flock)
    if replace:
        stage(tmp_path / "out", {"old": b"old"})
    stage(tmp_path / "out", {"a": b"1"}, replace=replace)
    assert content(tmp_path / "out") == {"a": b"1"}
    assert names_in(tmp_path) == ["out"]
