"""``npt-fast check``"""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from npt_fast.cli.arguments import CheckpointOptions, PathText, ReadingOptions
from npt_fast.cli.output import print_json, say
from npt_fast.errors import TransferError
from npt_fast.transfer.positions import reached

if TYPE_CHECKING:
    from npt_fast.transfer.check import Outcome

_READING = ReadingOptions()


def check(
    facts: PathText,
    /,
    model: CheckpointOptions,
    *,
    reading: ReadingOptions = _READING,
    junit: PathText | None = None,
    json: bool = False,
) -> int:
    """Score injections against a suite of facts and relations; the exit code is 3 if one fails.

    npt-fast check facts.yaml experiments/merged_11_13_23 --junit report.xml

    Parameters
    ----------
    facts
        YAML file of facts, each with prompt, inject, expect and must_not_change, and of relations
        with controls, as study takes them.
    junit
        JUnit XML file to write, for CI.
    json
        Print everything as JSON.
    """
    from npt_fast.transfer import check as library
    from npt_fast.transfer.strict_yaml import MistakesError
    from npt_fast.transfer.suite import read_suite

    try:
        suite = read_suite(facts)
    except MistakesError as error:
        print(*(f"Error: {problem}" for problem in error.problems), sep="\n", file=sys.stderr)
        return error.exit_code
    loaded, tokenizer = model.load()
    outcomes = []
    try:
        for fact in suite.facts:
            outcome = library.check(loaded, tokenizer, fact, reading)
            outcomes.append(outcome)
            if not json:
                hit = reached(outcome.positions, outcome.tokens, fact.injection.when)
                _print(outcome, f"{outcome.source} into tokens {hit}")
        if suite.relations:
            for outcome in library.check_relations(loaded, tokenizer, suite, reading):
                outcomes.append(outcome)
                if not json:
                    _print(outcome, f"{outcome.source} into the last token")
    except TransferError as error:
        raise TransferError(f"{facts}: {error}") from error
    failed = sum(bool(outcome.problems) for outcome in outcomes)
    if junit is not None:
        library.write_junit(outcomes, junit, str(facts))
    if json:
        results = [{**asdict(outcome), "passed": not outcome.problems} for outcome in outcomes]
        print_json({"checkpoint": model.checkpoint, "failed": failed, "facts": results})
    else:
        say(f"{len(outcomes) - failed} of {len(outcomes)} facts hold")
    return 3 if failed else 0


def _print(outcome: Outcome, how: str) -> None:
    say(f"{'FAIL' if outcome.problems else 'ok'} {outcome.name} ({outcome.seconds:.1f} s)")
    say(f"  {outcome.prompt!r}: {outcome.before!r} -> {outcome.after!r}")
    say(f"  {how}")
    for problem in outcome.problems:
        say(f"  {problem}")
