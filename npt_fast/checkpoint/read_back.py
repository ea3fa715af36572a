"""Open what was written as everybody will, before it gets its name."""

from __future__ import annotations

from collections import deque
from pathlib import Path

from npt_fast.checkpoint.checkpoint import open_checkpoint
from npt_fast.checkpoint.training_state import (
    MULTI_LAYER_STATE,
    TRAINING_STATE,
    read_multi_layer_state,
    read_training_state,
)
from npt_fast.errors import CheckpointError


def read_back(directory: Path, target: Path) -> None:
    """Read every file of a checkpoint, except for the tensors' data.

    Args:
        directory: where it is now.
        target: where it is to be, for messages.

    Raises:
        CheckpointError: one of them could not be read again.
    """
    try:
        checkpoint = open_checkpoint(directory)
        read_training_state(directory / TRAINING_STATE, checkpoint.modules)
        read_multi_layer_state(directory / MULTI_LAYER_STATE)
        deque(checkpoint.digests(), maxlen=0)
        for line in checkpoint.unread.values():
            raise CheckpointError(line)
    except CheckpointError as error:
        problem = str(error).replace(str(directory), str(target))
        raise CheckpointError(f"{problem}; nothing was written, since it cannot be read") from None
