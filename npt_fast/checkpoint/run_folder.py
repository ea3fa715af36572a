"""The checkpoints in the folder of a training run."""

from __future__ import annotations

import re
from pathlib import Path

_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")


def checkpoints(run: Path) -> dict[int, Path]:
    """``checkpoints/checkpoint-N`` of a run by step, ascending."""
    return _by_step(run / "checkpoints")


def any_checkpoints(folder: Path) -> dict[int, Path]:
    """The same, or ``checkpoint-N`` in the folder itself, where the guide has them."""
    return checkpoints(folder) or _by_step(folder)


def _by_step(folder: Path) -> dict[int, Path]:
    found = {
        int(name[1]): path
        for path in folder.glob("checkpoint-*")
        if (name := _NAME.fullmatch(path.name)) and path.is_dir()
    }
    return dict(sorted(found.items()))
