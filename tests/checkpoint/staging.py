"""Staged directories and what is in them."""

from __future__ import annotations

import os
from pathlib import Path

from npt_fast.checkpoint.publish import StagedDirectory


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


def abandoned(target: Path) -> Path:
    """The directory that a process leaves if it is killed while it stages `target`."""
    staged = StagedDirectory(target, replace=False)
    staged.__enter__()
    (staged.path / "half").write_bytes(b"half")
    (staged.path / "sub").mkdir()
    os.close(staged.fd)  # like the kernel after a process was killed
    return staged.path


def swapped(path: Path, link_to: Path) -> Path:
    """Move a directory and put a link in its place; returns the directory's new path."""
    moved = path.with_name("moved")
    path.rename(moved)
    path.symlink_to(link_to)
    return moved
