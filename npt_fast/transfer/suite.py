"""Suites: what `npt-fast check` and `npt-fast study` try, written in YAML.

relations:                            # what the study moves from one subject to another
  - capital                           # a relation of the default suite, by its name
  - name: river
    prompt: The longest river of {} is the     # {} stands for the subject
    paraphrases: ["{}'s longest river is the"]
    pairs: {France: Loire, Brazil: Amazon}     # subjects and objects
    separator: " "                    # between prompt and object; the default
    at_least: 0.5                     # for `check`: pairs whose injected object must be on top
controls:                             # sentences that have nothing to do with any relation
  - Water boils at one hundred degrees
facts: []                             # for `check` alone; see facts.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npt_fast.arguments import check_arguments
from npt_fast.errors import TransferError, suggestion
from npt_fast.paths import user_path
from npt_fast.schema import Kind, is_number, is_text, list_of, mapping_of, shown
from npt_fast.transfer.facts import Fact, parse_facts
from npt_fast.transfer.strict_yaml import MAX_MISTAKES, WORDS, MistakesError, fields, load

DEFAULT = Path(__file__).with_name("default_suite.yaml")
"""The default suite: seven relations, and controls."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Relation:
    """A relation between subjects and objects, such as countries and their capitals.

    Attributes:
        name: Name of the relation.
        prompt: Text with ``{}`` for the subject, which the object follows.
        pairs: Object of each subject.
        paraphrases: The same prompt in other words.
        separator: What stands between prompt and object; empty after a quote, or in languages
            without spaces.
        at_least: Share of pairs, from 0 to 1, whose injected object must be on top in a check.
    """

    name: str
    prompt: str
    pairs: Mapping[str, str]
    paraphrases: Sequence[str] = ()
    separator: str = " "
    at_least: float = 0.5

    def about(self, subject: str) -> str:
        """The prompt about a subject."""
        return filled(self.prompt, subject)


@dataclass(frozen=True, kw_only=True, slots=True)
class Suite:
    """Relations with controls, and facts.

    Attributes:
        relations: Relations of a study.
        controls: Unrelated sentences; not empty if there are relations.
        facts: Injections and their expected effect, for `check`.
    """

    relations: Sequence[Relation] = ()
    controls: Sequence[str] = ()
    facts: Sequence[Fact] = ()

    def named(self, names: Sequence[str]) -> Sequence[Relation]:
        """The relations of these names; all if there are none.

        Raises:
            TransferError: there is no relation of such a name.
        """
        known = {relation.name: relation for relation in self.relations}
        for name in names:
            if name not in known:
                raise TransferError(_unknown(name, known))
        return [known[name] for name in names or known]


def filled(template: str, subject: str) -> str:
    """A template with the subject in place of ``{}``; other braces stay as they are."""
    return template.replace("{}", subject)


def default_suite() -> Suite:
    """The suite in the package."""
    return read_suite(DEFAULT)


@check_arguments
def read_suite(path: str | Path) -> Suite:
    """Read a suite, whose form the docstring of this module shows.

    Relations without controls get those of the default suite.

    Raises:
        DataError: the file cannot be read or has mistakes; all of them are listed.
    """
    path = user_path(path)
    problems: list[str] = []
    top = fields(load(path), _FILE, [], str(path), problems)
    relations = _relations(top.get("relations", ()), str(path), problems)
    facts = parse_facts(top.get("facts", ()), str(path), problems)
    if not problems and not relations and not facts:
        problems.append(f"{path}: has no facts and no relations")
    if problems:
        raise MistakesError(problems)
    controls = top.get("controls", ())
    if relations and not controls:
        controls = default_suite().controls
    return Suite(relations=relations, controls=controls, facts=facts)


def _relations(given: Sequence[Any], path: str, problems: list[str]) -> list[Relation]:
    """The relations of a list; mistakes are added to `problems`."""
    found: dict[str, Relation] = {}
    for number, entry in enumerate(given, 1):
        name = entry.get("name") if isinstance(entry, dict) else entry
        where = f"{path}: relation {shown(name if isinstance(name, str) else number)}"
        relation = (
            _built_in(entry, where, problems)
            if isinstance(entry, str)
            else _relation(entry, where, problems)
        )
        if relation is not None:
            if relation.name in found:
                problems.append(f"{where}: another relation has that name")
            found[relation.name] = relation
        if len(problems) > MAX_MISTAKES:
            break
    return list(found.values())


def _built_in(name: str, where: str, problems: list[str]) -> Relation | None:
    known = {relation.name: relation for relation in default_suite().relations}
    if name not in known:
        problems.append(f"{where}: {_unknown(name, known)}; or a mapping with prompt and pairs")
    return known.get(name)


def _unknown(name: str, known: Mapping[str, Relation]) -> str:
    near = suggestion(name[:40], known) or f"; there are {', '.join(known)}"
    return f"unknown relation {shown(name)}{near}"


def _relation(given: Any, where: str, problems: list[str]) -> Relation | None:
    before = len(problems)
    found = fields(given, _RELATION, ["name", "prompt", "pairs"], where, problems)
    return Relation(**found) if len(problems) == before else None


_TEMPLATE = Kind("a text with {} for the subject", lambda value: is_text(value) and "{}" in value)
_PAIRS = mapping_of(WORDS, WORDS)
_LIST = Kind("a list", lambda value: isinstance(value, list))
_FILE = {
    "facts": _LIST,
    "relations": _LIST,
    "controls": Kind("a list of texts, not empty", lambda v: list_of(WORDS).fits(v) and bool(v)),
}
_RELATION = {
    "name": WORDS,
    "prompt": _TEMPLATE,
    "pairs": Kind(
        "a mapping of two or more subjects to objects, all texts",
        lambda value: _PAIRS.fits(value) and len(value) > 1,
    ),
    "paraphrases": Kind("a list of texts with {} for the subject", list_of(_TEMPLATE).fits),
    "separator": Kind("a text", is_text),
    "at_least": Kind("a number from 0 to 1", lambda v: is_number(v) and 0 <= v <= 1),
}
