"""Read a written checkpoint back with the ordinary readers, before it is published."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from npt_fast.checkpoint import strict_json
from npt_fast.checkpoint.checkpoint import Checkpoint, open_checkpoint
from npt_fast.checkpoint.digests import read_digests
from npt_fast.checkpoint.merge_summary import MERGE_SUMMARY, MergeSummary
from npt_fast.checkpoint.training_state import (
    MULTI_LAYER_STATE,
    TRAINING_STATE,
    read_multi_layer_state,
    read_training_state,
)
from npt_fast.errors import CheckpointError


def read_back(directory: Path, target: Path) -> Checkpoint:
    """Read every file of a checkpoint, without the data of its tensors.

    Args:
        directory: directory that holds the checkpoint now.
        target: path that it will get, for messages.

    Raises:
        CheckpointError: a file cannot be read.
    """
    with _named(directory, target):
        checkpoint = open_checkpoint(directory)
        for line in checkpoint.unread.values():
            raise CheckpointError(line)
        read_training_state(directory / TRAINING_STATE, checkpoint.modules)
        read_multi_layer_state(directory / MULTI_LAYER_STATE)
    return checkpoint


def read_back_records(directory: Path, target: Path) -> None:
    """Read the files that a merge writes last, its summary and digests; like `read_back`."""
    with _named(directory, target):
        path = directory / MERGE_SUMMARY
        MergeSummary.parse(strict_json.read_foreign(path), str(path))
        deque(read_digests(directory), maxlen=0)


@contextmanager
def _named(directory: Path, target: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        problem = str(error).replace(str(directory), str(target))
        raise CheckpointError(f"{problem}; nothing was written, since it cannot be read") from None
