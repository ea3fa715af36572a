"""What killed processes leave is removed or settled, and nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from npt_fast.checkpoint.publish import StagedDirectory
from tests.checkpoint.staging import abandoned, content, names_in, stage


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
