"""Train NP layers: in this process, or in several."""

from __future__ import annotations

import os

from npt_fast.config import Progress, TrainOptions
from npt_fast.training.data import sampled_beforehand, with_data
from npt_fast.training.launch import launch
from npt_fast.training.run import TrainReport, say, train_here


def train(options: TrainOptions, *, progress: Progress | None = None) -> TrainReport:
    """Train NP layers of a base model, from scratch or from a checkpoint.

    Args:
        options: how to train.
        progress: called while a text is sampled from the base model, with the name of the work,
            tokens done and all tokens.

    Raises:
        TrainingError: training cannot start as asked, or had to stop; the last good checkpoint
            stays.
        CheckpointError: the checkpoint to resume from cannot be read.
        DataError: the text cannot be read, sampled or kept, or there is too little of it.
        ModelError: the base model cannot be loaded or converted, or does not fit the checkpoint.
        StorageError: the disk is full.
    """
    in_group = "LOCAL_RANK" in os.environ  # torchrun sets it
    if in_group or (options.num_processes > 1 and options.parallel != "layers"):
        options = sampled_beforehand(options, progress, say)
    elif options.num_processes > 1 and not options.resume_from:
        # the processes could find different defaults, and each would say so
        options = with_data(options, None, say)
    if options.num_processes > 1 and not in_group:
        return launch(options)
    return train_here(options, progress)
