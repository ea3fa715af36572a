"""Score facts and relations: compare what injections do with what is expected."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from npt_fast.checkpoint.publish import disk_errors
from npt_fast.errors import NPTError, TransferError, printable
from npt_fast.hf.tokenizer import DEFAULT_READING, Reading, read
from npt_fast.paths import user_path
from npt_fast.transfer.extract import extract
from npt_fast.transfer.facts import Fact
from npt_fast.transfer.generate import Sampling, continue_ids
from npt_fast.transfer.inject import injecting
from npt_fast.transfer.study import NOTHING, SAME, UNRELATED, study
from npt_fast.transfer.study_results import Row
from npt_fast.transfer.suite import Suite


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of checking one fact or relation.

    Attributes:
        name: Name of the fact or relation.
        prompt: Its prompt.
        source: Text and tokens that the modulation comes from.
        tokens: Texts of the prompt's tokens; empty for a relation.
        positions: Positions in the prompt that received the modulation; empty for a relation.
        before: Continuation without injection, or what is on top for how many pairs.
        after: The same with the injection.
        problems: One line per expectation that was not met.
        seconds: Duration of the check.
    """

    name: str
    prompt: str
    source: str
    tokens: list[str]
    positions: list[int]
    before: str
    after: str
    problems: list[str]
    seconds: float


def check(model: Any, tokenizer: Any, fact: Fact, reading: Reading = DEFAULT_READING) -> Outcome:
    """Score one fact by greedy generation.

    Args:
        model: Model with NP layers; those that are on are extracted from and injected into.
        tokenizer: Tokenizer of the model.
        fact: Injection and expectations.
        reading: How the texts become tokens.

    Raises:
        TransferError: the injection is not possible; the message names the fact.
    """
    begun = time.perf_counter()
    sampling = Sampling(tokens=fact.tokens)
    try:
        modulation = extract(
            model, tokenizer, fact.source, position="all" if fact.sequence else -1, reduce="mean",
            **asdict(reading),
        )  # fmt: skip

        def continued(prompt: str) -> tuple[str, str, list[int]]:
            """Continuations without and with injection, and where it was injected."""
            ids = read(tokenizer, prompt, reading).ids
            plain = continue_ids(model, ids, sampling)[0]
            with injecting(model, modulation, fact.injection, tokenizer) as hits:
                injected = continue_ids(model, ids, sampling)[0]
            return tokenizer.decode(plain), tokenizer.decode(injected), hits.positions[0]

        before, after, positions = continued(fact.prompt)
        problems = []
        if fact.begins is not None and not after.lstrip().startswith(fact.begins.lstrip()):
            problems.append(f"expected to begin with {fact.begins!r}, got {after!r}")
        if fact.contains is not None and fact.contains not in after:
            problems.append(f"expected to contain {fact.contains!r}, got {after!r}")
        for prompt in fact.must_not_change:
            expected, found, _ = continued(prompt)
            if found != expected:
                problems.append(f"{prompt!r} must continue with {expected!r}, got {found!r}")
    except NPTError as error:
        raise TransferError(f"fact {fact.name!r}: {error}") from error
    return Outcome(
        name=fact.name,
        prompt=fact.prompt,
        source=modulation.description,
        tokens=read(tokenizer, fact.prompt, reading).texts,
        positions=positions if fact.injection.when != "decode" else [],
        before=before,
        after=after,
        problems=problems,
        seconds=time.perf_counter() - begun,
    )


def check_relations(
    model: Any, tokenizer: Any, suite: Suite, reading: Reading = DEFAULT_READING
) -> Iterator[Outcome]:
    """Score relations by a study with `replace` at strength 1.

    A relation holds if the source's object comes on top in at least a share `Relation.at_least` of
    its pairs, and in none after an unrelated sentence.

    Args:
        model: Model with NP layers; those that are on are extracted from and injected into.
        tokenizer: Tokenizer of the model.
        suite: Suite with relations.
        reading: How the texts become tokens.

    Raises:
        TransferError: as in `study`.
    """
    begun = time.perf_counter()
    found = study(model, tokenizer, suite, modes=["replace"], strengths=[1.0], **asdict(reading))
    seconds = (time.perf_counter() - begun) / len(suite.relations)
    for relation in suite.relations:
        rows = [
            row for row in found.rows
            if row.relation == relation.name and not row.method.startswith("base")
        ]  # fmt: skip
        pairs = sum(row.injected == NOTHING for row in rows)

        def on_top(injected: str, winner: str, rows: Sequence[Row] = rows) -> int:
            return sum(row.injected == injected and row.winner == winner for row in rows)

        moved, by_control = on_top(SAME, "moved"), on_top(UNRELATED, "moved")
        problems = []
        if not pairs:
            problems.append("the base model knows no two subjects with different objects")
        elif moved < relation.at_least * pairs:
            problems.append(
                f"the source's object is on top in {moved} of {pairs} pairs; at_least is "
                f"{relation.at_least:g}"
            )
        if by_control:
            problems.append(
                f"unrelated sentences put the source's object on top in {by_control} of {pairs} "
                "pairs; none may"
            )
        yield Outcome(
            name=relation.name,
            prompt=relation.prompt,
            source="the prompt about another subject",
            tokens=[],
            positions=[],
            before=f"own object on top in {on_top(NOTHING, 'own')} of {pairs} pairs",
            after=f"source's object on top in {moved} of {pairs} pairs",
            problems=problems,
            seconds=seconds,
        )


def write_junit(outcomes: Sequence[Outcome], path: str | Path, suite: str) -> None:
    """Write outcomes as JUnit XML for CI systems, one test case per fact.

    Raises:
        TransferError: the file cannot be written.
    """
    failed = sum(bool(outcome.problems) for outcome in outcomes)
    root = ElementTree.Element("testsuites")
    cases = ElementTree.SubElement(
        root, "testsuite",
        name=printable(suite), tests=str(len(outcomes)), failures=str(failed), errors="0",
        time=f"{sum(outcome.seconds for outcome in outcomes):.3f}",
    )  # fmt: skip
    for outcome in outcomes:
        case = ElementTree.SubElement(
            cases, "testcase",
            classname=printable(suite), name=printable(outcome.name), time=f"{outcome.seconds:.3f}",
        )  # fmt: skip
        if outcome.problems:  # escaped: XML cannot represent most control characters
            lines = [printable(problem) for problem in outcome.problems]
            ElementTree.SubElement(case, "failure", message=lines[0]).text = "\n".join(lines)
    ElementTree.indent(root)
    target = user_path(path)
    with disk_errors(target, TransferError):
        ElementTree.ElementTree(root).write(target, encoding="utf-8", xml_declaration=True)
