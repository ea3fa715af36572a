"""Write metrics to a JSONL file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from npt_fast.checkpoint.training_log import LOG, log_lines
from npt_fast.errors import CheckpointError, TrainingError
from npt_fast.paths import exists


class MetricsLog:
    """The metrics of a run (design.md#metrics).

    Args:
        folder: folder of the run; its ``training_log.jsonl`` gets a line per call of `write`.
        step: optimizer steps taken before the run. Lines of later steps, which an earlier run left,
            are dropped.

    Raises:
        TrainingError: the file is not a log.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.path = folder / LOG
        fresh = self.path.with_name(f".{LOG}.new")  # a run killed here loses no line
        fresh.unlink(missing_ok=True)
        # x: nothing that somebody has put there is written to
        with fresh.open("xb") as file:
            for line in _lines(self.path) if step else ():
                if _step(line) <= step:
                    file.write(line + b"\n")
        fresh.replace(self.path)

    def write(self, step: int, values: Mapping[str, float | str]) -> None:
        """Write a line of metrics; infinite and NaN values become null in the file."""
        line = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        # opened for each line: none waits in a buffer when the run is killed
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **line}, allow_nan=False) + "\n")


def _lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of an earlier log."""
    if not exists(path):
        return
    try:
        yield from (line.rstrip(b"\r\n") for line in log_lines(path))
    except CheckpointError as error:
        raise TrainingError(str(error)) from None


def _step(line: bytes) -> float:
    """Return the step of a line; infinite for half a line, which a killed run leaves."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return math.inf


def for_callbacks(values: Mapping[str, float | str]) -> dict[str, float]:
    """The numbers, with Trainer's prefix ``eval_`` for ``eval/``; trackers turn it back."""
    return {
        name.replace("eval/", "eval_", 1): value
        for name, value in values.items()
        if not isinstance(value, str)
    }
