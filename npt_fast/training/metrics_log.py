"""Write metrics to a JSONL file, and to a tracker if the options name one."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from npt_fast.checkpoint.training_log import LOG, log_lines
from npt_fast.config import TrainOptions
from npt_fast.errors import CheckpointError, TrainingError
from npt_fast.paths import exists


class MetricsLog:
    """The metrics of a run (design.md#metrics).

    Args:
        folder: folder of the run; its ``training_log.jsonl`` gets a line per call of `write`.
        options: name the tracker and the run.
        step: optimizer steps taken before the run. Lines of later steps, which an earlier run left,
            are dropped.
        config: the run's configuration, which trackers show.

    Raises:
        TrainingError: the tracker is not installed or does not start, or the file is not a log.
    """

    def __init__(
        self, folder: Path, options: TrainOptions, step: int, config: Mapping[str, Any]
    ) -> None:
        self.path = folder / LOG
        self._tracker = _start(options, folder, config)
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
        if self._tracker is not None:
            numbers = {n: v for n, v in values.items() if not isinstance(v, str)}
            self._tracker.log(numbers, step=step)

    def close(self) -> None:
        """Finish the run in the tracker."""
        if self._tracker is not None:
            with redirect_stdout(sys.stderr):
                self._tracker.finish()


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


def _name(options: TrainOptions) -> str:
    """Return the tracker to use: a wandb mode other than ``disabled`` implies wandb."""
    if options.wandb_mode == "disabled":
        return "none" if options.track == "wandb" else options.track
    return "wandb" if options.wandb_mode else options.track


def _start(options: TrainOptions, folder: Path, config: Mapping[str, Any]) -> Any:
    name = _name(options)
    if name == "none":
        return None
    if importlib.util.find_spec(name) is None:
        raise TrainingError(f"track {name}: not installed; pip install {name}")
    from accelerate import tracking  # type: ignore[import-untyped]

    run = options.wandb_name or folder.name
    try:
        if name == "tensorboard":
            tracker = tracking.TensorBoardTracker(run, logging_dir=folder / "tensorboard")
        elif name == "trackio":
            os.environ.setdefault("TRACKIO_DIR", str((folder / "trackio").resolve()))
            tracker = tracking.TrackioTracker(options.wandb_project, name=run)
        else:
            if options.wandb_mode == "offline":  # otherwise wandb sends its own errors all the same
                os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
            tracker = tracking.WandBTracker(
                options.wandb_project,
                name=run,
                tags=list(options.wandb_tags),
                mode=options.wandb_mode,
                dir=str(folder),
            )
        with redirect_stdout(sys.stderr):  # trackers print; stdout is for the report
            tracker.start()
            # not every tracker accepts lists
            plain = {n: str(v) if isinstance(v, list) else v for n, v in config.items()}
            tracker.store_init_configuration(plain)
        if name == "trackio":  # accelerate's `finish` makes trackio finish again at exit, and print
            tracker.finish = importlib.import_module("trackio").finish
    except Exception as error:  # a tracker fails in its own ways: no key, no network, ...
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TrainingError(
            f"track {name}: does not start: {reason}; {LOG} has the metrics without it too"
        ) from error
    return tracker
