"""Options as frozen dataclasses that validate their values."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from npt_fast.arguments import check_constructor
from npt_fast.errors import OptionError
from npt_fast.layer_names import LayerList, check_layers, parse_layers
from npt_fast.paths import expand
from npt_fast.schema import Kind
from npt_fast.text_sources import parse_data

ConflictPolicy = Literal["first", "last", "error", "identical", "concat", "mean"]
BadStatePolicy = Literal["error", "skip"]
FileFormat = Literal["pt", "safetensors"]
Progress = Callable[[str, int, int], None]
"""Called with the name of the work, bytes done and total bytes."""
WeightDType = Literal["float64", "float32", "float16", "bfloat16"]
ModulationType = Literal["single", "dual", "triple", "plain"]
Residual = Literal["removed", "kept"]
Initialization = Literal["zero", "improved", "conservative"]
InitStrategy = Literal["fitted", Initialization]
LossKind = Literal["relative", "mse"]
LRSchedule = Literal["cosine", "constant"]
BaseDType = Literal["auto", "float32", "bfloat16", "float16"]
Parallel = Literal["ddp", "fsdp2", "layers"]
Tracker = Literal["none", "wandb", "tensorboard", "trackio"]
WandbMode = Literal["online", "offline", "disabled"]
InjectionMode = Literal["replace", "blend", "add", "exact-blend", "exact-add"]
InjectionTime = Literal["prefill", "decode", "both"]
SamplingStrategy = Literal["greedy", "top_k", "top_p", "sample"]
TextName = Annotated[
    str | None,
    Kind(
        "the name of a text (npt.train takes data sets as train_dataset and eval_dataset)",
        lambda value: value is None or isinstance(value, (str, os.PathLike)),
    ),
]
"""Text to train or measure on, by its name or path."""
DEFAULT_MODEL = "meta-llama/Llama-3.2-1B"
"""The base model where neither the user nor a checkpoint names one."""
CURRICULUM = "teacher:5000,mixed:5000:0.5,student:20000"
"""The stages of a run that names none."""


@dataclass(frozen=True, slots=True)
class Match:
    """The first place where a text occurs; `npt_fast.at` and `npt_fast.after` make one.

    Attributes:
        text: Text to look for.
        after: Take the token that follows the text instead of the text's own tokens.
    """

    text: str
    after: bool = False

    def __str__(self) -> str:
        return f"{'after' if self.after else 'at'}:{self.text}"


Position = int | slice | Sequence[int] | str | Match
"""Tokens of a text, counted without padding; `npt_fast.transfer.positions` has the notation."""


@check_constructor
@dataclass(frozen=True, kw_only=True, slots=True)
class Injection:
    """How a modulation is put into a model: the arguments of `npt_fast.inject`, as one value.

    Attributes:
        position: Tokens of the prompt that receive the modulation.
        mode: How the modulation changes a token's weights. ``replace``: in place of the token's own
            change; ``blend``, ``add``: the vectors v_a and v_b of both are mixed or added, as the
            original does; ``exact-blend``, ``exact-add``: the weight changes of both are.
        strength: Factor of the modulation; in a blend, its share.
        when: Inject into the prompt (``prefill``), into generated tokens (``decode``), or both.
    """

    position: Position = "last"
    mode: InjectionMode = "replace"
    strength: float = 1.0
    when: InjectionTime = "prefill"


@check_constructor
@dataclass(frozen=True, kw_only=True, slots=True)
class NPTConfig:
    """NP layers to convert, all of one architecture.

    Attributes:
        layers: Decoder layers: 11, ``"11,13"``, ``"11-15"``, ``"upper_half"`` or indices; negative
            ones count from the end.
        rank: Bottleneck width r of each component.
        num_ranks: Number of components k per projection.
        modulation: Projections to modulate. ``single``: gate; ``dual``: gate and up; ``triple``:
            gate, up and down, or all that the MLP has; ``plain``: up and down of an MLP without a
            gate.
        residual: ``removed``: the layer adds only its MLP's output, so the MLP replaces
            attention + MLP; ``kept``: it adds the attention output too (design.md#layer).
        init: Initialization. ``zero`` starts at the base MLP with gradients that are not 0;
            ``improved`` and ``conservative`` are the original's (design.md#initialization).
        init_scale: Scale of ``improved`` and ``conservative``; ``zero`` ignores it.

    Raises:
        OptionError: an option has a value that is not allowed.
    """

    layers: LayerList
    rank: int = 64
    num_ranks: int = 1
    modulation: ModulationType = "triple"
    residual: Residual = "removed"
    init: Initialization = "zero"
    init_scale: float = 0.001

    def __post_init__(self) -> None:
        check_layers(self.layers)
        if self.rank < 1 or self.num_ranks < 1:
            raise OptionError(
                f"rank and num_ranks must be positive, got {self.rank} and {self.num_ranks}"
            )
        if not 0 < self.init_scale < float("inf"):
            raise OptionError(f"init_scale must be positive and finite, got {self.init_scale}")


@check_constructor
@dataclass(frozen=True, kw_only=True, slots=True)
class MergeOptions:
    """How to merge checkpoints (design.md#merge-laws).

    Attributes:
        on_conflict: What to do when two inputs hold the same layer. ``first`` and ``last`` take the
            whole layer from one input, ``error`` refuses, ``identical`` accepts only equal bytes,
            ``concat`` joins the components so that the weight changes add up, ``mean`` joins them
            so that the weight changes average.
        uniform: Pad all layers to one modulation type, num_ranks and rank; padding is exact, and
            the original loads only uniform checkpoints.
        dtype: Type to convert all weights to; if not given, each tensor keeps its type.
        format: File format of the weights; if not given, the format of the first input.
        max_shard_size: Bytes of tensors per safetensors file; larger outputs become shards with an
            index.
        weights_only: Leave out optimizer, scheduler, step and curriculum.
        copy_multi_layer_state: File ``multi_layer_state.pt`` to take the curriculum from.
        allow_different_base: Merge even if the configs name different base models.
        on_bad_state: What to do when an input's training state cannot be used: ``error`` refuses,
            ``skip`` merges its weights and leaves its state out.

    Raises:
        OptionError: an option has a value that is not allowed.
        PathError: a path cannot be expanded.
    """

    on_conflict: ConflictPolicy = "first"
    uniform: bool = False
    dtype: WeightDType | None = None
    format: FileFormat | None = None
    max_shard_size: int = 5_000_000_000
    weights_only: bool = False
    copy_multi_layer_state: str | Path | None = None
    allow_different_base: bool = False
    on_bad_state: BadStatePolicy = "error"

    def __post_init__(self) -> None:
        if self.max_shard_size < 1:
            raise OptionError(f"max_shard_size must be positive, got {self.max_shard_size}")
        _check_paths(self, "copy_multi_layer_state")


@check_constructor
@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions:
    """How to train NP layers.

    Names are the original's, and so are the defaults except for a few (design.md#the-original).

    Attributes:
        train_layers: Layers to train: 11 or 11,13 or 11-15, all, upper_half or lower_half;
            negative indices count from the end.
        model_name: Base model: Hub id, folder, .gguf file, or smollm2-135m; if not given, the one
            that resume_from records, or meta-llama/Llama-3.2-1B for a new run.
        resume_from: Checkpoint to resume from: one of this run, a merge, or one with other layers.
        data: Training text: small, medium, large or xlarge (Hugging Face datasets, streamed);
            python-docs (part of Python); self or self:TOKENS (sampled from the base model); or a
            file, folder or glob of .txt, .md, .jsonl, .json or .parquet; or a data set of the
            Hugging Face Hub, org/name:config:split, streamed. Several, with commas between them,
            take turns. By default that of the resumed run, or medium, or self where medium cannot
            be streamed.
        text_column: Column of the data that holds texts, chats or token ids. By default the first
            of text, messages, prompt with completion, and input_ids that there is.
        chat_template: File with the Jinja template that makes texts of chats, instead of the
            tokenizer's own.
        first_tokens: Texts that rows of self begin with, in turn, instead of the model's own first
            token.
        eval_data: Held-out text; by default the first windows of data are held out.
        num_eval_samples: Number of held-out windows.
        max_length: Tokens per window.
        stride: Tokens from the start of one window to the next; defaults to max_length.
        num_workers: Tokenizer threads.
        special_tokens: Add the special tokens, such as BOS, that the tokenizer adds by itself.
        np_rank: Bottleneck width of each component, for layers that start fresh.
        num_ranks: Components per projection, for layers that start fresh.
        modulation: Projections to modulate. single: gate; dual: gate and up; triple: gate, up and
            down, or all that the MLP has; plain: up and down of an MLP without a gate.
        residual: What happens to the attention output. removed: the trained MLP replaces
            attention + MLP; kept: the layer still adds it. If not given, layers that start fresh
            have removed, and those of resume_from what is recorded or found out of them.
        init_strategy: How fresh layers start. fitted: near their target, by a closed form fitted to
            the first 8,192 tokens that training would read; zero: at the base MLP; improved and
            conservative: as the original's, and all layers train with one learning rate.
        np_init_scale: Scale of the original's initializations.
        curriculum_stages: Comma-separated name:steps[:attention_ratio[:mlp_ratio]]; names are
            teacher, mixed, student.
        layer_weights: Weights of the layers in the loss: uniform, linear (from 1.0 down to 0.5), or
            one number per layer.
        loss: Measure of errors. relative: squared error over squared target per token, with bounds
            for unusual tokens, and KL for the fidelity loss; mse: the original's mean squared
            errors.
        direct_mlp_weight: Weight of each layer's direct loss.
        sink_weight: Weight of the error at the first token of each window, relative to the layer's
            output; nearly all tokens attend to the first one. Works with loss relative only.
        virtual_stride: Positions from one virtual token to the next. Virtual tokens show a layer
            attention outputs that the text does not have; 0 trains without them. They work with
            loss relative only.
        fidelity_weight: Weight of the fidelity loss, which compares logits; above 0, all layers of
            the model are run.
        lambda_reg: Weight of the mean squares of v_a and v_b.
        batch_size: Windows per process and micro-batch.
        gradient_accumulation_steps: Micro-batches per optimizer step.
        learning_rate: Peak learning rate of AdamW; overrides the checkpoint's. It is that of
            parameters with a root mean square of 0.02, and that of others is in proportion, but of
            W_a_up and W_b_up never above it. With init_strategy improved and conservative it is
            that of all.
        lr_schedule: Schedule after the warm-up: cosine (half a period, to 0 at max_steps) or
            constant.
        warmup_steps: Steps of linear warm-up; defaults to the smaller of 1000 and max_steps / 10.
        weight_decay: Weight decay of AdamW.
        gradient_clip: Largest norm of the gradients of each layer; 0 turns clipping off.
        max_steps: Optimizer steps in total, including those before resuming.
        teacher_cache: Memory for the base model's activations, e.g. 2GB. In the teacher stage with
            small data, later epochs then skip the base model.
        mixed_precision: Autocast in bfloat16.
        fp16: Autocast in float16, with loss scaling.
        base_dtype: Type of the base model's weights; auto is the checkpoint's type on a GPU and
            float32 on a CPU.
        trust_remote_code: Run code that comes with the base model or that it names, with all your
            rights; never read from a file, so repeat it with resume_from.
        cpu: Train on the CPU even if there is a GPU.
        num_processes: Processes, one per GPU.
        parallel: How processes share the work. ddp: each takes part of the batch; fsdp2: the model
            is sharded too; layers: each trains its own layers, which are merged at the end.
        output_dir: Folder of the run; defaults to experiments/<wandb_name>.
        format: File format of the weights; the original reads pt.
        logging_steps: Optimizer steps between lines of metrics.
        eval_steps: Optimizer steps between evaluations in student mode; 0 turns them off.
        save_steps: Optimizer steps between checkpoints; the last step is always saved.
        keep_last: Number of checkpoint-N to keep; all if not given.
        generation_steps: Optimizer steps between samples of text; 0 turns them off.
        track: Tracker that gets the metrics in addition to training_log.jsonl.
        wandb_name: Name of the run.
        wandb_project: Project of the run, for any tracker.
        wandb_tags: Tags of the run.
        wandb_mode: Mode of wandb: online, offline or disabled; the first two turn wandb on.
        seed: Seed of initialization, order of the data, and samples.

    Raises:
        OptionError: an option has a value that is not allowed, or two exclude each other.
        PathError: a path cannot be expanded.
    """

    train_layers: LayerList
    model_name: str | None = None
    resume_from: str | Path | None = None
    data: TextName = None
    text_column: str | None = None
    chat_template: str | Path | None = None
    first_tokens: Sequence[str] = ()
    eval_data: TextName = None
    num_eval_samples: int = 100
    max_length: int = 512
    stride: int | None = None
    num_workers: int = 4
    special_tokens: bool = True
    np_rank: int = 64
    num_ranks: int = 4
    modulation: ModulationType = "triple"
    residual: Residual | None = None
    init_strategy: InitStrategy = "fitted"
    np_init_scale: float = 0.001
    curriculum_stages: str = CURRICULUM
    layer_weights: str = "uniform"
    loss: LossKind = "relative"
    direct_mlp_weight: float = 10.0
    sink_weight: float = 64.0
    virtual_stride: int = 2
    fidelity_weight: float = 0.0
    lambda_reg: float = 0.0
    batch_size: int = 4
    gradient_accumulation_steps: int = 4
    learning_rate: float = 1e-4
    lr_schedule: LRSchedule = "cosine"
    warmup_steps: int | None = None
    weight_decay: float = 0.01
    gradient_clip: float = 0.1
    max_steps: int = 30000
    teacher_cache: str = "0"
    mixed_precision: bool = False
    fp16: bool = False
    base_dtype: BaseDType = "auto"
    trust_remote_code: bool = False
    cpu: bool = False
    num_processes: int = 1
    parallel: Parallel = "ddp"
    output_dir: str | Path | None = None
    format: FileFormat = "pt"
    logging_steps: int = 10
    eval_steps: int = 500
    save_steps: int = 2000
    keep_last: int | None = None
    generation_steps: int = 500
    track: Tracker = "none"
    wandb_name: str | None = None
    wandb_project: str = "npt-multi-layer"
    wandb_tags: Sequence[str] = ()
    wandb_mode: WandbMode | None = None
    seed: int = 42

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise OptionError(f"{name} must be positive, got {value}")
        for name in _NOT_NEGATIVE:
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise OptionError(f"{name} must not be negative, got {value}")
        if self.max_length < 2:
            raise OptionError(f"max_length must be at least 2, got {self.max_length}")
        if self.stride is not None and not 0 < self.stride <= self.max_length:
            raise OptionError(f"stride must be from 1 to max_length, got {self.stride}")
        if self.mixed_precision and self.fp16:
            raise OptionError("mixed_precision is bfloat16; choose it or fp16, not both")
        if not self.direct_mlp_weight and not self.fidelity_weight:
            raise OptionError("direct_mlp_weight and fidelity_weight are both 0: nothing to learn")
        _check_paths(self, "model_name", "resume_from", "output_dir", "chat_template")
        for name in ("data", "eval_data"):
            _check(self, name, parse_data)
            if isinstance(path := getattr(self, name), os.PathLike):  # files record it as text
                object.__setattr__(self, name, os.fspath(path))
        # only to raise: the fields keep what was given, which config.json records
        check_layers(self.train_layers)
        parse_size(self.teacher_cache)

    @property
    def base_name(self) -> str:
        """`model_name`, or the default."""
        return self.model_name or DEFAULT_MODEL

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers to train, in the order given, which is the order of `layer_weights`.

        Raises:
            OptionError: `train_layers` is a name, which needs a model.
        """
        return parse_layers(self.train_layers)


def _check_paths(options: MergeOptions | TrainOptions, *names: str) -> None:
    for name in names:
        _check(options, name, expand)


def _check(options: object, name: str, parse: Callable[[str], object]) -> None:
    """Raise the error of a parser of an option, with the option's name in front."""
    given = getattr(options, name)
    try:
        if given is not None:
            parse(given)
    except OptionError as error:
        raise type(error)(f"{name}: {error}") from None


_POSITIVE = (
    "num_eval_samples",
    "num_workers",
    "np_rank",
    "num_ranks",
    "np_init_scale",
    "batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "max_steps",
    "num_processes",
    "logging_steps",
    "save_steps",
    "keep_last",
)
_NOT_NEGATIVE = (
    "direct_mlp_weight",
    "sink_weight",
    "virtual_stride",
    "fidelity_weight",
    "lambda_reg",
    "warmup_steps",
    "weight_decay",
    "gradient_clip",
    "eval_steps",
    "generation_steps",
)


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_size(text: str) -> int:
    """Parse ``"5GB"`` into bytes; units are powers of 1000.

    Raises:
        OptionError: `text` is not a size.
    """
    match = re.fullmatch(r"([0-9]{1,15})\s*([KMGT]?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise OptionError(f"{text!r} is not a size such as 5GB or 500MB")
    return int(match[1]) * _UNITS[(match[2] or "").upper()]
