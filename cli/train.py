"""``npt-fast train``"""

from __future__ import annotations

from collections.abc import Callable, Sequence  # noqa: F401
from dataclasses import dataclass, replace
from pathlib import Path  # noqa: F401
from typing import Annotated, Literal, get_type_hints

from cyclopts import Group, Parameter

import npt_fast as npt
from npt_fast.cli.arguments import HubRepo, SpecialTokens
from npt_fast.cli.output import certificate_lines, print_json, progress_bar, say
from npt_fast.cli.push import check_push, push_written
from npt_fast.config import (  # noqa: F401  cyclopts resolves the hints of `TrainOptions` here
    BaseDType,
    FileFormat,
    InitStrategy,
    LossKind,
    LRSchedule,
    ModulationType,
    Parallel,
    Residual,
    TextName,
    Tracker,
    TrainOptions,
    WandbMode,
)
from npt_fast.errors import TrainingError
from npt_fast.layer_names import LayerList  # noqa: F401

_GROUPS = {
    "Model": "train_layers model_name resume_from base_dtype trust_remote_code",
    "Data": (
        "data text_column chat_template first_tokens eval_data num_eval_samples max_length stride "
        "num_workers special_tokens"
    ),
    "Layers": "np_rank num_ranks modulation residual init_strategy np_init_scale",
    "Losses": (
        "loss layer_weights direct_mlp_weight sink_weight virtual_stride fidelity_weight lambda_reg"
    ),
    "Optimisation": (
        "max_steps batch_size gradient_accumulation_steps learning_rate lr_schedule warmup_steps "
        "weight_decay gradient_clip mixed_precision fp16 teacher_cache seed"
    ),
    "Curriculum": "curriculum_stages",
    "Output": (
        "output_dir format logging_steps eval_steps save_steps keep_last generation_steps "
        "push_to_hub json"
    ),
    "Tracking": "track wandb_name wandb_project wandb_tags wandb_mode",
    "Processes": "num_processes parallel device cpu",
}
"""Parts of the help, and the options of each."""


def _grouped(function: Callable[..., int]) -> Callable[..., int]:
    """`function`, with a part of the help for each of its options and those of `TrainArguments`."""
    for order, (title, names) in enumerate(_GROUPS.items()):
        group = Parameter(group=Group(title, sort_key=order))
        for owner in (TrainArguments, function):
            hints = get_type_hints(owner, include_extras=True)
            for name in hints.keys() & names.split():
                owner.__annotations__[name] = Annotated[hints[name], group]
    return function


@dataclass(frozen=True, kw_only=True)
class TrainArguments(TrainOptions):
    """`TrainOptions`, whose flag that is on by default can be turned off."""

    special_tokens: SpecialTokens = True


@_grouped
def train(
    options: Annotated[TrainArguments, Parameter(name="*", consume_multiple=True)],
    *,
    device: Literal["cpu", "cuda"] | None = None,
    push_to_hub: HubRepo | None = None,
    json: bool = False,
) -> int:
    """Train NP layers of a language model, from scratch or from a checkpoint or merge.

    npt-fast train --train_layers 11 --max_steps 22000 --wandb_name layer11_training

    npt-fast train --train_layers 11,13 --resume_from experiments/merged_11_13 --max_steps 50000

    npt-fast train --config experiments/layer11_training/config.json --wandb_name again

    Parameters
    ----------
    device
        Device to train on; a GPU if there is one and none is given. CUDA_VISIBLE_DEVICES chooses
        among several.
    push_to_hub
        Repository on the Hub to push the last checkpoint to, as push does, unless the run is
        stopped.
    json
        Print the report as JSON.
    """
    check_push(push_to_hub)
    if device is not None:
        options = _on(device, options)
    with progress_bar("tokens") as progress:
        report = npt.train(options, progress=progress)
    if json:
        print_json(report.to_dict())
    else:
        if report.stopped_by:
            say(f"Stopped at step {report.global_step}; continue with --resume_from:")
        else:
            say("Multi-Layer NPT Training Complete!")
        if report.evaluation is not None:
            found = report.evaluation
            say(
                f"Perplexity {found.perplexity:.3f} (base model {found.base_perplexity:.3f}), "
                f"KL {found.kl:.4f} nats, top-1 agreement {found.top1_agreement:.4f}"
            )
            for line in certificate_lines(found.certificate(report.data)):
                say(line)
        say(f"Final checkpoint: {report.checkpoint}")
    if not report.stopped_by:
        push_written(report.checkpoint, push_to_hub)
    return 128 + report.stopped_by if report.stopped_by else 0


def _on(device: str, options: TrainArguments) -> TrainArguments:
    from npt_fast.hf.base_model import default_device

    if options.cpu and device != "cpu":
        raise TrainingError(f"--cpu and --device {device} exclude each other")
    if device == "cuda" and default_device() == "cpu":
        raise TrainingError("--device cuda: torch sees no GPU")
    return replace(options, cpu=device == "cpu")
