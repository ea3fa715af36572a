"""One training run in this process: from options to checkpoints."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from npt_fast.checkpoint import strict_json
from npt_fast.checkpoint.checkpoint import Checkpoint, open_checkpoint
from npt_fast.checkpoint.own_files import CONFIG
from npt_fast.checkpoint.publish import disk_errors
from npt_fast.checkpoint.training_run import FINAL
from npt_fast.checkpoint.training_state import TrainingState
from npt_fast.config import Progress, TrainOptions
from npt_fast.errors import TrainingError, printable
from npt_fast.hf.base_model import load_base_model
from npt_fast.hf.convert import components, decoder_layers
from npt_fast.hf.quiet import quiet
from npt_fast.layer_names import is_name, resolve_layers
from npt_fast.paths import user_path
from npt_fast.tables import Report
from npt_fast.training.curriculum import parse_curriculum
from npt_fast.training.data import open_data, with_base_model, with_data
from npt_fast.training.distillation import Distillation
from npt_fast.training.evaluation import Evaluation, collate
from npt_fast.training.given import Given
from npt_fast.training.metrics_log import MetricsLog
from npt_fast.training.other_texts import other_texts
from npt_fast.training.progress import read_progress
from npt_fast.training.run_directory import RunDirectory
from npt_fast.training.run_layers import add_layers, start
from npt_fast.training.run_trainer import RunTrainer
from npt_fast.training.state import read_state
from npt_fast.training.trackers import tracked, tracker_of


@dataclass(frozen=True, slots=True, repr=False)
class TrainReport(Report):
    """What a training run did.

    Attributes:
        output: folder of the run.
        checkpoint: the last checkpoint.
        global_step: optimizer steps taken, including those before resuming.
        layers: trained layers, ascending.
        seconds: duration of the run, including evaluation and saving.
        evaluation: the last evaluation, None if there was none.
        stopped_by: number of the signal that stopped the run early, 0 if none did.
        data: name of the text whose held-out windows are evaluated.
    """

    output: Path
    checkpoint: Path
    global_step: int
    layers: tuple[int, ...]
    seconds: float
    evaluation: Evaluation | None
    stopped_by: int
    data: str | None

    @property
    def facts(self) -> dict[str, object]:
        """What was trained, in short."""
        kl = "not measured" if self.evaluation is None else f"{self.evaluation.kl:.4g} nats"
        layers = ", ".join(map(str, self.layers))
        return {"checkpoint": self.checkpoint, "step": self.global_step, "layers": layers, "KL": kl}

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {name: _plain(value) for name, value in asdict(self).items()}


_NOTHING = Given()


def say(line: str) -> None:
    """Print a line on stderr, in the first of several processes."""
    if _is_main_process():
        print(printable(line), file=sys.stderr, flush=True)


def _is_main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


@quiet()
def train_here(
    options: TrainOptions, given: Given = _NOTHING, progress: Progress | None = None
) -> TrainReport:
    """Train in this process, which may be one of several.

    Args:
        options: how to train.
        given: objects that take the place of what the options name.
        progress: called while a text is sampled.

    Raises:
        NPTError: as `npt_fast.train`.
    """
    begun = time.monotonic()
    parse_curriculum(options.curriculum_stages)  # a mistake is said before a model is loaded
    checkpoint, training_state = _open_resumed(options)
    options = with_base_model(options, checkpoint, say)
    resumed = read_progress(training_state)
    first_step = training_state.global_step if training_state else 0
    if first_step >= options.max_steps:
        raise TrainingError(
            f"{options.resume_from}: is at step {first_step}, so --max_steps {options.max_steps} "
            "leaves nothing to do; max_steps includes the steps before resuming"
        )
    options = with_data(options, resumed.data, say)
    output = output_directory(options)
    run = RunDirectory(output, resuming=checkpoint is not None) if _is_main_process() else None
    metrics = None
    try:
        arguments = _training_arguments(options, output)
        model, tokenizer = given.model, given.tokenizer
        if model is None:
            model, tokenizer = load_base_model(
                options.base_name,
                dtype=options.base_dtype,
                device=arguments.device,
                keep_on_cpu=bool(arguments.fsdp),  # the whole model may not fit on one device
                trust_remote_code=options.trust_remote_code,
                checkpoints=[options.resume_from] if options.resume_from else [],
            )
        elif not arguments.fsdp and model.device != arguments.device:
            model.to(arguments.device)
        layers, fresh = add_layers(model, options, checkpoint, say)
        windows, held_out = open_data(
            options,
            model,
            tokenizer,
            resumed.data,
            progress,
            say,
            data=given.train_dataset,
            eval_data=given.eval_dataset,
        )
        texts = (
            other_texts(model, tokenizer, special_tokens=options.special_tokens)
            if options.eval_steps
            else {}
        )
        distillation = Distillation.of(model, options, _layer_weights(options, model))
        text = collate(held_out[:4])["input_ids"].to(model.device)
        start(distillation, fresh, options, text, windows, say, sharded=bool(arguments.fsdp))
        if run is not None:
            with disk_errors(output, TrainingError):
                metrics = MetricsLog(output, first_step)
                write_configuration(output, options)
        _say_setup(options, model, layers, output, first_step)
        with _deferred_signals() as stop_signal, tracked(options, output):
            trainer = RunTrainer(
                distillation,
                options,
                arguments,
                tokenizer=tokenizer,
                windows=windows,
                held_out=held_out,
                texts=texts,
                callbacks=given.callbacks,
                run=run,
                metrics=metrics,
                resumed=checkpoint,
                training_state=training_state,
                progress=resumed,
                stop_signal=stop_signal,
                say=say,
            )
            trainer.train()
            trainer.finish()
        step = trainer.state.global_step
        if run is not None and not trainer.stopped_by:
            run.link(step, FINAL)
        trainer.accelerator.wait_for_everyone()
        return TrainReport(
            output=output,
            checkpoint=output / "checkpoints" / f"checkpoint-{step}",
            global_step=step,
            layers=tuple(layers),
            seconds=time.monotonic() - begun,
            evaluation=trainer.evaluation,
            stopped_by=trainer.stopped_by,
            data=options.eval_data or options.data,
        )
    finally:
        if run is not None:
            run.close()


def output_directory(options: TrainOptions) -> Path:
    """The folder a run writes to: `output_dir`, else ``experiments/<wandb_name>``."""
    if options.output_dir is not None:
        return user_path(options.output_dir)
    name = options.wandb_name
    if name is None:
        base = re.sub(r"[^A-Za-z0-9._-]", "_", options.base_name.rstrip("/").split("/")[-1])
        named = is_name(options.train_layers)
        layers = options.train_layers if named else "-".join(map(str, options.layers))
        name = f"npt_layers_{layers}_{base}_{time.strftime('%Y%m%d_%H%M%S')}"
    if name in (".", "..") or "/" in name:
        raise TrainingError(f"wandb_name {name!r} is not a folder name; use --output_dir")
    return Path("experiments") / name


def configuration(options: TrainOptions) -> dict[str, Any]:
    """The options of a run as JSON values, which ``npt-fast train --config`` takes."""
    content = {name: _plain(value) for name, value in asdict(options).items()}
    del content["trust_remote_code"]  # must be repeated for every run, never read from a file
    return content


def write_configuration(folder: Path, options: TrainOptions) -> None:
    """Write the options of a run into its folder."""
    (folder / CONFIG).write_bytes(strict_json.dump(configuration(options)))


def _open_resumed(options: TrainOptions) -> tuple[Checkpoint | None, TrainingState | None]:
    if options.resume_from is None:
        return None, None
    checkpoint = open_checkpoint(options.resume_from)
    return checkpoint, read_state(checkpoint)


class _Arguments(TrainingArguments):
    """Trainer's arguments, and the options of the run, which trackers show."""

    config: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        # not every tracker accepts lists
        plain = {n: str(v) if isinstance(v, list) else v for n, v in self.config.items()}
        return {**super().to_dict(), **plain}  # type: ignore[no-untyped-call]


def _training_arguments(options: TrainOptions, output: Path) -> _Arguments:
    warmup = options.warmup_steps
    if warmup is None:
        # of a short run at most a tenth, or it would end before its full rate
        warmup = min(1000, options.max_steps // 10)
    cpu = options.cpu or not torch.cuda.is_available()
    fsdp: dict[str, Any] = {}
    if options.parallel == "fsdp2" and "LOCAL_RANK" in os.environ:
        fsdp = {"fsdp": True, "fsdp_config": {"version": 2}}
    arguments = _Arguments(
        output_dir=str(output),
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        learning_rate=options.learning_rate,
        warmup_steps=warmup,
        weight_decay=options.weight_decay,
        max_grad_norm=options.gradient_clip,
        max_steps=options.max_steps,
        bf16=options.mixed_precision,
        fp16=options.fp16,
        use_cpu=cpu,
        # each parameter of each NP layer gets a gradient in every step
        ddp_find_unused_parameters=False,
        # NCCL needs GPUs
        ddp_backend="gloo" if cpu and "LOCAL_RANK" in os.environ else None,
        dataloader_pin_memory=not cpu,
        # or process 0 would read an iterable dataset for all, and send its batches
        accelerator_config={"dispatch_batches": False, "split_batches": False},
        # or Trainer would drop `window` from the rows, a name that forward does not take
        remove_unused_columns=False,
        logging_strategy="no",
        # or Trainer would put an average in the place of NaN
        logging_nan_inf_filter=False,
        save_strategy="no",
        # for callbacks that ask; `RunTrainer` evaluates by itself
        eval_strategy="steps" if options.eval_steps else "no",
        eval_steps=options.eval_steps or None,
        metric_for_best_model="eval_kl",
        greater_is_better=False,
        report_to=tracker_of(options),
        run_name=options.wandb_name or output.name,
        project=options.wandb_project,
        disable_tqdm=True,
        seed=options.seed,
        log_level="error",
        **fsdp,
    )
    arguments.config = configuration(options)
    return arguments


def _layer_weights(options: TrainOptions, model: Any) -> dict[int, float]:
    """Loss weights by layer; `layer_weights` gives them in the order of `train_layers`."""
    layers = resolve_layers(options.train_layers, len(decoder_layers(model)))
    text = options.layer_weights
    if text == "uniform":
        values = [1.0] * len(layers)
    elif text == "linear":
        values = [1 - 0.5 * n / max(len(layers) - 1, 1) for n in range(len(layers))]
    else:
        try:
            values = [float(value) for value in text.split(",")]
        except ValueError:
            values = []
        if len(values) != len(layers) or not all(0 < value < float("inf") for value in values):
            raise TrainingError(
                f"layer_weights {text!r} is not uniform, linear or {len(layers)} positive numbers"
            )
    return dict(zip(layers, values, strict=True))


def _say_setup(
    options: TrainOptions,
    model: Any,
    layers: list[int],
    output: Path,
    first_step: int,
) -> None:
    say(f"Base model: {options.base_name}")
    for layer in layers:
        component = components(model)[layer]
        count = sum(parameter.numel() for parameter in component.parameters())
        say(
            f"Layer {layer}: {component.modulation_type}, num_ranks {component.num_ranks}, "
            f"rank {component.rank}, residual {component.residual}, {count:,} parameters"
        )
    say(f"Data: {options.data}")
    say(f"Steps: {first_step} to {options.max_steps}, curriculum {options.curriculum_stages}")
    say(
        f"Losses: {options.loss}, direct {options.direct_mlp_weight}, fidelity "
        f"{options.fidelity_weight}, regularization {options.lambda_reg}"
    )
    say(f"Output: {output}")


@contextmanager
def _deferred_signals() -> Iterator[Callable[[], int]]:
    """Defer SIGTERM and Ctrl-C to the end of the step, which is then saved; a second one exits.

    Yields:
        A function that returns the number of the deferred signal, 0 if there is none.
    """
    received, since = 0, 0.0
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0  # Python handles signals in the main thread only
        return

    def note(number: int, frame: Any) -> None:
        nonlocal received, since
        if not received:
            received, since = number, time.monotonic()
        elif time.monotonic() - since > 1:
            # within 1 s it is the same Ctrl-C: the terminal sends it to all processes, and
            # `launch` forwards it
            raise SystemExit(128 + number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
