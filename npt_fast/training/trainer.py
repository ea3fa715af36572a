"""A `transformers.Trainer` for NP layers, which also takes any data set, collator and callback."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from npt_fast.arguments import check_constructor
from npt_fast.config import CURRICULUM, TrainOptions
from npt_fast.errors import DataError, TrainingError
from npt_fast.hf.checkpoint import load, save
from npt_fast.hf.convert import components, trainable_parameters
from npt_fast.modules import NPComponent
from npt_fast.training.clipping import clip_each
from npt_fast.training.curriculum import Stage, parse_curriculum, stage_index
from npt_fast.training.distillation import Distillation, Losses
from npt_fast.training.evaluation import evaluate_batches
from npt_fast.training.fitted_start import TOKENS
from npt_fast.training.optimizer import RelativeAdamW

_OF_LOGITS = ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics")
_OF_ITS_LOSS = ("activation_checkpointing", "gradient_checkpointing", "label_smoothing_factor")
"""Arguments of Trainer and of TrainingArguments that mean its own loss and forward pass."""


@check_constructor
class NPTTrainer(Trainer):
    """A ``transformers.Trainer`` that trains the NP layers of a model.

    It computes the losses of a `Distillation`, clips the gradients of each layer by themselves, and
    optimises with `RelativeAdamW`. A checkpoint holds the NP layers alone, which `npt_fast.load`
    reads, beside Trainer's own files to resume from. An evaluation compares the model with its base
    model: ``eval_kl`` in nats, ``eval_perplexity``, ``eval_base_perplexity``,
    ``eval_perplexity_ratio``, ``eval_top1_agreement`` and ``eval_loss``. All else is Trainer's:
    arguments, data sets, collators, callbacks, trackers.

    Args:
        model: model with NP layers that require gradients, which gets the losses of the defaults
            of `TrainOptions`; or a `Distillation` of one.
        args: Trainer's arguments.
        curriculum_stages: inputs of the trained layers, as for `TrainOptions`.
        options: other arguments of Trainer, such as ``train_dataset``, ``eval_dataset``,
            ``data_collator`` and ``callbacks``. Rows need ``input_ids``, and may have
            ``attention_mask`` and ``labels``.

    Raises:
        ModelError: no NP layer of the model requires gradients.
        TrainingError: an argument of Trainer would have no effect.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments | None = None,
        *,
        curriculum_stages: str = CURRICULUM,
        **options: Any,
    ) -> None:
        ignored = [name for name in _OF_LOGITS if options.get(name) is not None]
        ignored += [name for name in _OF_ITS_LOSS if getattr(args, name, None)]
        if ignored:
            raise TrainingError(
                f"{ignored[0]}: NPTTrainer has losses and metrics of its own, and keeps the "
                "activations of NP layers alone; leave it out"
            )
        if not isinstance(model, Distillation):
            # the layers that are trained are the model's, whatever the options name
            model = Distillation.of(model, TrainOptions(train_layers="all"))
        self.distillation = model
        trainable_parameters(model.model)  # to refuse a model without
        self.stages = parse_curriculum(curriculum_stages)
        use_cache = getattr(model.config, "use_cache", True)
        super().__init__(model, args, **options)
        model.config.use_cache = use_cache  # Trainer turns it off, but the base model is run apart

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as Trainer does; the first rows calibrate and fit a `Distillation` that is not.

        Raises:
            TrainingError: there is no data set.
            DataError: the data set is empty.
        """
        if not self.distillation.calibrated:
            if self.train_dataset is None:
                raise TrainingError("there is nothing to train on; give train_dataset")
            batches, tokens = [], 0
            for batch in self.get_eval_dataloader(self.train_dataset):
                batches.append(batch)
                tokens += batch["input_ids"].numel()
                if tokens >= TOKENS:
                    break
            if not batches:
                raise DataError("there is nothing to train on: the data set is empty")
            self.distillation.fit(batches)
        return super().train(*args, **kwargs)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create the optimizer of all NP parameters."""
        if self.optimizer is None:
            self.optimizer = RelativeAdamW(
                self.distillation.model,
                self.args.learning_rate,
                weight_decay=self.args.weight_decay,
            )
        return self.optimizer

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the mean loss over all tokens of the optimizer step, in all processes."""
        losses = self._losses(model, inputs)
        if num_items_in_batch is None:  # rows without labels
            loss = losses.loss
        else:
            # DDP and FSDP average over processes, but each process has only part of the tokens
            loss = losses.total * self.accelerator.num_processes / num_items_in_batch
        return (loss, {"loss": loss}) if return_outputs else loss

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Compare the model, in student mode, with its base model on a data set.

        Raises:
            DataError: the data set is empty.
        """
        figures = evaluate_batches(
            self.model_wrapped if self.is_fsdp_enabled else self.distillation,
            dataloader,
            device=self.accelerator.device,
            sum_over_processes=lambda sums: self.accelerator.reduce(sums, "sum"),
        )
        metrics = {
            f"{metric_key_prefix}_{name}": value for name, value in figures.numbers().items()
        }
        return EvalLoopOutput(np.empty(0), None, metrics, self.num_examples(dataloader))

    def _losses(self, model: Any, inputs: Mapping[str, Any]) -> Losses:
        losses: Losses = model(**inputs, stage=self._current_stage(self.state.global_step))
        return losses

    def _components(self) -> dict[int, NPComponent]:
        return components(self.distillation.model)

    def _current_stage(self, step: int) -> Stage:
        return self.stages[stage_index(self.stages, step)]

    def _clip_grad_norm(self, model: Any) -> Tensor:
        self.accelerator.unscale_gradients()
        return clip_each(self._components().values(), self.args.max_grad_norm)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the NP layers alone, where Trainer would write the whole model.

        Raises:
            TrainingError: FSDP has shared them out.
        """
        if self.is_fsdp_enabled:
            raise TrainingError(
                "NPTTrainer does not save layers that FSDP has shared out; npt.train does, with "
                "parallel='fsdp2'"
            )
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".npt-fast-", dir=folder) as temporary:
            for file in save(self.distillation.model, Path(temporary, "layers")).iterdir():
                os.replace(file, folder / file.name)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load(self.distillation.model, resume_from_checkpoint, probe=False, trainable=True)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)
