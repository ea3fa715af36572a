"""A directory appears complete or not at all, whatever goes wrong."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path

import pytest

from npt_fast.checkpoint import linux, publish
from npt_fast.checkpoint.merge import merge
from npt_fast.checkpoint.publish import StagedDirectory
from npt_fast.errors import MergeError
from tests.checkpoint.staging import content, names_in, stage
from tests.checkpoints import layer_weights, write_checkpoint

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
