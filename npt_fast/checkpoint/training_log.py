"""The metrics of a training run, as its ``training_log.jsonl`` keeps them (design.md#metrics)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from npt_fast.checkpoint.source_file import SourceFile
from npt_fast.checkpoint.strict_json import parse_object
from npt_fast.errors import CheckpointError
from npt_fast.paths import exists, is_directory, path_errors, user_path
from npt_fast.schema import is_count, is_number, is_text

LOG = "training_log.jsonl"
_STAGE = "curriculum/stage"
_LONGEST_LINE = 1 << 20  # bytes; a line of ours has a number per layer and metric
_LARGEST = 1 << 30  # bytes; 128 layers and 100,000 steps take 400 MB
_MOST_STAGES = 1000
_LAYER = re.compile(r"mlp_direct_loss/layer_(0|[1-9][0-9]{0,2})")


@dataclass(frozen=True, slots=True)
class RunLog:
    """The metrics of a run.

    Attributes:
        path: path of the run as it was given.
        metrics: optimizer steps and values of each metric, by its name; values that were not
            finite are left out.
        stages: each stage of the curriculum in turn: its name, and the first and the last step
            that the log has of it.
    """

    path: Path
    metrics: dict[str, tuple[list[int], list[float]]] = field(default_factory=dict)
    stages: list[tuple[str, int, int]] = field(default_factory=list)

    @property
    def layers(self) -> list[int]:
        """The trained layers, ascending."""
        return sorted(int(found[1]) for found in map(_LAYER.fullmatch, self.metrics) if found)

    def values(self, metric: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric; both are empty if the run did not measure it."""
        return self.metrics.get(metric, ([], []))


def read_log(given: str | Path) -> RunLog:
    """Read the log of a run.

    Args:
        given: folder of the run, or its log.

    Raises:
        CheckpointError: there is no log, a line is not one of a log, or no line is there.
    """
    run = user_path(given)
    with path_errors(run, CheckpointError):
        path = run / LOG if is_directory(run) else run
        if not exists(path):
            what = f"has no {LOG}; name the folder of a run" if path != run else "does not exist"
            raise CheckpointError(f"{run}: {what}")
    found = RunLog(run)
    for number, line in enumerate(log_lines(path), 1):
        if line.endswith(b"\n"):  # a killed run leaves half a line at the end
            _add(found, line, f"{path}: line {number}")
    if not found.metrics:
        raise CheckpointError(f"{path}: has no metrics yet; the run has not logged a step")
    return found


def _add(log: RunLog, line: bytes, where: str) -> None:
    row = parse_object(line, where)
    step = row.pop("step", None)
    if not is_count(step):
        raise CheckpointError(f"{where}: has no step, so this is not the log of a run")
    stage = row.pop(_STAGE, None)
    if is_text(stage):
        if log.stages and log.stages[-1][0] == stage:
            log.stages[-1] = (stage, log.stages[-1][1], step)
        else:
            log.stages.append((stage, step, step))
        if len(log.stages) > _MOST_STAGES:
            raise CheckpointError(f"{where}: the stage changes more than {_MOST_STAGES:,} times")
    for name, value in row.items():
        if is_number(value):
            steps, values = log.metrics.setdefault(name, ([], []))
            steps.append(step)
            values.append(float(value))
        elif not (value is None or is_text(value)):
            raise CheckpointError(f"{where}: {name!r:.80} must be a number, a text or null")


def log_lines(path: Path) -> Iterator[bytes]:
    """The lines of a log, each with its line break if it has one.

    Raises:
        CheckpointError: the file cannot be read, or is too large or too wide for a log.
    """
    file = SourceFile.of(path, follow_links=True)
    if file.size > _LARGEST:
        raise CheckpointError(f"{path}: {file.size:,} bytes; more than {_LARGEST:,} are refused")
    with file.open() as fd, open(fd, "rb", closefd=False) as lines:
        while line := lines.readline(_LONGEST_LINE):
            if len(line) == _LONGEST_LINE:
                raise CheckpointError(
                    f"{path}: has a line of {_LONGEST_LINE:,} bytes or more, so it is not the "
                    "log of a run; move it away"
                )
            yield line
