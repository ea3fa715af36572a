"""The NP layers of a run: which are added, and how fresh ones start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from npt_fast.checkpoint.checkpoint import Checkpoint
from npt_fast.config import NPTConfig, TrainOptions
from npt_fast.errors import TrainingError
from npt_fast.hf.checkpoint import load
from npt_fast.hf.convert import components, convert, decoder_layers
from npt_fast.hf.wrappers import unwrapped
from npt_fast.layer_names import resolve_layers
from npt_fast.modules import NPComponent
from npt_fast.training.data import Say, beginning
from npt_fast.training.distillation import Distillation
from npt_fast.training.evaluation import collate
from npt_fast.training.fitted_start import TOKENS, can_be_fitted
from npt_fast.training.mixed_windows import MixedWindows
from npt_fast.training.token_windows import TokenWindows


def add_layers(
    model: Any, options: TrainOptions, checkpoint: Checkpoint | None, say: Say
) -> tuple[list[int], list[int]]:
    """Add the NP layers of a run: those in the checkpoint as they are there, the others fresh.

    Args:
        model: the base model, maybe with NP layers, which stay as they are.
        options: options of the run.
        checkpoint: what the run resumes from, if it does.
        say: called with notes.

    Returns:
        The layers, and those of them that are fresh; both ascending.

    Raises:
        TrainingError: the layers are not those of the model or of the checkpoint.
    """
    layers = sorted(resolve_layers(options.train_layers, len(decoder_layers(model))))
    present = components(model)
    _check_present(present, layers)
    known = [layer for layer in layers if checkpoint and layer in checkpoint.modules]
    if checkpoint is not None:
        for line in (*checkpoint.notes, *checkpoint.unread.values()):
            say(f"Note: {line}")
        if not known:
            raise TrainingError(
                f"{checkpoint.given}: has layers {list(checkpoint.modules)}, none of "
                f"--train_layers {layers}; leave out --resume_from"
            )
        name = checkpoint.model_name
        if name is not None and name != options.base_name:
            say(f"Note: {checkpoint.given} was trained on {name}, this is {options.base_name}")
        load(model, checkpoint, layers=known, residual=options.residual, trainable=True)
        left = [layer for layer in checkpoint.modules if layer not in layers]
        if left:
            say(
                f"Note: layers {left} of {checkpoint.given} are not trained and will not be in the "
                "new checkpoints; merge them in afterwards"
            )
    fresh = [layer for layer in layers if layer not in known and layer not in present]
    for layer in fresh:
        # a seed per layer: a layer starts the same whichever layers are trained beside it
        with torch.random.fork_rng(devices=[]):
            # more than any model has layers: no two seeds share a layer's start
            torch.manual_seed(options.seed * 1_000_003 + layer)
            convert(model, _npt_config(options, layer))
    return layers, fresh


def start(
    distillation: Distillation,
    fresh: Sequence[int],
    options: TrainOptions,
    text: Tensor,
    windows: TokenWindows | MixedWindows,
    say: Say,
    *,
    sharded: bool,
) -> None:
    """Calibrate a training step, and start its fresh layers as `init_strategy` says.

    Args:
        distillation: the training step.
        fresh: fresh layers.
        options: options of the run.
        text: held-out text, ``(B, S)``.
        windows: the training text. If all layers are fresh, it is set behind the windows that they
            are fitted to.
        say: called with notes.
        sharded: whether the model is going to be sharded. It is on the CPU then, and may not fit on
            one device.

    Raises:
        ModelError: as `Distillation.calibrate`.
        TrainingError: as `Distillation.fit`.
    """
    scaled = options.init_strategy in ("fitted", "zero")
    distillation.calibrate(text, fresh if scaled else [])
    if options.init_strategy != "fitted" or not fresh:
        return
    rows, size = beginning(windows, TOKENS), options.batch_size
    layers = decoder_layers(distillation.model)
    fitted = [n for n in fresh if not sharded and can_be_fitted(unwrapped(layers[n]))]
    if fitted:
        batches = [collate(rows[n : n + size]) for n in range(0, len(rows), size)]
        distillation.fit(batches, fitted)
    if len(fresh) == len(components(distillation.model)):  # what others read must not depend on it
        windows.skip(len(rows))  # fitted layers have two thirds of the error on them
    if left := [layer for layer in fresh if layer not in fitted]:
        say(f"Note: layers {left} start at the base MLP, as with --init_strategy zero")


def _check_present(present: Mapping[int, NPComponent], layers: Sequence[int]) -> None:
    """Check that the NP layers that a given model has already can be trained as they are."""
    others = [layer for layer in present if layer not in layers]
    if others:
        raise TrainingError(
            f"the model has NP layers {others}, which are not among train_layers {list(layers)}; "
            "name them too, or npt.unload the model"
        )
    frozen = [
        n for n, part in present.items() if not all(p.requires_grad for p in part.parameters())
    ]
    if frozen:
        raise TrainingError(
            f"NP layers {frozen} of the model have parameters that require no gradients; npt.load "
            "them with trainable=True"
        )


def _npt_config(options: TrainOptions, layer: int) -> NPTConfig:
    return NPTConfig(
        layers=[layer],
        rank=options.np_rank,
        num_ranks=options.num_ranks,
        modulation=options.modulation,
        residual=options.residual or "removed",
        init="zero" if options.init_strategy == "fitted" else options.init_strategy,
        init_scale=options.np_init_scale,
    )
