"""``npt-fast study``"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from npt_fast.cli.arguments import CheckpointOptions, PathText, ReadingOptions
from npt_fast.cli.output import print_json, say
from npt_fast.config import InjectionMode
from npt_fast.errors import TransferError, printable

_READING = ReadingOptions()


def study(
    model: CheckpointOptions,
    *,
    output: PathText,
    suite: PathText | None = None,
    relations: Annotated[Sequence[str], Parameter(consume_multiple=True)] = (),
    modes: Annotated[Sequence[InjectionMode], Parameter(consume_multiple=True)] = (),
    strengths: Annotated[Sequence[float], Parameter(consume_multiple=True)] = (),
    pairs: Annotated[int, Parameter(validator=Number(gte=1))] = 10,
    seed: int = 0,
    bake: bool = False,
    reading: ReadingOptions = _READING,
    json: bool = False,
) -> None:
    """Measure what injections move, with controls, over relations such as countries' capitals.

    npt-fast study --checkpoint experiments/merged_11_13_23 --output study

    Parameters
    ----------
    output
        Folder to create: rows.csv, summary.csv, study.json, study.html, study.png.
    suite
        YAML file of relations and controls; the default suite if not given.
    relations
        Names of the suite's relations to study; all if not given. The others are still injected
        as other relations.
    modes
        Modes of the injections; replace and exact-add if not given.
    strengths
        Strengths of the injections, in each mode; 1 and 2 if not given.
    pairs
        Largest number of pairs of subjects in a relation.
    seed
        Seed of the choice of pairs, and of intervals.
    bake
        Measure baked texts, too: on prompts about other subjects, and on their paraphrases.
    json
        Print the contents of study.json, rows included.
    """
    from npt_fast.transfer import study as library
    from npt_fast.transfer.study_report import study_folder, study_json, study_lines
    from npt_fast.transfer.suite import DEFAULT, read_suite

    chosen = read_suite(suite or DEFAULT)
    if not chosen.relations:
        raise TransferError(f"{suite}: has no relations, which a study needs")
    chosen.named(relations)  # a wrong name is told before the model loads
    with study_folder(output) as write:  # before the model loads
        loaded, tokenizer = model.load()
        found = library.study(
            loaded, tokenizer, chosen,
            relations=relations, modes=modes or library.MODES,
            strengths=strengths or library.STRENGTHS, pairs=pairs, seed=seed, baked=bake,
            progress=_tell if sys.stderr.isatty() else None,
            **asdict(reading),
        )  # fmt: skip
        write(found)
    if json:
        print_json(study_json(found, found.summaries()))
        return
    for line in study_lines(found):
        say(line)
    say(f"Written to {output}")


def _tell(line: str) -> None:
    print(printable(line), file=sys.stderr)
