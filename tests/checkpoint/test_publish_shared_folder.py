"""Publishing in a folder that other users write to."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

import npt_fast as npt
from npt_fast.checkpoint import publish
from npt_fast.checkpoint.merge import merge
from npt_fast.checkpoint.publish import StagedDirectory
from npt_fast.errors import MergeError, NPTError
from npt_fast.training import checkpoint_writer
from npt_fast.training.run_directory import RunDirectory
from npt_fast.transfer.bake import export_lora
from npt_fast.transfer.session import Session
from tests.checkpoint.staging import content, names_in, stage, swapped
from tests.checkpoints import layer_weights, write_checkpoint
from tests.training import tiny
from tests.transfer.models import base, converted, random_modulation

PLANTED = f".out.npt-fast-{'0' * 24}{'1' * 32}"


def victim(folder: Path) -> Path:
    """A folder of another user, for links to lead to."""
    path = folder / "victim"
    path.mkdir()
    (path / "a").write_bytes(b"precious")
    return path


@pytest.mark.parametrize("aside", ["", "-old"])
@pytest.mark.parametrize("kind", ["link", "dangling link", "file", "pipe"])
def test_planted_names_that_are_no_directories_stay(tmp_path: Path, kind: str, aside: str) -> None:
    theirs = victim(tmp_path)
    planted = tmp_path / (PLANTED + aside)
    if kind.endswith("link"):
        planted.symlink_to("victim" if kind == "link" else "nowhere")
    elif kind == "file":
        planted.write_bytes(b"theirs")
    else:
        os.mkfifo(planted)
    with StagedDirectory(tmp_path / "out", replace=True) as staged:
        assert staged.left == [planted]
        assert not os.path.lexists(tmp_path / "out")
        staged.publish()
    assert names_in(tmp_path) == sorted([planted.name, "out", "victim"])
    assert content(theirs) == {"a": b"precious"}
    assert content(tmp_path / "out") == {}


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("aside", ["", "-old"])
def test_planted_directories_of_other_users_stay(
    tmp_path: Path, aside: str, existing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = tmp_path / (PLANTED + aside)
    planted.mkdir()
    (planted / "a").write_bytes(b"planted")
    if os.geteuid() == 0:
        os.chown(planted, 65534, 65534)
    else:
        real = publish._look

        def look(folder: int, name: str) -> os.stat_result | None:
            status = real(folder, name)
            if status is None or name != planted.name:
                return status
            return os.stat_result((*status[:4], status.st_uid + 1, *status[5:]))

        monkeypatch.setattr(publish, "_look", look)
    if existing:
        stage(tmp_path / "out", {"old": b"old"})
    with StagedDirectory(tmp_path / "out", replace=True) as staged:
        assert staged.left == [planted]
        (staged.path / "a").write_bytes(b"mine")
        staged.publish()
    assert content(tmp_path / "out") == {"a": b"mine"}
    assert content(planted) == {"a": b"planted"}


@pytest.mark.parametrize(
    ("parent", "mode", "restored"),
    [
        (0o700, 0o755, True),
        (0o755, 0o777, True),
        (0o1777, 0o755, True),
        (0o1777, 0o775, False),  # others may have moved it here
        (0o777, 0o755, False),  # others may have renamed it
        (0o775, 0o700, False),
    ],
    ids=lambda value: oct(value) if type(value) is int else "",
)
def test_what_was_put_aside_is_restored_only_where_others_cannot_plant_it(
    tmp_path: Path, parent: int, mode: int, restored: bool
) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    aside = folder / f"{PLANTED}-old"
    aside.mkdir()
    aside.chmod(mode)
    (aside / "a").write_bytes(b"old")
    folder.chmod(parent)
    with StagedDirectory(folder / "out", replace=True) as staged:
        assert content(folder / "out" if restored else aside) == {"a": b"old"}
        assert (folder / "out").exists() == restored
        assert staged.left == ([] if restored else [aside])
        staged.publish()
    assert content(folder / "out") == {}
    assert aside.exists() != restored


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_nothing_is_restored_in_a_folder_of_another_user(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    aside = folder / f"{PLANTED}-old"
    aside.mkdir()
    folder.chmod(0o1755)  # its owner may rename what is in it all the same
    os.chown(folder, 65534, 65534)
    with StagedDirectory(folder / "out", replace=True) as staged:
        assert staged.left == [aside]
        assert not (folder / "out").exists()


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    ("when", "verify"), [("merging", False), ("merging", True), ("verifying", True)]
)
def test_a_directory_that_is_swapped_for_a_link_during_a_merge(
    tmp_path: Path, when: str, force: bool, verify: bool
) -> None:
    checkpoint = write_checkpoint(tmp_path / "in", layer_weights(1), config={"model_name": "m"})
    theirs = victim(tmp_path)
    folder = tmp_path / "shared"
    folder.mkdir()
    target = folder / "out"
    if force:
        shutil.copytree(checkpoint, target)
        (target / "config.json").write_bytes(b"old")
    moved: list[Path] = []

    def progress(activity: str, done: int, total: int) -> None:
        if activity == when and done == total and not moved:
            (staged,) = folder.glob(".out.npt-fast-*")
            moved.append(swapped(staged, theirs))

    with pytest.raises(MergeError, match="somebody has moved or replaced") as caught:
        merge([checkpoint], target, force=force, verify=verify, progress=progress)
    assert "\n" not in str(caught.value)
    assert moved
    assert content(theirs) == {"a": b"precious"}
    assert target.exists() == force
    assert not force or (target / "config.json").read_bytes() == b"old"


def npt_save(target: Path) -> None:
    npt.save(converted(), target)


def training_checkpoint(target: Path) -> None:
    checkpoint_writer.write_checkpoint(
        target, weights=layer_weights(1), format="pt", training_state={}, multi_layer_state={},
        config={}, npt_config={},
    )  # fmt: skip


def second_name(target: Path) -> None:
    run = RunDirectory(target.parent.parent, resuming=True)
    write_checkpoint(run.checkpoint(1), layer_weights(1))
    try:
        run.link(1, target.name)
    finally:
        run.close()


def session(target: Path) -> None:
    model = converted()
    saved = Session(model, tiny.tokenizer())
    saved.extract("a", "text")
    saved.save(target)


def lora(target: Path) -> None:
    export_lora(random_modulation(), base(), target)


@pytest.mark.parametrize("write", [npt_save, training_checkpoint, second_name, session, lora])
@pytest.mark.parametrize("link", [True, False], ids=["link", "directory"])
def test_no_writer_leaves_the_directory_that_was_made(
    tmp_path: Path, write: Callable[[Path], None], link: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = victim(tmp_path)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    real = StagedDirectory.__enter__

    def enter(self: StagedDirectory) -> StagedDirectory:
        real(self)
        swapped(self.path, theirs)
        if not link:
            self.path.unlink()
            theirs.rename(self.path)
        return self

    monkeypatch.setattr(StagedDirectory, "__enter__", enter)
    with pytest.raises(NPTError, match="somebody has moved or replaced") as caught:
        write(folder / "out")
    assert "\n" not in str(caught.value)
    (planted,) = folder.glob(".out.npt-fast-*")
    assert content(planted) == {"a": b"precious"}
    assert len(content(folder / "moved")) >= 1
    assert not (folder / "out").exists()


@pytest.mark.parametrize("taken_along", [False, True])
def test_a_folder_that_is_swapped_while_it_is_written_to(tmp_path: Path, taken_along: bool) -> None:
    """The files may be in the folder of that path now, or in the first folder, but not in both."""
    folder, elsewhere = tmp_path / "shared", tmp_path / "elsewhere"
    folder.mkdir()
    theirs = victim(tmp_path)
    with (
        pytest.raises(OSError, match="somebody has moved or replaced"),
        StagedDirectory(folder / "out", replace=False) as staged,
    ):
        folder.rename(elsewhere)
        folder.mkdir()
        hidden = staged.path.name
        if taken_along:
            (elsewhere / hidden).rename(folder / hidden)
            theirs.rename(elsewhere / hidden)
        staged.publish()
    assert "out" not in names_in(folder) + names_in(elsewhere)
    assert content(elsewhere / hidden if taken_along else theirs) == {"a": b"precious"}


@pytest.mark.parametrize("kind", ["link", "not empty", "another user's"])
def test_a_directory_that_is_swapped_before_it_is_opened(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "another user's" and os.geteuid() != 0:
        pytest.skip("only root can give a directory away")
    theirs = victim(tmp_path)
    folder = tmp_path / "shared"
    real = publish._lock

    def lock(parent: int, name: str) -> int:
        monkeypatch.undo()
        swapped(folder / name, theirs)
        if kind != "link":
            (folder / name).unlink()
            theirs.rename(folder / name)
        if kind == "another user's":
            (folder / name / "a").unlink()
            os.chown(folder / name, 65534, 65534)
        return real(parent, name)

    monkeypatch.setattr(publish, "_lock", lock)
    with pytest.raises(OSError, match=r"Not a directory|symbolic links|somebody has moved"):
        stage(folder / "out", {"a": b"mine"})
    assert not (folder / "out").exists()
    if kind != "another user's":
        (planted,) = folder.glob(".out.npt-fast-*")
        assert content(planted) == {"a": b"precious"}


def test_a_new_parent_that_is_swapped_for_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = victim(tmp_path)
    real = os.mkdir

    def mkdir(name: str, mode: int = 0o777, *, dir_fd: int) -> None:
        real(name, mode, dir_fd=dir_fd)
        if name == "new":
            swapped(tmp_path / "new", theirs)

    monkeypatch.setattr(os, "mkdir", mkdir)
    with pytest.raises(OSError, match=r"Not a directory|symbolic links"):
        stage(tmp_path / "new" / "out", {"a": b"mine"})
    assert content(theirs) == {"a": b"precious"}


def test_what_takes_the_place_of_the_old_target_is_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the exchange the old target has the hidden name, until another directory gets it."""
    theirs = victim(tmp_path)
    target = tmp_path / "out"
    stage(target, {"old": b"old"})
    real = publish._sync

    def sync(directory: int) -> None:
        real(directory)
        if names_in(target) == ["new"]:
            staged.path.rename(tmp_path / "moved")
            theirs.rename(staged.path)

    monkeypatch.setattr(publish, "_sync", sync)
    with StagedDirectory(target, replace=True) as staged:
        os.close(staged.open("new"))
        staged.publish()
    assert content(staged.path) == {"a": b"precious"}


def test_names_cannot_be_foreseen(tmp_path: Path) -> None:
    """A name has 16 random bytes after the owner's mark."""
    names = set()
    for _ in range(9):
        with StagedDirectory(tmp_path / "out", replace=False) as staged:
            names.add(staged.path.name.removeprefix(".out.npt-fast-"))
    assert {len(name) for name in names} == {24 + 32}
    assert len({name[:24] for name in names}) == 1
    for start in range(24, 56, 8):
        assert len({name[start : start + 8] for name in names}) == 9


@pytest.mark.usefixtures("umask")
def test_nobody_else_sees_the_directory_before_it_is_published(tmp_path: Path) -> None:
    os.umask(0)
    with StagedDirectory(tmp_path / "out", replace=False) as staged:
        assert stat.S_IMODE(staged.path.stat().st_mode) == 0o700
        staged.publish()
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777


@pytest.mark.usefixtures("umask")
def test_a_group_is_inherited(tmp_path: Path) -> None:
    os.umask(0o027)
    tmp_path.chmod(0o2755)
    stage(tmp_path / "new" / "out", {"a": b"1"})
    (tmp_path / "by-mkdir").mkdir()
    expected = (tmp_path / "by-mkdir").stat().st_mode
    assert expected & stat.S_ISGID
    assert (tmp_path / "new" / "out").stat().st_mode == expected


def test_errors_name_the_whole_path(tmp_path: Path) -> None:
    with StagedDirectory(tmp_path / "out", replace=False) as staged:
        os.close(staged.open("a"))
        with pytest.raises(FileExistsError) as caught:
            staged.open("a")
        assert caught.value.filename == str(staged.path / "a")


_AS_NOBODY = """
import ctypes, os, sys  # what is imported later may lie where only root may look
from pathlib import Path
from npt_fast.checkpoint.publish import StagedDirectory

os.setgroups([])
os.setresgid(*[65534] * 3)
os.setresuid(*[65534] * 3)
for text in ("first", "second"):
    with StagedDirectory(Path(sys.argv[1]), replace=True) as staged:
        (staged.path / "a").write_text(text)
        staged.publish()
    print(*staged.left)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_what_only_another_user_can_delete_is_named_every_time() -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        folder = Path(name)
        folder.chmod(0o777)
        stage(folder / "out", {"a": b"old", "b": b"old"})
        result = subprocess.run(
            [sys.executable, "-c", _AS_NOBODY, str(folder / "out")],
            capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONPATH": os.getcwd()},
        )  # fmt: skip
        assert content(folder / "out") == {"a": b"second"}
        (left,) = (path for path in folder.iterdir() if path.name != "out")
        assert content(left) == {"a": b"old", "b": b"old"}
        assert result.stdout.splitlines() == [str(left), str(left)]
