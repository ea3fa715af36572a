"""Write the checkpoints of a run: what each file holds, and which checkpoints stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from npt_fast.checkpoint import strict_json
from npt_fast.checkpoint.certificate import Certificate
from npt_fast.checkpoint.checkpoint import Checkpoint
from npt_fast.checkpoint.npt_config import NPT_CONFIG
from npt_fast.checkpoint.own_files import CONFIG
from npt_fast.checkpoint.publish import StagedDirectory, disk_errors
from npt_fast.checkpoint.read_back import read_back
from npt_fast.checkpoint.training_run import BEST
from npt_fast.checkpoint.training_state import MULTI_LAYER_STATE, TRAINING_STATE
from npt_fast.config import FileFormat, TrainOptions
from npt_fast.errors import TrainingError
from npt_fast.hf.convert import components
from npt_fast.hf.description import describe
from npt_fast.hf.weights_file import save_pt, write_weights
from npt_fast.training.curriculum import Stage, stage_index
from npt_fast.training.distillation import Distillation
from npt_fast.training.progress import Progress
from npt_fast.training.run_directory import RunDirectory
from npt_fast.training.state import gather_optimizer, gather_schedule, gather_weights


class CheckpointWriter:
    """Writes ``checkpoint-N`` and ``best`` of a run.

    Args:
        run: folder of the run; None in all processes but the main one, which alone writes.
        distillation: holds the model being trained.
        options: options of the run.
        stages: the curriculum.
        resumed: checkpoint that the run was resumed from.
        first_step: optimizer steps taken before the run.
        say: prints a line on stderr.
    """

    def __init__(
        self,
        run: RunDirectory | None,
        distillation: Distillation,
        options: TrainOptions,
        *,
        stages: Sequence[Stage],
        resumed: Checkpoint | None,
        first_step: int,
        say: Callable[[str], None],
    ) -> None:
        self.run = run
        self.distillation = distillation
        self.options = options
        self.stages = stages
        self.resumed = resumed
        self.first_step = first_step
        self.say = say

    def last_good(self) -> str:
        """Say which checkpoint is the last good one."""
        steps = list(self.run.checkpoint_steps()) if self.run else []
        if not steps or self.run is None:
            return "no checkpoint had been saved"
        return f"the last good checkpoint is {self.run.checkpoint(steps[-1])}"

    def write(
        self,
        step: int,
        optimizer: torch.optim.Optimizer,
        schedule: Any,
        progress: Progress,
        *,
        direct: Mapping[int, float] | None,
        certificate: Certificate | None,
        numbered: bool,
        best: bool,
    ) -> None:
        """Write a checkpoint; under FSDP every process must call it.

        Args:
            step: optimizer steps taken.
            optimizer: AdamW over the NP layers.
            schedule: learning-rate schedule.
            progress: how far the run has come.
            direct: direct loss of each layer on the held-out text, None before an evaluation.
            certificate: what that evaluation measured, None before one.
            numbered: whether to write ``checkpoint-N``.
            best: whether to name it ``best``.

        Raises:
            TrainingError: a weight is not finite, or the checkpoint cannot be written.
            StorageError: the disk is full.
        """
        np_components = components(self.distillation.model)
        weights, optimizer_state = (
            gather_weights(np_components),
            gather_optimizer(optimizer, np_components),
        )
        # only here: under FSDP every process takes part in gathering
        if self.run is None:
            return
        bad = [name for name, tensor in weights.items() if not bool(tensor.isfinite().all())]
        if bad:
            raise TrainingError(f"{bad[0]} is not finite at step {step}; {self.last_good()}")
        options = self.options
        target = self.run.checkpoint(step if numbered else BEST)
        write_checkpoint(
            target,
            weights=weights,
            format=options.format,
            training_state={
                "global_step": step,
                "batch_count": progress.micro_batches,
                "optimizer_state_dict": optimizer_state,
                "scheduler_state_dict": gather_schedule(schedule) if schedule else None,
                "scaler_state_dict": progress.scaler,
                "best_val_loss": progress.best_kl,
                "data_state": progress.data,
            },
            multi_layer_state=self._multi_layer_state(step, list(np_components)),
            config={
                "model_name": options.base_name,
                "batch_size": options.batch_size,
                "learning_rate": options.learning_rate,
                "max_steps": options.max_steps,
                "gradient_accumulation_steps": options.gradient_accumulation_steps,
                "mixed_precision": options.mixed_precision or options.fp16,
                "gradient_clip_value": options.gradient_clip,
                "data": options.data,
                "max_length": options.max_length,
                "loss": options.loss,
                "seed": options.seed,
            },
            npt_config=describe(
                self.distillation.model,
                np_components,
                base_name=options.base_name,
                steps={layer: self._layer_steps(layer, step) for layer in np_components},
                fidelity=direct,
                certificate=certificate,
            ),
        )
        if numbered and best:
            self.run.link(step, BEST)
        if numbered and options.keep_last is not None:
            self.run.keep_last(options.keep_last, newest=step)
        self.say(f"Saved {target}" + (", the best so far" if best else ""))

    def _layer_steps(self, layer: int, step: int) -> int:
        """Return the optimizer steps that a layer was trained for, including earlier runs."""
        own = step - self.first_step
        if self.resumed is None or layer not in self.resumed.modules:
            return own
        return own + (self.resumed.record(layer).step or self.first_step)

    def _multi_layer_state(self, step: int, layers: list[int]) -> dict[str, Any]:
        cache = self.distillation.cache
        return {
            "layers_to_train": layers,
            "curriculum_schedule": [
                {
                    "name": stage.name,
                    "until_step": stage.until_step,
                    "mixing_ratio": stage.attention_ratio,
                    "mlp_mixing_ratio": stage.mlp_ratio,
                }
                for stage in self.stages
            ],
            "current_stage_index": stage_index(self.stages, step),
            "layer_weights": dict(self.distillation.layer_weights),
            "teacher_cache_hits": cache.hits,
            "teacher_cache_misses": cache.misses,
        }


def write_checkpoint(
    target: Path,
    *,
    weights: Mapping[str, Tensor],
    format: FileFormat,
    training_state: Mapping[str, Any],
    multi_layer_state: Mapping[str, Any],
    config: Mapping[str, Any],
    npt_config: Mapping[str, Any],
) -> None:
    """Write a checkpoint (design.md#checkpoint-files), complete or not at all.

    Raises:
        CheckpointError: the checkpoint could not be read back.
        StorageError: the disk is full.
        TrainingError: the checkpoint cannot be written.
    """
    with disk_errors(target, TrainingError), StagedDirectory(target, replace=True) as staged:
        write_weights(staged, weights, format)
        for name, state in (
            (TRAINING_STATE, training_state),
            (MULTI_LAYER_STATE, multi_layer_state),
        ):
            with staged.file(name) as file:
                save_pt(dict(state), file)
        for name, content in ((CONFIG, config), (NPT_CONFIG, npt_config)):
            with staged.file(name) as file:
                file.write(strict_json.dump(dict(content)))
        read_back(staged.path, target)
        staged.publish()
