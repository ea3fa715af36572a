"""Train NP layers: in this process, or in several."""

from __future__ import annotations

import os

from npt_fast.config import TrainOptions
from npt_fast.training.launch import launch
from npt_fast.training.run import TrainReport, train_here


def train(options: TrainOptions) -> TrainReport:
    """Train NP layers of a base model, from scratch or from a checkpoint.

    Raises:
        TrainingError: training cannot start as asked, or had to stop; the last good checkpoint
            stays.
        CheckpointError: the checkpoint to resume from cannot be read.
        DataError: the text cannot be read, or there is too little of it.
        ModelError: the base model cannot be loaded or converted, or does not fit the checkpoint.
        StorageError: the disk is full.
    """
    if options.num_processes > 1 and "LOCAL_RANK" not in os.environ:  # torchrun sets it
        return launch(options)
    return train_here(options)
