"""``npt-fast check``"""

from __future__ import annotations

import sys
from dataclasses import asdict

from npt_fast.cli.arguments import CheckpointOptions, PathText, ReadingOptions
from npt_fast.cli.output import print_json, say
from npt_fast.errors import TransferError
from npt_fast.transfer.positions import reached

_READING = ReadingOptions()


def check(
    facts: PathText,
    /,
    *,
    model: CheckpointOptions,
    reading: ReadingOptions = _READING,
    junit: PathText | None = None,
    json: bool = False,
) -> int:
    """Score injections against a file of facts; the exit code is 3 if a fact fails.

    Parameters
    ----------
    facts
        YAML file of facts, each with prompt, inject, expect and must_not_change.
    junit
        JUnit XML file to write, for CI.
    json
        Print everything as JSON.
    """
    from npt_fast.transfer import check as library
    from npt_fast.transfer.facts import FactsError, read_facts

    try:
        expected = read_facts(facts)
    except FactsError as error:
        print(*(f"Error: {problem}" for problem in error.problems), sep="\n", file=sys.stderr)
        return error.exit_code
    loaded, tokenizer = model.load()
    outcomes = []
    for fact in expected:
        try:
            outcome = library.check(loaded, tokenizer, fact, reading)
        except TransferError as error:
            raise TransferError(f"{facts}: {error}") from error
        outcomes.append(outcome)
        if not json:
            say(f"{'FAIL' if outcome.problems else 'ok'} {fact.name} ({outcome.seconds:.1f} s)")
            say(f"  {fact.prompt!r}: {outcome.before!r} -> {outcome.after!r}")
            hit = reached(outcome.positions, outcome.tokens, fact.injection.when)
            say(f"  {outcome.source} into tokens {hit}")
            for problem in outcome.problems:
                say(f"  {problem}")
    failed = sum(bool(outcome.problems) for outcome in outcomes)
    if junit is not None:
        library.write_junit(outcomes, junit, str(facts))
    if json:
        results = [{**asdict(outcome), "passed": not outcome.problems} for outcome in outcomes]
        print_json({"checkpoint": model.checkpoint, "failed": failed, "facts": results})
    else:
        say(f"{len(outcomes) - failed} of {len(outcomes)} facts hold")
    return 3 if failed else 0
