"""The folder of a run: one run at a time, complete checkpoints, the newest and the best."""

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
    """Checkpoints of the run in `folder` by step, ascending."""
    return checkpoints_in(folder / CHECKPOINTS)


class RunDirectory:
    """``<path>/checkpoints/checkpoint-N``, ``best``, ``final``, and the run's other files.

    Args:
        path: folder of the run; made if needed.
        resuming: whether the run goes on from a checkpoint; a new run wants no checkpoints there.

    Raises:
        TrainingError: another process trains into it, or it holds another run's checkpoints.
    """

    def __init__(self, path: Path, *, resuming: bool) -> None:
        self.path = path
        with disk_errors(path, TrainingError):
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
                f"{path}: holds checkpoints of another run; go on with --resume_from, "
                "or choose another --wandb_name"
            )

    def checkpoint(self, name: int | str) -> Path:
        """Where a checkpoint is: of a step, ``best`` or ``final``."""
        return self.path / CHECKPOINTS / (f"checkpoint-{name}" if type(name) is int else str(name))

    def checkpoint_steps(self) -> Iterator[int]:
        """Steps of which there is a checkpoint, ascending."""
        yield from checkpoints(self.path)

    def link(self, step: int, name: str) -> None:
        """Give the checkpoint of `step` a second name; takes no space where links are possible."""
        source = self.checkpoint(step)
        target = self.checkpoint(name)
        with disk_errors(target, TrainingError), StagedDirectory(target, replace=True) as staged:
            for file in source.iterdir():
                try:
                    os.link(file, file.name, dst_dir_fd=staged.fd, follow_symlinks=False)
                except OSError:
                    with file.open("rb") as original, staged.file(file.name) as copy:
                        shutil.copyfileobj(original, copy)
            staged.publish()

    def keep_last(self, count: int, *, newest: int | None = None) -> None:
        """Remove all but the newest `count` checkpoints; ``best`` and ``final`` stay.

        Args:
            count: how many stay.
            newest: step of the one just written; what an earlier, longer run left beyond it stays,
                and does not count.
        """
        steps = [step for step in self.checkpoint_steps() if newest is None or step <= newest]
        for step in steps[:-count]:
            path = self.checkpoint(step)
            path.rename(path.with_name(f".{path.name}{_REMOVED}"))  # never there in part
        for path in self.path.glob(f"{CHECKPOINTS}/.checkpoint-*{_REMOVED}"):
            shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        """Let other runs in."""
        with contextlib.suppress(OSError):
            os.close(self._lock)
