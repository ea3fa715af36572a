"""``npt-fast train``"""

from __future__ import annotations

from collections.abc import Sequence  # noqa: F401
from dataclasses import dataclass
from pathlib import Path  # noqa: F401
from typing import Annotated

from cyclopts import Parameter

import npt_fast as npt
from npt_fast.cli.arguments import SpecialTokens
from npt_fast.cli.output import certificate_lines, print_json, progress_bar, say
from npt_fast.config import (  # noqa: F401  cyclopts resolves the hints of `TrainOptions` here
    BaseDType,
    FileFormat,
    Initialization,
    LossKind,
    LRSchedule,
    ModulationType,
    Parallel,
    Residual,
    Tracker,
    TrainOptions,
    WandbMode,
)


@dataclass(frozen=True, kw_only=True)
class TrainArguments(TrainOptions):
    """`TrainOptions`, whose flag that is on by default can be turned off."""

    special_tokens: SpecialTokens = True


def train(
    options: Annotated[TrainArguments, Parameter(name="*", consume_multiple=True)],
    *,
    json: bool = False,
) -> int:
    """Train NP layers of a language model, from scratch or from a checkpoint or merge.

    npt-fast train --train_layers 11 --max_steps 22000 --wandb_name layer11_training

    Parameters
    ----------
    json
        Print the report as JSON.
    """
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
    return 128 + report.stopped_by if report.stopped_by else 0
