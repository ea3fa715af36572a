"""``npt-fast train``"""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

import npt_fast as npt
from npt_fast.cli.output import print_json, say
from npt_fast.config import TrainOptions


def train(
    options: Annotated[TrainOptions, Parameter(name="*", consume_multiple=True)],
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
    report = npt.train(options)
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
        say(f"Final checkpoint: {report.checkpoint}")
    return 128 + report.stopped_by if report.stopped_by else 0
