"""``npt-fast check``"""

from __future__ import annotations

import sys
from dataclasses import asdict

from npt_fast.cli.arguments import PathText
from npt_fast.cli.compare import Layers, load_model
from npt_fast.cli.output import print_json, say
from npt_fast.config import BaseDType
from npt_fast.errors import TransferError


def check(
    facts: PathText,
    /,
    *,
    checkpoint: PathText,
    model_name: PathText = "meta-llama/Llama-3.2-1B",
    layers: Layers = None,
    junit: PathText | None = None,
    base_dtype: BaseDType = "auto",
    trust_remote_code: bool = False,
    cpu: bool = False,
    json: bool = False,
) -> int:
    """Score what injections do against what they are expected to do; exit code 3 if one fails.

    Parameters
    ----------
    facts
        YAML file: prompt, inject, expect and must_not_change of every fact.
    checkpoint
        Checkpoint directory or weights file.
    model_name
        Base model: Hub id, folder, .gguf file, or smollm2-135m.
    layers
        Some of the checkpoint's layers, as 11,13 or 11-15; all if not given.
    junit
        JUnit XML file to write, for CI.
    base_dtype
        Of the base model's weights; auto is the checkpoint's on a GPU, else float32.
    trust_remote_code
        Run code that comes with the base model or that it names, with all your rights.
    cpu
        Use the CPU although there is a GPU.
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
    model, tokenizer = load_model(
        checkpoint, model_name, layers, base_dtype, cpu, trust_remote_code
    )
    outcomes = []
    for fact in expected:
        try:
            outcome = library.check(model, tokenizer, fact)
        except TransferError as error:
            raise TransferError(f"{facts}: {error}") from error
        outcomes.append(outcome)
        if not json:
            say(f"{'FAIL' if outcome.problems else 'ok'} {fact.name} ({outcome.seconds:.1f} s)")
            say(f"  {fact.prompt!r}: {outcome.before!r} -> {outcome.after!r}")
            for problem in outcome.problems:
                say(f"  {problem}")
    failed = sum(bool(outcome.problems) for outcome in outcomes)
    if junit is not None:
        library.write_junit(outcomes, junit, str(facts))
    if json:
        results = [{**asdict(outcome), "passed": not outcome.problems} for outcome in outcomes]
        print_json({"checkpoint": checkpoint, "failed": failed, "facts": results})
    else:
        say(f"{len(outcomes) - failed} of {len(outcomes)} facts hold")
    return 3 if failed else 0
