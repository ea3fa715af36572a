"""Publishing while others write to the same place."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from npt_fast.checkpoint import publish
from npt_fast.checkpoint.publish import StagedDirectory
from npt_fast.errors import MergeError
from tests.checkpoint.staging import content, names_in, stage


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
