"""The names of a training run's checkpoints: ``<run>/checkpoints/checkpoint-N``, N the step."""

from __future__ import annotations

import os
import re
from pathlib import Path

from npt_fast.errors import CheckpointError
from npt_fast.paths import is_directory, path_errors

CHECKPOINTS = "checkpoints"
BEST = "best"
FINAL = "final"
_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """The folders ``checkpoint-N`` in `folder` by step, ascending; empty if there is no folder.

    Raises:
        CheckpointError: the folder cannot be listed.
    """
    with path_errors(folder, CheckpointError):
        found = {
            int(name[1]): folder / entry
            for entry in (os.listdir(folder) if is_directory(folder) else ())
            if (name := _NAME.fullmatch(entry)) and is_directory(folder / entry)
        }
    return dict(sorted(found.items()))
