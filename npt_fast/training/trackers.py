"""Trackers of a run: Trainer's own integrations, which read their settings in the environment."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path

from transformers import Trainer
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from npt_fast.checkpoint.training_log import LOG
from npt_fast.config import Tracker, TrainOptions
from npt_fast.errors import TrainingError


def tracker_of(options: TrainOptions) -> Tracker:
    """The tracker to use: a wandb mode other than ``disabled`` implies wandb.

    Raises:
        TrainingError: it is not installed.
    """
    name: Tracker = options.track
    if options.wandb_mode == "disabled":
        name = "none" if name == "wandb" else name
    elif options.wandb_mode:
        name = "wandb"
    if name != "none" and importlib.util.find_spec(name) is None:
        raise TrainingError(f"track {name}: not installed; pip install {name}")
    return name


@contextmanager
def tracked(options: TrainOptions, folder: Path) -> Iterator[None]:
    """A block in which Trainer's integration finds a run's settings; it ends the tracker's run.

    Args:
        options: name the tracker and the run.
        folder: folder of the run.

    Raises:
        TrainingError: the tracker is not installed.
    """
    name = tracker_of(options)
    if name == "none":
        yield
        return
    run = options.wandb_name or folder.name
    variables = {
        "TENSORBOARD_LOGGING_DIR": str(folder / "tensorboard" / run),
        "TRACKIO_DIR": os.environ.get("TRACKIO_DIR", str((folder / "trackio").resolve())),
        "WANDB_DIR": str(folder),
        "WANDB_PROJECT": options.wandb_project,
    }
    if options.wandb_tags:
        variables["WANDB_TAGS"] = ",".join(options.wandb_tags)
    if options.wandb_mode is not None:
        variables["WANDB_MODE"] = options.wandb_mode
    if options.wandb_mode == "offline":  # otherwise wandb sends its own errors all the same
        variables["WANDB_ERROR_REPORTING"] = os.environ.get("WANDB_ERROR_REPORTING", "false")
    # trackers print; stdout is for the report
    with _environment(variables), redirect_stdout(sys.stderr):
        try:
            yield
        finally:
            library = sys.modules.get(name)
            if library is not None and hasattr(library, "finish"):
                with suppress(Exception):  # it was finished already
                    library.finish()


def start_tracker(trainer: Trainer, name: str) -> None:
    """Start a tracker of a Trainer now, which it would do when training begins.

    Raises:
        TrainingError: it does not start.
    """
    for kind in get_reporting_integration_callbacks(name):  # type: ignore[no-untyped-call]
        for callback in trainer.callback_handler.callbacks:
            if not isinstance(callback, kind):
                continue
            try:
                callback.on_train_begin(
                    trainer.args, trainer.state, trainer.control, model=trainer.model
                )
            except Exception as error:  # a tracker fails in its own ways: no key, no network, ...
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise TrainingError(
                    f"track {name}: does not start: {reason}; {LOG} has the metrics without it too"
                ) from error


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
