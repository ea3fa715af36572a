"""The training loop: transformers' Trainer around a `Distillation`.

Trainer accumulates and clips gradients, scales, autocasts and distributes. This file decides when
to evaluate, save, sample and stop, and restores a run that is resumed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType  # type: ignore[import-untyped]
from torch import Tensor
from transformers import (
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
)

from npt_fast.checkpoint.certificate import Certificate
from npt_fast.checkpoint.checkpoint import Checkpoint
from npt_fast.checkpoint.publish import disk_errors
from npt_fast.checkpoint.training_state import TrainingState
from npt_fast.config import TrainOptions
from npt_fast.errors import TrainingError
from npt_fast.hf.convert import components
from npt_fast.hf.tokenizer import Reading
from npt_fast.modules import NPComponent
from npt_fast.training.checkpoint_writer import CheckpointWriter
from npt_fast.training.clipping import clip_each
from npt_fast.training.curriculum import Stage, stage_index
from npt_fast.training.distillation import Distillation
from npt_fast.training.evaluation import (
    Evaluation,
    Figures,
    collate,
    evaluate_windows,
)
from npt_fast.training.metrics_log import MetricsLog
from npt_fast.training.mixed_windows import MixedWindows
from npt_fast.training.progress import Progress
from npt_fast.training.run_directory import RunDirectory
from npt_fast.training.samples import samples
from npt_fast.training.state import restore_optimizer
from npt_fast.training.step_metrics import StepMetrics
from npt_fast.training.token_windows import TokenWindows

BETAS = (0.9, 0.95)  # with .999, layer 1 of SmolLM2 answers one outlier with jumps for 1000 steps


class NPTTrainer(Trainer):
    """Trains the NP layers of a model.

    Args:
        distillation: computes the losses of a batch.
        options: options of the run.
        arguments: the same options for Trainer.
        tokenizer: the model's tokenizer.
        stages: the curriculum.
        windows: training text, at the position where the run begins.
        held_out: windows for evaluation.
        texts: windows of texts of other kinds, by name, for evaluation too.
        run: folder of the run, None in all processes but the main one.
        metrics: log of the run, None in all processes but the main one.
        resumed: checkpoint that the run was resumed from.
        training_state: training state of that checkpoint.
        progress: how far the run had come.
        stop_signal: returns the number of a signal that asks to stop, 0 if there is none.
        say: prints a line on stderr.
    """

    def __init__(
        self,
        distillation: Distillation,
        options: TrainOptions,
        arguments: TrainingArguments,
        *,
        tokenizer: Any,
        stages: Sequence[Stage],
        windows: TokenWindows | MixedWindows,
        held_out: Sequence[Mapping[str, Tensor]],
        texts: Mapping[str, Sequence[Mapping[str, Tensor]]],
        run: RunDirectory | None,
        metrics: MetricsLog | None,
        resumed: Checkpoint | None,
        training_state: TrainingState | None,
        progress: Progress,
        stop_signal: Callable[[], int],
        say: Callable[[str], None],
    ) -> None:
        super().__init__(
            distillation,
            arguments,
            data_collator=collate,
            train_dataset=windows,
            callbacks=[_TrainerHooks(self)],
        )
        # they print to stdout, which is for the report
        for printer in ("PrinterCallback", "ProgressCallback"):
            for callback in list(self.callback_handler.callbacks):
                if type(callback).__name__ == printer:
                    self.remove_callback(callback)
        self.distillation = distillation
        self.options = options
        self.tokenizer = tokenizer
        self.stages = stages
        self.windows = windows
        self.held_out = held_out
        self.texts = texts
        self.metrics = metrics
        self.resumed = resumed
        self.training_state = training_state
        self.stop_signal = stop_signal
        self.say = say
        self.first_step = training_state.global_step if training_state else 0
        self.best_kl = progress.best_kl
        self.micro_batches = progress.micro_batches
        self.scaler_state = progress.scaler
        self.evaluation: Evaluation | None = None
        self.certificate: Certificate | None = None
        self.stopped_by = 0
        self._stage = -1
        self._first_window = windows.position
        self._step_metrics = StepMetrics()
        self._writer = CheckpointWriter(
            run,
            distillation,
            options,
            stages=stages,
            resumed=resumed,
            first_step=self.first_step,
            say=say,
        )

    # ---- what Trainer asks for ----

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if self.args.fsdp and state.distributed_type == DistributedType.MULTI_CPU:
            # accelerate supports FSDP on GPUs only; tests use torch's FSDP on CPUs
            from accelerate.utils import FullyShardedDataParallelPlugin

            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            state.distributed_type = DistributedType.FSDP
            self.is_fsdp_enabled = True

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create AdamW with one group over all NP parameters."""
        if self.optimizer is None:
            options = self.options
            parameters = [p for p in self.distillation.parameters() if p.requires_grad]
            self.optimizer = torch.optim.AdamW(
                parameters,
                lr=options.learning_rate,
                betas=BETAS,
                weight_decay=options.weight_decay,
                fused=True,
            )
            for group in self.optimizer.param_groups:
                # a schedule that resumes in the middle needs it
                group["initial_lr"] = options.learning_rate
        return self.optimizer

    def _clip_grad_norm(self, model: Any) -> Tensor:
        self.accelerator.unscale_gradients()
        return clip_each(self._components().values(), self.args.max_grad_norm)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Create the schedule, at the step where the run begins (design.md#curriculum)."""
        if self.lr_scheduler is None:
            optimizer = optimizer or self.optimizer
            warmup = self.args.get_warmup_steps(num_training_steps)
            # torch's schedules take a step when they are made
            last = self.first_step - 1
            self.lr_scheduler = (
                get_cosine_schedule_with_warmup(
                    optimizer, warmup, num_training_steps, last_epoch=last
                )
                if self.options.lr_schedule == "cosine"
                else get_constant_schedule_with_warmup(optimizer, warmup, last)
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the mean loss over all tokens of the optimizer step, in all processes."""
        step = self.state.global_step
        tokens = inputs.pop("labels").ne(-100).sum()
        losses = model(
            **inputs, stage=self._current_stage(step), measure_norms=self._logs_after(step + 1)
        )
        self._step_metrics.add(losses, tokens)
        self.micro_batches += 1
        assert num_items_in_batch is not None
        # DDP and FSDP average over processes, but each process has only part of the tokens
        return losses.total * self.accelerator.num_processes / num_items_in_batch

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write the metrics since the last call (design.md#metrics) and say a summary."""
        if "learning_rate" not in logs:
            return  # Trainer's summary at the end
        self._check_finite()
        step = self.state.global_step
        stage = self._current_stage(step - 1)
        means, tokens, seconds = self._step_metrics.take(
            lambda sums: self.accelerator.reduce(sums, "sum")
        )
        values: dict[str, float | str] = {
            **means,
            "curriculum/stage": stage.name,
            "curriculum/stage_index": self._stage,
            "curriculum/mixing_ratio": stage.attention_ratio,
            "training/learning_rate": logs["learning_rate"],
            "training/grad_norm": logs["grad_norm"],
            "training/tokens_per_second": tokens / seconds,
        }
        self._record(step, values)
        left = (
            (self.options.max_steps - step)
            * seconds
            / max(step - self._last_logged_before(step), 1)
        )
        self.say(
            f"step {step}/{self.options.max_steps}  {stage.name}  loss {means['loss/total']:.4f}  "
            + "".join(
                f"layer {n} {means[f'mlp_direct_loss/layer_{n}']:.4f}  " for n in self._components()
            )
            + f"lr {logs['learning_rate']:.2e}  {tokens / seconds:,.0f} tokens/s  "
            f"{_duration(left)} left"
        )

    # ---- measuring ----

    def _unwrapped_optimizer(self) -> torch.optim.Optimizer:
        """Return AdamW without the wrapper that accelerate puts around it."""
        optimizer: Any = self.optimizer
        found: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        return found

    def _record(self, step: int, values: Mapping[str, float | str]) -> None:
        if self.metrics is not None:
            with disk_errors(self.metrics.path, TrainingError):
                self.metrics.write(step, values)

    def _components(self) -> dict[int, NPComponent]:
        return components(self.distillation.model)

    def _logs_after(self, step: int) -> bool:
        """Whether metrics are logged after this optimizer step."""
        every = self.options.logging_steps
        return step % every == 0 or step in (1, self.first_step + 1, self.options.max_steps)

    def _last_logged_before(self, step: int) -> int:
        return max(
            self.first_step, next((s for s in range(step - 1, 0, -1) if self._logs_after(s)), 0)
        )

    def _current_stage(self, step: int) -> Stage:
        return self.stages[stage_index(self.stages, step)]

    def _check_finite(self) -> None:
        bad = self._step_metrics.not_finite()
        if bad is not None:
            raise TrainingError(
                f"the loss {bad} is not finite at step {self.state.global_step}; "
                f"{self._writer.last_good()}; a lower --learning_rate may help"
            )

    # ---- the run ----

    def begin(self) -> None:
        """Restore the run from the checkpoint, once Trainer has created model and optimizer."""
        self.state.global_step = self._globalstep_last_logged = self.first_step
        if self.training_state is not None and self.resumed is not None:
            fresh = restore_optimizer(
                self._unwrapped_optimizer(), self._components(), self.training_state, self.resumed
            )
            if fresh:
                self.say(f"Optimizer starts fresh for layers {fresh}")
            if self.scaler_state and self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(self.scaler_state)
        self._step_metrics.start_clock()

    def enter_step(self) -> None:
        """Note a change of stage before an optimizer step."""
        step = self.state.global_step
        index = stage_index(self.stages, step)
        if index == self._stage:
            return
        stage = self.stages[index]
        if self._stage >= 0:
            self.say(f"Curriculum stage changed to: {stage.name}")
            changed = {
                "curriculum/stage_transition": 1.0,
                "curriculum/attention_mixing_ratio": stage.attention_ratio,
                "curriculum/mlp_mixing_ratio": stage.mlp_ratio,
            }
            self._record(step, changed)
        self._stage = index

    def leave_step(self, control: Any) -> None:
        """Evaluate, save, sample and stop after an optimizer step, as due."""
        options, step = self.options, self.state.global_step
        if self.accelerator.device.type == "cpu":
            self._check_finite()  # a GPU would have to wait; there, only before logging and saving
        begun = time.monotonic()
        last = step >= options.max_steps
        self.stopped_by = 0 if last else self._agreed_stop()
        evaluates = options.eval_steps and (step % options.eval_steps == 0 or last)
        better = self._evaluate_now() if evaluates else False
        saves = step % options.save_steps == 0 or last or self.stopped_by
        if saves or better:
            self._write(step, numbered=bool(saves), best=better)
        if options.generation_steps and step % options.generation_steps == 0:
            self._sample()
        self._step_metrics.exclude(time.monotonic() - begun)
        if self.stopped_by:
            control.should_training_stop = True

    def _agreed_stop(self) -> int:
        number = self.stop_signal()
        if self.accelerator.num_processes == 1:
            return number
        flag = torch.tensor(number, device=self.accelerator.device)
        # a signal may reach one process only; the others would wait for it in their next all-reduce
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return int(flag)

    def _evaluate_now(self) -> bool:
        """Evaluate on all held-out texts; return whether the KL on the windows of the training
        text is the lowest so far."""
        self._check_finite()
        options, step = self.options, self.state.global_step
        found = Evaluation.of(
            self._measure(self.held_out),
            {name: self._measure(windows) for name, windows in self.texts.items()},
        )
        self.evaluation = found
        self.certificate = found.certificate(options.eval_data or options.data, step)
        self._record(step, found.metrics())
        self.say(
            f"step {step}  evaluation  perplexity {found.perplexity:.3f} (base model "
            f"{found.base_perplexity:.3f})  KL {found.kl:.4f}  top-1 {found.top1_agreement:.4f}"
            + "".join(f"  {name} KL {text.kl:.4f}" for name, text in found.texts.items())
        )
        better = self.best_kl is None or found.kl < self.best_kl
        if better:
            self.best_kl = found.kl
        return better

    def _measure(self, windows: Sequence[Mapping[str, Tensor]]) -> Figures:
        """Evaluate on the windows of one text, in all processes."""
        processes = self.accelerator.num_processes
        distillation: Any = self.distillation
        sum_over_processes: Callable[[Tensor], Tensor] = lambda sums: sums  # noqa: E731
        if self.is_fsdp_enabled:
            # each process holds a part of each layer, so all of them evaluate all windows
            distillation = self.model_wrapped
        elif processes > 1 and len(windows) >= processes:
            windows = windows[self.accelerator.process_index :: processes]
            sum_over_processes = lambda sums: self.accelerator.reduce(sums, "sum")  # noqa: E731
        return evaluate_windows(
            distillation,
            windows,
            batch_size=self.options.batch_size,
            device=self.accelerator.device,
            sum_over_processes=sum_over_processes,
        )

    def _write(self, step: int, *, numbered: bool, best: bool) -> None:
        """Write ``checkpoint-N``, ``best`` or both; under FSDP every process must call it."""
        self._check_finite()
        if not (self.is_world_process_zero() or self.is_fsdp_enabled):
            return
        scaler = self.accelerator.scaler
        self._writer.write(
            step,
            self._unwrapped_optimizer(),
            self.lr_scheduler,
            Progress(
                micro_batches=self.micro_batches,
                best_kl=self.best_kl,
                scaler=scaler.state_dict() if scaler is not None else None,
                data=self._data_state(step),
            ),
            direct=self.evaluation.direct if self.evaluation else None,
            certificate=self.certificate,
            numbered=numbered,
            best=best,
        )

    def _data_state(self, step: int) -> dict[str, Any]:
        options = self.options
        per_step = options.batch_size * options.gradient_accumulation_steps
        # counted, since the data loader reads ahead of training
        taken = (step - self.first_step) * per_step * self.accelerator.num_processes
        return self.windows.state_after(self._first_window + taken)

    def _sample(self) -> None:
        """Say how the NPT model continues some prompts."""
        if not self.is_world_process_zero() or self.is_fsdp_enabled:
            return
        step, reading = self.state.global_step, Reading(special_tokens=self.options.special_tokens)
        seed = self.options.seed + step
        for text in samples(self.distillation.model, self.tokenizer, reading, seed):
            self.say(f"step {step}  sample  {text}")


class _TrainerHooks(TrainerCallback):
    """Passes Trainer's hooks to `NPTTrainer`."""

    def __init__(self, trainer: NPTTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.begin()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.enter_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer._logs_after(state.global_step):
            control.should_log = True
        self.trainer.leave_step(control)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
