"""``npt-fast plan``"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Annotated, Any

from cyclopts import Parameter, Token
from cyclopts.validators import Number

import npt_fast as npt
from npt_fast.cli.arguments import (
    CheckpointOptions,
    DataText,
    PathText,
    RowOptions,
    SpecialTokens,
)
from npt_fast.cli.output import print_json, progress_bar, say
from npt_fast.cli.plan_report import plan_folder, plan_json, plan_lines

_ROWS = RowOptions()


def _numbers(kind: Any, tokens: Sequence[Token]) -> tuple[int, ...]:
    """The numbers of ``1,3,10`` and of ``1 3 10``."""
    text = ",".join(token.value for token in tokens)
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{text!r:.80} is not a list of numbers such as 1,3,10") from None


def plan(
    model: CheckpointOptions,
    *,
    data: DataText = "python-docs",
    rows: RowOptions = _ROWS,
    first_tokens: Annotated[Sequence[str], Parameter(consume_multiple=True)] = (),
    counts: Annotated[
        tuple[int, ...],
        Parameter(consume_multiple=True, converter=_numbers, validator=Number(gte=1)),
    ] = (),
    num_eval_samples: Annotated[int, Parameter(validator=Number(gte=1))] = 10,
    max_length: Annotated[int, Parameter(validator=Number(gte=2))] = 512,
    batch_size: Annotated[int, Parameter(validator=Number(gte=1))] = 4,
    special_tokens: SpecialTokens = True,
    seed: int = 42,
    output: PathText | None = None,
    json: bool = False,
) -> None:
    """Plan in which order layers are converted, from a short run that trained all of them.

    npt-fast train --train_layers all --max_steps 200 --wandb_name all
    npt-fast plan --checkpoint experiments/all/checkpoint-200 --output plan

    It measures each layer alone, which gives the order; then its first layers together, and as
    many layers of a random order.

    Parameters
    ----------
    data
        Text to measure on, given as for train; only windows that train holds out are used.
    first_tokens
        Texts that rows of self begin with, given as for train.
    counts
        Numbers of layers to measure together, as 1,3,10; 1, 3, 10, 20 and 30 if not given. Those
        above the number of layers mean all layers, which are always measured.
    num_eval_samples
        Number of windows of each measurement.
    max_length
        Tokens per window.
    batch_size
        Windows per batch.
    special_tokens
        Let the tokenizer add its special tokens, such as BOS, to each document.
    seed
        Seed of the random order.
    output
        Folder to create: plan.json, plan.csv, plan.png.
    json
        Print the contents of plan.json.
    """
    from npt_fast.training.plan import COUNTS

    with nullcontext() if output is None else plan_folder(output) as write:
        loaded, tokenizer = model.load()
        with progress_bar("counts") as progress:
            found = npt.plan(
                loaded,
                tokenizer,
                data,
                counts=counts or COUNTS,
                seed=seed,
                windows=num_eval_samples,
                max_length=max_length,
                batch_size=batch_size,
                special_tokens=special_tokens,
                first_tokens=first_tokens,
                **asdict(rows),
                progress=progress,
            )
        if write is not None:
            write(found)
    if json:
        print_json(plan_json(found))
        return
    for line in plan_lines(found):
        say(line)
    if output is not None:
        say(f"Written to {output}")
