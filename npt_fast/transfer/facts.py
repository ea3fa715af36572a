"""Facts: injections and their expected effect, written in YAML.

facts:
  - name: Paris for Germany           # the prompt, if left out
    prompt: The capital of Germany is
    inject:
      from: The capital of France is
      sequence: false                 # true: mean over all tokens of the text, as extract-seq
      position: last                  # tokens of the prompt, in the notation of positions.py
      mode: replace
      strength: 1.0
      when: prefill
    expect: Paris                     # short for {contains: Paris}; {begins: Paris} also works
    must_not_change:                  # prompts that the same injection must not change
      - Two plus two is
    tokens: 10                        # length of each continuation
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import yaml  # type: ignore[import-untyped]

from npt_fast.checkpoint.source_file import read_file
from npt_fast.config import Injection, InjectionMode, InjectionTime
from npt_fast.errors import CheckpointError, DataError, TransferError, printable
from npt_fast.paths import user_path
from npt_fast.schema import (
    FLAG,
    MAPPING,
    NUMBER,
    POSITIVE,
    WHOLE,
    Kind,
    is_text,
    list_of,
    mistakes,
    one_of,
    shown,
)
from npt_fast.transfer.generate import MOST_TOKENS
from npt_fast.transfer.positions import parse

_MAX_BYTES = 1_000_000
_MAX_NODES = 30_000  # keys and values; PyYAML parses as many in about two seconds
_MAX_DEPTH = 10  # levels of nesting; a correct file has 5
_MAX_DIGITS = 40  # Python converts long integers in quadratic time
_MAX_MISTAKES = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Fact:
    """An injection and its expected effect.

    Attributes:
        name: Name of the fact.
        prompt: Text that is continued.
        source: Text whose modulation is injected.
        sequence: Take the mean over all tokens of the source instead of its last token.
        injection: Position, mode, strength and time of the injection.
        begins: Required beginning of the continuation, not counting leading space; None for any.
        contains: Text that the continuation must contain; None for any.
        must_not_change: Prompts whose continuation must be the same with and without injection.
        tokens: Length of each continuation, in tokens.
    """

    name: str
    prompt: str
    source: str
    sequence: bool = False
    injection: Injection = field(default_factory=Injection)
    begins: str | None = None
    contains: str | None = None
    must_not_change: Sequence[str] = ()
    tokens: int = 10


class FactsError(DataError):
    """A file of facts has mistakes.

    Attributes:
        problems: One line per mistake, each naming the file and the fact.
    """

    def __init__(self, problems: list[str]) -> None:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        super().__init__(problems[0] + more)
        self.problems = [printable(problem) for problem in problems]


def read_facts(path: str | Path) -> list[Fact]:
    """Read a file of facts, whose form the docstring of this module shows.

    Raises:
        FactsError: the file cannot be read or has mistakes; all of them are listed.
    """
    path = user_path(path)
    try:
        text = read_file(path, _MAX_BYTES, follow_links=True).decode("utf-8")
        document = yaml.load(text, Loader=_Loader)
    except CheckpointError as error:
        raise FactsError([str(error)]) from None
    except (yaml.YAMLError, ValueError) as error:
        problem = " ".join(str(error).split())
        raise FactsError([f"{path}: is not valid YAML: {problem:.300}"]) from error
    problems: list[str] = []
    top = _fields(document, _FILE, ["facts"], str(path), problems)
    facts: dict[str | int, Fact] = {}
    for number, given in enumerate(top.get("facts", ()), 1):
        named = given if isinstance(given, dict) else {}
        name = next((n for n in map(named.get, ("name", "prompt")) if isinstance(n, str)), number)
        where = f"{path}: fact {shown(name)}"
        known = len(problems)
        fact = _fact(given, str(name), where, problems)
        if name in facts:
            problems.append(f"{where}: another fact has that name")
        if fact is not None:
            facts[name] = fact
        if len(problems) > max(known, _MAX_MISTAKES):
            break
    if not problems and not facts:
        problems.append(f"{path}: has no facts")
    if problems:
        raise FactsError(problems)
    return list(facts.values())


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """`yaml.SafeLoader` without what makes a small file expensive or ambiguous.

    Aliases and merge keys let a few bytes stand for gigabytes, a long integer takes quadratic time,
    and of two equal keys the first would be lost.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        # looked at before the node is built, so that limits come before memory
        event = self.peek_event()
        self._nodes += 1
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError(
                f"*{event.anchor:.40}: write the value out again{event.start_mark}"
            )
        if event.tag is not None:
            raise yaml.YAMLError(f"{event.tag:.40}: leave tags out{event.start_mark}")
        if self._depth == _MAX_DEPTH:
            raise yaml.YAMLError(f"nested more than {_MAX_DEPTH} deep{event.start_mark}")
        if self._nodes > _MAX_NODES:
            raise yaml.YAMLError(f"more than {_MAX_NODES:,} values; split the file")
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        number = node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        if number and len(node.value) > _MAX_DIGITS:
            raise yaml.YAMLError(f"a number of {len(node.value):,} characters{node.start_mark}")
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                what = (
                    f"{key.value!r:.40}"
                    if isinstance(key, yaml.ScalarNode)
                    else "a list or mapping"
                )
                raise yaml.YAMLError(
                    f"{what}: a key must be a text; put it in quotes{key.start_mark}"
                )
            if key.value in seen:
                raise yaml.YAMLError(f"{key.value!r:.40} is there twice{key.start_mark}")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _is_position(value: Any) -> bool:
    if isinstance(value, str):
        try:
            parse(value)
        except TransferError:
            return False
        return is_text(value)
    return WHOLE.fits(value) or (bool(value) and list_of(WHOLE).fits(value))


_WORDS = Kind("a text", lambda value: is_text(value) and bool(value))
_FILE = {"facts": Kind("a list", lambda value: isinstance(value, list))}
_FACT = {
    "name": _WORDS,
    "prompt": _WORDS,
    "inject": Kind("a mapping with from", MAPPING.fits),
    "expect": Kind("a text or a mapping", lambda v: _WORDS.fits(v) or MAPPING.fits(v)),
    "must_not_change": Kind("a list of prompts", list_of(_WORDS).fits),
    "tokens": Kind(
        f"a whole number from 1 to {MOST_TOKENS:,}",
        lambda value: POSITIVE.fits(value) and value <= MOST_TOKENS,
    ),
}
_INJECT = {
    "from": _WORDS,
    "sequence": FLAG,
    "position": Kind(
        "a number, a list of them, 2:5, first, last, last_3, all, at:WORD or after:WORD",
        _is_position,
    ),
    "mode": one_of(get_args(InjectionMode)),
    "strength": NUMBER,
    "when": one_of(get_args(InjectionTime)),
}
_EXPECT = {"begins": _WORDS, "contains": _WORDS}


def _fields(
    given: Any, kinds: Mapping[str, Kind], required: Sequence[str], where: str, problems: list[str]
) -> dict[str, Any]:
    """The correct entries of a mapping; mistakes are added to `problems`."""
    if not isinstance(given, dict):
        problems.append(f"{where}: must be a mapping with {', '.join(required or kinds)}")
        return {}
    found = islice(mistakes(given, kinds, required, closed=True), _MAX_MISTAKES)
    problems.extend(f"{where}: {line}" for line in found)
    return {
        key: given[key] for key, kind in kinds.items() if key in given and kind.fits(given[key])
    }


def _fact(given: Any, name: str, where: str, problems: list[str]) -> Fact | None:
    """A fact, or None if it has mistakes, which are added to `problems`."""
    known = len(problems)
    found = _fields(given, _FACT, ["prompt", "inject"], where, problems)
    injection: dict[str, Any] = {}
    expected: dict[str, Any] = {}
    if "inject" in found:
        injection = _fields(found["inject"], _INJECT, ["from"], f"{where}: inject", problems)
    if "expect" in found:
        wanted = found["expect"]
        wanted = {"contains": wanted} if isinstance(wanted, str) else wanted
        expected = _fields(wanted, _EXPECT, [], f"{where}: expect", problems)
    if len(problems) == known and not expected and not found.get("must_not_change"):
        problems.append(f"{where}: expects nothing; give expect or must_not_change")
    if len(problems) > known:
        return None
    rest = {key: found[key] for key in ("prompt", "must_not_change", "tokens") if key in found}
    source, sequence = injection.pop("from"), injection.pop("sequence", False)
    return Fact(
        name=name, source=source, sequence=sequence, injection=Injection(**injection),
        **rest, **expected,
    )  # fmt: skip
