"""Train NP layers: in this process, or in several."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import nn

from npt_fast.arguments import check_arguments
from npt_fast.config import Progress, TrainOptions
from npt_fast.hf.tokenizer import Tokenizer
from npt_fast.text_sources import TextData
from npt_fast.training.data import sampled_beforehand, with_data
from npt_fast.training.given import Given
from npt_fast.training.launch import launch
from npt_fast.training.run import TrainReport, say, train_here


@check_arguments
def train(
    options: TrainOptions,
    *,
    model: nn.Module | None = None,
    tokenizer: Tokenizer | None = None,
    train_dataset: TextData | None = None,
    eval_dataset: TextData | None = None,
    callbacks: Sequence[Any] = (),
    progress: Progress | None = None,
) -> TrainReport:
    """Train NP layers of a base model, from scratch or from a checkpoint.

    Args:
        options: how to train.
        model: the base model, in place of the one that the options name. It has the trained NP
            layers afterwards. Those of ``options.train_layers`` that it has before go on as they
            are. Files and messages call it by the name in its config.
        tokenizer: the model's tokenizer; given together with it.
        train_dataset: training text, in place of ``options.data``: a ``datasets.Dataset`` or
            ``IterableDataset``, or any iterable that starts anew whenever it is iterated. Its rows
            are texts, lists of token ids or of messages, or mappings with a column of them
            (``options.text_column``). To resume a run, give the same one again.
        eval_dataset: held-out text, likewise, in place of ``options.eval_data``.
        callbacks: callbacks of transformers. Metrics have the names of the log, with ``eval_`` for
            ``eval/``. They may ask to evaluate, to save and to stop.
        progress: called while a text is sampled from the base model, with the name of the work,
            tokens done and all tokens.

    Raises:
        TrainingError: training cannot start as asked, or had to stop; the last good checkpoint
            stays.
        CheckpointError: the checkpoint to resume from cannot be read.
        DataError: the text cannot be read, sampled or kept, or there is too little of it, or an
            object is no data set, or it lacks the column.
        ModelError: the base model cannot be loaded or converted, or does not fit the checkpoint; or
            the tokenizer has no chat template for chats.
        OptionError: an argument is of another type, or the model lacks one of the layers.
        StorageError: the disk is full.
    """
    given = Given(model, tokenizer, train_dataset, eval_dataset, callbacks)
    given.check(options)
    options = given.named(options)
    in_group = "LOCAL_RANK" in os.environ  # torchrun sets it
    apart = in_group or (options.num_processes > 1 and options.parallel != "layers")
    if apart and model is None:
        options = sampled_beforehand(options, progress, say)
    elif options.num_processes > 1 and not options.resume_from:
        # the processes could find different defaults, and each would say so
        options = with_data(options, None, say)
    if options.num_processes > 1 and not in_group:
        return launch(options)
    return train_here(options, given, progress)
