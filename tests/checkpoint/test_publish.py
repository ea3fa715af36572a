"""A directory appears complete or not at all, whatever goes wrong."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import npt_fast as npt
from npt_fast.checkpoint import linux, publish
from npt_fast.checkpoint.merge import merge
from npt_fast.checkpoint.publish import StagedDirectory
from npt_fast.errors import MergeError, NPTError
from npt_fast.training import checkpoint_writer
from npt_fast.training.run_directory import RunDirectory
from npt_fast.transfer.bake import export_lora
from npt_fast.transfer.session import Session
from tests.checkpoints import layer_weights, write_checkpoint
from tests.training import tiny
from tests.transfer.models import base, converted, random_modulation

NAMES = [
    "merged",
    "with space",
    "[red]brackets]",
    "*?",
    "percent %s {name}",
    "über-合并-🧠",
    "-starts-with-a-dash",
    "quote'\"$HOME`x`\\",
    "line\nbreak",
    ".hidden",
    "x" * 255,
    "合" * 85,
    os.fsdecode(b"not-utf8-\xff"),
]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stage(target: Path, files: dict[str, bytes], *, replace: bool = False) -> None:
    """Write files into a staged directory and publish it."""
    with StagedDirectory(target, replace=replace) as staged:
        for name, data in files.items():
            (staged.path / name).write_bytes(data)
        staged.publish()


def names_in(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.fixture
def no_renameat2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Imitate a kernel or file system without renameat2."""

    def refuse(folder: int, old: str, new: str, flags: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(linux, "rename", refuse)


@pytest.fixture(params=["renameat2", "no renameat2"])
def either_kernel(request: pytest.FixtureRequest) -> None:
    if request.param == "no renameat2":
        request.getfixturevalue("no_renameat2")


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


# --- the usual


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name[:20]))
@pytest.mark.usefixtures("either_kernel")
def test_it_appears_under_its_name(tmp_path: Path, name: str) -> None:
    target = tmp_path / name
    stage(target, {"a": b"1"})
    assert content(target) == {"a": b"1"}
    stage(target, {"b": b"2"}, replace=True)
    assert content(target) == {"b": b"2"}
    assert names_in(tmp_path) == [name]


def test_nothing_appears_before_it_is_published(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with StagedDirectory(target, replace=False) as staged:
        (staged.path / "a").write_bytes(b"1")
        assert not target.exists()
        assert staged.path.parent == tmp_path  # else the rename could not be one step
        assert staged.path.name.startswith(".")
        staged.publish()
        assert content(target) == {"a": b"1"}
    assert names_in(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, SystemExit, MemoryError, OSError])
@pytest.mark.parametrize("existing", [False, True])
def test_nothing_is_left_after_an_exception(
    tmp_path: Path, error: type[BaseException], existing: bool
) -> None:
    target = tmp_path / "out"
    if existing:
        stage(target, {"old": b"old"})
    with pytest.raises(error), StagedDirectory(target, replace=existing) as staged:
        (staged.path / "a").write_bytes(b"1")
        (staged.path / "sub").mkdir()
        raise error
    assert names_in(tmp_path) == (["out"] if existing else [])
    assert not existing or content(target) == {"old": b"old"}


def test_leaving_without_publishing_leaves_nothing(tmp_path: Path) -> None:
    with StagedDirectory(tmp_path / "out", replace=False) as staged:
        (staged.path / "a").write_bytes(b"1")
    assert names_in(tmp_path) == []


def test_no_descriptors_or_locks_are_left(tmp_path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    stage(tmp_path / "out", {"a": b"1"})
    stage(tmp_path / "out", {"b": b"1"}, replace=True)
    with pytest.raises(MergeError):
        stage(tmp_path / "out", {"c": b"1"})
    assert set(os.listdir("/proc/self/fd")) == before


# --- parents


def test_missing_parents_are_made(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "c" / "out"
    stage(target, {"a": b"1"})
    assert content(target) == {"a": b"1"}
    assert names_in(target.parent) == ["out"]


def test_made_parents_go_again_when_it_fails(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    target = tmp_path / "there" / "b" / "c" / "out"
    with pytest.raises(KeyError), StagedDirectory(target, replace=False) as staged:
        assert staged.path.parent == target.parent
        raise KeyError
    assert names_in(tmp_path) == ["there"]
    assert names_in(tmp_path / "there") == []


def test_made_parents_stay_when_someone_uses_them(tmp_path: Path) -> None:
    target = tmp_path / "b" / "c" / "out"
    with pytest.raises(KeyError), StagedDirectory(target, replace=False):
        (tmp_path / "b" / "mine").write_bytes(b"1")
        raise KeyError
    assert names_in(tmp_path / "b") == ["mine"]


@pytest.mark.parametrize("refused", ["listdir", "flock"])
def test_made_parents_go_again_when_staging_cannot_begin(
    tmp_path: Path, refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError(errno.EACCES, "refused")

    if refused == "flock":
        monkeypatch.setattr(fcntl, "flock", refuse)
    else:
        monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(PermissionError):
        stage(tmp_path / "b" / "c" / "out", {})
    monkeypatch.undo()
    assert names_in(tmp_path) == []


def test_made_parents_go_again_when_a_further_one_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.mkdir

    def refuse(name: str, mode: int, *, dir_fd: int) -> None:
        if name == "c":
            raise OSError(errno.ENOSPC, "full")
        real(name, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(OSError, match="full"):
        stage(tmp_path / "b" / "c" / "out", {})
    assert names_in(tmp_path) == []


def test_a_parent_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "in", layer_weights(1))
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(MergeError, match=r"(?i)not a directory") as caught:
        merge([checkpoint], tmp_path / "file" / "out")
    assert "\n" not in str(caught.value)
    assert names_in(tmp_path) == ["file", "in"]
    assert (tmp_path / "file").read_bytes() == b"mine"


@pytest.mark.parametrize("where", ["target", "parent"])
def test_a_name_that_is_too_long_is_one_line(tmp_path: Path, where: str) -> None:
    checkpoint = write_checkpoint(tmp_path / "in", layer_weights(1))
    long = tmp_path / "new" / ("x" * 300)
    with pytest.raises(MergeError, match="too long") as caught:
        merge([checkpoint], long if where == "target" else long / "out")
    assert "\n" not in str(caught.value)
    assert names_in(tmp_path) == ["in"]


# --- races


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.usefixtures("either_kernel")
def test_a_target_that_appears_meanwhile_is_kept(tmp_path: Path, full: bool) -> None:
    target = tmp_path / "out"
    with (
        pytest.raises(MergeError, match="appeared while merging; nothing was replaced"),
        StagedDirectory(target, replace=False) as staged,
    ):
        (staged.path / "a").write_bytes(b"mine")
        target.mkdir()
        if full:
            (target / "a").write_bytes(b"theirs")
        staged.publish()
    assert content(target) == ({"a": b"theirs"} if full else {})
    assert names_in(tmp_path) == ["out"]


def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(MergeError), StagedDirectory(target, replace=False) as staged:
        target.write_bytes(b"theirs")
        staged.publish()
    assert target.read_bytes() == b"theirs"
    assert names_in(tmp_path) == ["out"]


def test_a_target_that_vanishes_meanwhile_does_not_matter(tmp_path: Path) -> None:
    target = tmp_path / "out"
    stage(target, {"old": b"old"})
    with StagedDirectory(target, replace=True) as staged:
        (staged.path / "a").write_bytes(b"1")
        shutil.rmtree(target)
        staged.publish()
    assert content(target) == {"a": b"1"}


def test_two_at_once_do_not_meet(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with StagedDirectory(target, replace=False) as first:
        (first.path / "a").write_bytes(b"first")
        with pytest.raises(MergeError), StagedDirectory(target, replace=False) as second:
            assert second.path != first.path
            (second.path / "a").write_bytes(b"second")
            first.publish()
            second.publish()
    assert content(target) == {"a": b"first"}
    assert names_in(tmp_path) == ["out"]


@pytest.mark.usefixtures("either_kernel")
def test_a_target_that_another_run_replaces_just_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    stage(target, {"old": b"old"})
    real = publish._exchange

    def exchange(*names: Any) -> None:
        monkeypatch.setattr(publish, "_exchange", real)
        stage(target, {"theirs": b"theirs"}, replace=True)
        real(*names)

    monkeypatch.setattr(publish, "_exchange", exchange)
    stage(target, {"mine": b"mine"}, replace=True)
    assert content(target) == {"mine": b"mine"}
    assert names_in(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [FileNotFoundError, BlockingIOError])
def test_a_directory_taken_before_it_is_locked_is_made_again(
    tmp_path: Path, error: type[OSError], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between mkdir and flock, another run may take the directory for abandoned and remove it."""
    real = publish._lock
    taken: list[str] = []

    def lock(folder: int, name: str) -> int:
        if not taken:
            taken.append(name)
            (tmp_path / name).rmdir()
            raise error
        return real(folder, name)

    monkeypatch.setattr(publish, "_lock", lock)
    stage(tmp_path / "out", {"a": b"1"})
    assert content(tmp_path / "out") == {"a": b"1"}
    assert names_in(tmp_path) == ["out"]
    assert len(taken) == 1


# --- replacing


@pytest.mark.usefixtures("either_kernel")
def test_replacing_leaves_no_stale_file(tmp_path: Path) -> None:
    target = tmp_path / "out"
    stage(target, {"old": b"old", "both": b"old", "npt_weights.safetensors.index.json": b"{}"})
    stage(target, {"new": b"new", "both": b"new"}, replace=True)
    assert content(target) == {"new": b"new", "both": b"new"}
    assert names_in(tmp_path) == ["out"]


@pytest.mark.usefixtures("either_kernel")
def test_an_interruption_after_the_swap_leaves_the_new_one_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    stage(target, {"old": b"old"})

    def sync(directory: int) -> None:
        if names_in(target) == ["new"]:
            raise KeyboardInterrupt

    monkeypatch.setattr(publish, "_sync", sync)
    with pytest.raises(KeyboardInterrupt):
        stage(target, {"new": b"new"}, replace=True)
    assert content(target) == {"new": b"new"}
    assert names_in(tmp_path) == ["out"]


def test_a_swap_that_fails_halfway_restores_the_old(
    tmp_path: Path, no_renameat2: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    stage(target, {"old": b"old"})
    real = os.rename
    calls: list[int] = []

    def second_fails(old: str, new: str, **folders: int) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.EIO, "broken")
        real(old, new, **folders)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(OSError, match="broken"):
        stage(target, {"new": b"new"}, replace=True)
    monkeypatch.undo()
    assert len(calls) == 3
    assert content(target) == {"old": b"old"}
    assert names_in(tmp_path) == ["out"]


@pytest.mark.usefixtures("either_kernel")
def test_a_link_stays_a_link(tmp_path: Path) -> None:
    real = tmp_path / "elsewhere" / "real"
    stage(real, {"old": b"old"})
    link = tmp_path / "out"
    link.symlink_to("elsewhere/real")
    stage(link, {"new": b"new"}, replace=True)
    assert link.is_symlink()
    assert os.readlink(link) == "elsewhere/real"
    assert content(real) == {"new": b"new"}
    assert names_in(tmp_path) == ["elsewhere", "out"]
    assert names_in(real.parent) == ["real"]


def test_merging_onto_a_link_replaces_what_it_names(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "in", layer_weights(1))
    real = tmp_path / "elsewhere" / "real"
    real.mkdir(parents=True)
    for name in ("npt_weights.pt", "training_state.pt"):
        (real / name).write_bytes(b"old")
    (tmp_path / "out").symlink_to("elsewhere/real")
    with pytest.raises(MergeError, match="already exists"):
        merge([checkpoint], tmp_path / "out")
    merge([checkpoint], tmp_path / "out", force=True)
    assert (tmp_path / "out").is_symlink()
    assert "training_state.pt" not in names_in(real)
    assert "npt_weights.pt" in names_in(real)
    assert names_in(real.parent) == ["real"]


def test_a_dangling_link_is_not_replaced(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "in", layer_weights(1))
    (tmp_path / "out").symlink_to("nowhere")
    for force in (False, True):
        with pytest.raises(MergeError):
            merge([checkpoint], tmp_path / "out", force=force)
    assert os.readlink(tmp_path / "out") == "nowhere"
    assert names_in(tmp_path) == ["in", "out"]


# --- what killed processes leave


def abandoned(target: Path) -> Path:
    """The directory that a process leaves if it is killed while it stages `target`."""
    staged = StagedDirectory(target, replace=False)
    staged.__enter__()
    (staged.path / "half").write_bytes(b"half")
    (staged.path / "sub").mkdir()
    os.close(staged.fd)  # like the kernel after a process was killed
    return staged.path


def test_abandoned_directories_are_removed(tmp_path: Path) -> None:
    target = tmp_path / "out"
    left = [abandoned(target)]
    # one more, made by hand, since making it properly would remove the first
    shutil.copytree(left[0], left[0].with_name(f".out.npt-fast-{0:012x}"))
    assert len(names_in(tmp_path)) == 2
    stage(target, {"a": b"1"})
    assert names_in(tmp_path) == ["out"]


def test_a_directory_in_use_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with StagedDirectory(target, replace=False) as other:
        (other.path / "a").write_bytes(b"theirs")
        stage(tmp_path / "out", {"a": b"mine"})
        assert content(other.path) == {"a": b"theirs"}
    assert content(target) == {"a": b"mine"}


def test_only_directories_of_this_target_are_taken_for_abandoned(tmp_path: Path) -> None:
    left = abandoned(tmp_path / "other")
    prefix = ".out.npt-fast-"
    (tmp_path / f"{prefix}file").write_bytes(b"mine")
    keep = tmp_path / "keep"
    keep.mkdir()
    (keep / "a").write_bytes(b"mine")
    (tmp_path / f"{prefix}link").symlink_to("keep")
    stage(tmp_path / "out", {"a": b"1"})
    assert names_in(tmp_path) == sorted(
        [left.name, f"{prefix}file", "keep", f"{prefix}link", "out"]
    )
    assert content(keep) == {"a": b"mine"}


def test_a_users_own_hidden_directory_is_kept(tmp_path: Path) -> None:
    """Only directories with a name as we make it may be removed."""
    mine = tmp_path / ".out.npt-fast-backup-of-monday"
    mine.mkdir()
    (mine / "a").write_bytes(b"mine")
    stage(tmp_path / "out", {"a": b"1"})
    assert content(mine) == {"a": b"mine"}


def test_links_inside_an_abandoned_directory_are_not_followed(tmp_path: Path) -> None:
    keep = tmp_path / "keep"
    keep.mkdir()
    (keep / "a").write_bytes(b"mine")
    left = abandoned(tmp_path / "out")
    (left / "link").symlink_to("../keep")
    stage(tmp_path / "out", {"a": b"1"})
    assert names_in(tmp_path) == ["keep", "out"]
    assert content(keep) == {"a": b"mine"}


# --- modes


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002, 0o027])
@pytest.mark.usefixtures("umask")
def test_modes_are_what_the_umask_asks_for(tmp_path: Path, mask: int) -> None:
    checkpoint = write_checkpoint(tmp_path / "in", layer_weights(1), config={"model_name": "m"})
    for path in checkpoint.iterdir():
        path.chmod(0o600)  # the inputs' modes do not matter
    os.umask(mask)
    target = tmp_path / "new" / "out"
    merge([checkpoint], target)
    merge([checkpoint], target, force=True)
    for folder in (target, target.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~mask
    assert len(list(target.iterdir())) == 4
    for path in target.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask, path.name


# --- a folder that others write to

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


def swapped(path: Path, link_to: Path) -> Path:
    """Move a directory and put a link in its place; returns the directory's new path."""
    moved = path.with_name("moved")
    path.rename(moved)
    path.symlink_to(link_to)
    return moved


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


# --- the disk


def test_directories_are_synced_around_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First the directory is synced, then it is renamed, then its parent is synced."""
    events: list[tuple[str, str]] = []
    real_sync, real_rename = os.fsync, linux.rename

    def sync(fd: int) -> None:
        events.append(("fsync", os.readlink(f"/proc/self/fd/{fd}")))
        real_sync(fd)

    def rename(folder: int, old: str, new: str, flags: int) -> None:
        events.append(("rename", f"{os.readlink(f'/proc/self/fd/{folder}')}/{new}"))
        real_rename(folder, old, new, flags)

    checkpoint = write_checkpoint(tmp_path / "in", layer_weights(1), config={"model_name": "m"})
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(linux, "rename", rename)
    target = tmp_path / "out"
    merge([checkpoint], target)
    (at,) = (index for index, event in enumerate(events) if event == ("rename", str(target)))
    synced = [Path(name) for kind, name in events[:at] if kind == "fsync"]
    assert {path.name for path in synced[:-1]} == set(names_in(target))
    assert synced[-1].parent == tmp_path
    assert synced[-1].name.startswith(".out.npt-fast-")
    assert ("fsync", str(tmp_path)) in events[at:]


@pytest.mark.parametrize("replaced", [False, True], ids=["between", "before-clean-up"])
def test_a_swap_that_was_killed_halfway_is_settled(tmp_path: Path, replaced: bool) -> None:
    """Without renameat2 the old output has a third name for a moment; it must not get lost."""
    target = tmp_path / "out"
    aside = tmp_path / ".out.npt-fast-0123456789ab-old"
    aside.mkdir()
    (aside / "a").write_bytes(b"old")
    if replaced:
        target.mkdir()
        (target / "a").write_bytes(b"newer")
    with StagedDirectory(target, replace=True):
        assert content(target) == {"a": b"newer" if replaced else b"old"}
    assert names_in(tmp_path) == ["out"]


# --- where locks do not work


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


@pytest.mark.parametrize("replace", [False, True])
def test_a_file_system_that_cannot_sync_directories(
    tmp_path: Path, replace: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on some FUSE file systems; a published output must not be reported as a failure."""
    if replace:
        stage(tmp_path / "out", {"old": b"old"})

    def refuse(fd: int) -> None:
        assert stat.S_ISDIR(os.fstat(fd).st_mode)
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", refuse)
    stage(tmp_path / "out", {"a": b"1"}, replace=replace)
    assert content(tmp_path / "out") == {"a": b"1"}


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
