"""``npt-fast plot``"""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from npt_fast.checkpoint.training_log import read_log
from npt_fast.cli.arguments import PathText
from npt_fast.cli.output import say
from npt_fast.pictures.figure import check, save
from npt_fast.pictures.runs import draw_runs


def plot(
    runs: Annotated[list[PathText], Parameter(consume_multiple=(1, None))],
    /,
    *,
    output: PathText = "plot.png",
) -> None:
    """Draw losses, fidelity, learning rate and stages of training runs, all in one picture.

    npt-fast plot experiments/layer11_training experiments/layer13_training --output runs.svg

    Parameters
    ----------
    runs
        Folders of runs, or their training_log.jsonl.
    output
        Picture to write: .png, .svg or .pdf.
    """
    check(output)
    save(draw_runs([read_log(run) for run in runs]), output)
    say(f"Written to {output}")
