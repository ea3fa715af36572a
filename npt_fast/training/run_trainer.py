"""The training loop of a run: an `NPTTrainer` that writes the run's folder.

Trainer accumulates gradients, scales, autocasts and distributes. This file decides when to
evaluate, save, sample and stop, and restores a run that is resumed.
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
    PrinterCallback,
    ProgressCallback,
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
from npt_fast.hf.convert import trainable_parameters
from npt_fast.hf.tokenizer import Reading
from npt_fast.training.checkpoint_writer import CheckpointWriter
from npt_fast.training.curriculum import stage_index
from npt_fast.training.distillation import Distillation, Losses
from npt_fast.training.evaluation import (
    Evaluation,
    Figures,
    collate,
    evaluate_windows,
)
from npt_fast.training.metrics_log import MetricsLog, for_callbacks
from npt_fast.training.mixed_windows import MixedWindows
from npt_fast.training.optimizer import BETAS
from npt_fast.training.progress import Progress
from npt_fast.training.run_directory import RunDirectory
from npt_fast.training.samples import samples
from npt_fast.training.state import restore_optimizer
from npt_fast.training.step_metrics import StepMetrics
from npt_fast.training.token_windows import TokenWindows
from npt_fast.training.trackers import start_tracker, tracker_of
from npt_fast.training.trainer import NPTTrainer


class RunTrainer(NPTTrainer):
    """Trains the NP layers of a model as `npt_fast.train` does.

    Args:
        distillation: computes the losses of a batch.
        options: options of the run.
        arguments: the same options for Trainer.
        tokenizer: the model's tokenizer.
        windows: training text, at the position where the run begins.
        held_out: windows for evaluation.
        texts: windows of texts of other kinds, by name, for evaluation too.
        callbacks: callbacks of the user.
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
        windows: TokenWindows | MixedWindows,
        held_out: Sequence[Mapping[str, Tensor]],
        texts: Mapping[str, Sequence[Mapping[str, Tensor]]],
        callbacks: Sequence[TrainerCallback],
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
            curriculum_stages=options.curriculum_stages,
            data_collator=collate,
            train_dataset=windows,
            eval_dataset=held_out,
        )
        start_tracker(self, tracker_of(options))
        # they print to stdout, which is for the report
        for printer in (PrinterCallback, ProgressCallback):
            self.remove_callback(printer)
        # the user's see a run that is restored, and may ask for what follows a step
        for callback in (_Beginning(self), *callbacks, _End(self)):
            self.add_callback(callback)
        self.options = options
        self.tokenizer = tokenizer
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
        self._saved = -1  # step of the last numbered checkpoint
        self._first_window = windows.position
        self._step_metrics = StepMetrics()
        self._writer = CheckpointWriter(
            run,
            distillation,
            options,
            stages=self.stages,
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
        """Create the optimizer, which has one rate if layers start as the original's."""
        if self.optimizer is None and self.options.init_strategy in ("improved", "conservative"):
            self.optimizer = torch.optim.AdamW(
                trainable_parameters(self.distillation.model),
                lr=self.args.learning_rate,
                betas=BETAS,
                weight_decay=self.args.weight_decay,
                fused=True,
            )
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Create the schedule, at the step where the run begins (design.md#curriculum)."""
        if self.lr_scheduler is None:
            optimizer = optimizer or self.optimizer
            for group in optimizer.param_groups:
                # a schedule that resumes in the middle needs it
                group["initial_lr"] = self.options.learning_rate
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

    def _losses(self, model: Any, inputs: Mapping[str, Any]) -> Losses:
        step = self.state.global_step
        losses: Losses = model(
            **inputs, stage=self._current_stage(step), measure_norms=self._logs_after(step + 1)
        )
        self._step_metrics.add(losses)
        self.micro_batches += 1
        return losses

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate on the held-out texts of the run; return the figures by their names."""
        self._evaluate_now()
        assert self.evaluation is not None
        return for_callbacks(self.evaluation.metrics())

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
        super().log(for_callbacks(values))

    def _logs_after(self, step: int) -> bool:
        """Whether metrics are logged after this optimizer step."""
        every = self.options.logging_steps
        return step % every == 0 or step in (1, self.first_step + 1, self.options.max_steps)

    def _last_logged_before(self, step: int) -> int:
        return max(
            self.first_step, next((s for s in range(step - 1, 0, -1) if self._logs_after(s)), 0)
        )

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
        self.state.best_metric = self.best_kl
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

    def leave_step(self) -> None:
        """Evaluate, save, sample and stop after an optimizer step, as due or asked for."""
        options, step, control = self.options, self.state.global_step, self.control
        if self.accelerator.device.type == "cpu":
            self._check_finite()  # a GPU would have to wait; there, only before logging and saving
        begun = time.monotonic()
        last = step >= options.max_steps
        self.stopped_by = 0 if last else self._agreed_stop()
        evaluates = options.eval_steps and (step % options.eval_steps == 0 or last)
        better = self._evaluate_now() if evaluates or control.should_evaluate else False
        saves = step % options.save_steps == 0 or last or self.stopped_by or control.should_save
        if saves or better:
            self._write(step, numbered=bool(saves), best=better)
        if options.generation_steps and step % options.generation_steps == 0:
            self._sample()
        self._step_metrics.exclude(time.monotonic() - begun)
        # done, so that Trainer does not do it again
        control.should_evaluate = control.should_save = False
        if self.stopped_by:
            control.should_training_stop = True

    def finish(self) -> None:
        """Save the last step if a callback has ended the run there."""
        if self._saved != self.state.global_step:
            self._write(self.state.global_step, numbered=True, best=False)

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
        self.callback_handler.on_evaluate(
            self.args, self.state, self.control, for_callbacks(found.metrics())
        )
        better = self.best_kl is None or found.kl < self.best_kl
        if better:
            self.best_kl = self.state.best_metric = found.kl
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
        if numbered:
            self._saved = step
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
        self.callback_handler.on_save(self.args, self.state, self.control)

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


class _Beginning(TrainerCallback):
    """Hooks that run before those of the user."""

    def __init__(self, trainer: RunTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.begin()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.enter_step()


class _End(TrainerCallback):
    """Hooks that run after those of the user."""

    def __init__(self, trainer: RunTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.leave_step()
        # last, since what an evaluation logs takes it back
        control.should_log |= self.trainer._logs_after(state.global_step)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
