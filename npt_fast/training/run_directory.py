"""The folder of a run: one run at a time, complete checkpoints, ``best`` and ``final``."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from npt_fast.checkpoint.publish import StagedDirectory, disk_errors, lock
from npt_fast.checkpoint.training_run import CHECKPOINTS, checkpoints_in
from npt_fast.errors import TrainingError

_REMOVED = ".removed"


def checkpoints(folder: Path) -> dict[int, Path]:
    """Return the checkpoints of the run in `folder` by step, ascending."""
    return checkpoints_in(folder / CHECKPOINTS)


class RunDirectory:
    """Folder of a run, locked; its ``checkpoints`` holds ``checkpoint-N``, ``best``, ``final``.

    Args:
        path: folder of the run, created if needed.
        resuming: whether the run resumes from a checkpoint; a new run refuses a folder that has
            checkpoints.

    Raises:
        TrainingError: another process trains into the folder, or it has another run's checkpoints.
    """

    def __init__(self, path: Path, *, resuming: bool) -> None:
        self.path = path
        with disk_errors(path, TrainingError):
            self._is_new = not path.exists()
            path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            lock(self._lock)
        except OSError:
            os.close(self._lock)
            raise TrainingError(
                f"{path}: another run is training into it; choose another --wandb_name"
            ) from None
        if not resuming and checkpoints(path):
            os.close(self._lock)
            raise TrainingError(
                f"{path}: holds checkpoints of another run; continue it with --resume_from, "
                "or choose another --wandb_name"
            )

    def checkpoint(self, name: int | str) -> Path:
        """Return the path of a checkpoint: that of a step, ``best`` or ``final``."""
        return self.path / CHECKPOINTS / (f"checkpoint-{name}" if type(name) is int else str(name))

    def checkpoint_steps(self) -> Iterator[int]:
        """Yield the steps that have a checkpoint, ascending."""
        yield from checkpoints(self.path)

    def link(self, step: int, name: str) -> None:
        """Give the checkpoint of `step` a second name, by hard links where the disk has them."""
        source = self.checkpoint(step)
        target = self.checkpoint(name)
        with disk_errors(target, TrainingError), StagedDirectory(target, replace=True) as staged:
            for file in source.iterdir():
                try:
                    # a hard link: a second name costs no space and survives the removal of the
                    # first
                    os.link(file, file.name, dst_dir_fd=staged.fd, follow_symlinks=False)
                except OSError:
                    with file.open("rb") as original, staged.file(file.name) as copy:
                        shutil.copyfileobj(original, copy)
            staged.publish()

    def keep_last(self, count: int, *, newest: int | None = None) -> None:
        """Remove all but the newest `count` checkpoints; ``best`` and ``final`` stay.

        Args:
            count: number of checkpoints to keep.
            newest: step of the checkpoint just written. Later ones, which an earlier run left, stay
                and do not count.
        """
        steps = [step for step in self.checkpoint_steps() if newest is None or step <= newest]
        for step in steps[:-count]:
            path = self.checkpoint(step)
            # renamed first, so that no checkpoint is ever there in part
            path.rename(path.with_name(f".{path.name}{_REMOVED}"))
        for path in self.path.glob(f"{CHECKPOINTS}/.checkpoint-*{_REMOVED}"):
            shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        """Unlock the folder for other runs; remove it if it is new and nothing was written."""
        if self._is_new:
            with contextlib.suppress(OSError):  # it is not empty
                self.path.rmdir()
        with contextlib.suppress(OSError):
            os.close(self._lock)
