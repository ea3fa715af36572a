"""What injections are expected to do, written in YAML and scored by what the model goes on to say.

facts:
  - name: Paris for Germany           # optional: the prompt, if it is not there
    prompt: The capital of Germany is
    inject:
      from: The capital of France is
      sequence: false                 # true: mean over the text's tokens, as extract-seq
      position: last                  # where it is put, as `positions.parse` reads it
      mode: replace
      strength: 1.0
      when: prefill
    expect: Paris                     # the same as {contains: Paris}; or {begins: Paris}
    must_not_change:                  # the same injection has no effect here
      - Two plus two is
    tokens: 10                        # of each continuation
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, get_args
from xml.etree import ElementTree

import yaml  # type: ignore[import-untyped]

from npt_fast.checkpoint.publish import disk_errors
from npt_fast.errors import DataError, NPTError, TransferError, printable
from npt_fast.paths import user_path
from npt_fast.transfer.extract import extract, tokenize
from npt_fast.transfer.generate import Sampling, continue_ids
from npt_fast.transfer.inject import Mode, When, inject
from npt_fast.transfer.positions import Position, parse


@dataclass(frozen=True, kw_only=True, slots=True)
class Fact:
    """An injection and what it is to do.

    Attributes:
        name: of the fact.
        prompt: that is continued.
        source: text whose modulation is injected.
        sequence: whether it is the mean over the text's tokens, instead of the last one.
        position: see `inject`, likewise `mode`, `strength` and `when`.
        mode: see `inject`.
        strength: see `inject`.
        when: see `inject`.
        begins: how the continuation must begin, or None; leading space does not count.
        contains: what must be in it, or None.
        must_not_change: prompts that go on as they do with nothing injected.
        tokens: of each continuation.
    """

    name: str
    prompt: str
    source: str
    sequence: bool = False
    position: Position = "last"
    mode: Mode = "replace"
    strength: float = 1.0
    when: When = "prefill"
    begins: str | None = None
    contains: str | None = None
    must_not_change: Sequence[str] = ()
    tokens: int = 10


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a fact fared.

    Attributes:
        name: of the fact.
        prompt: of the fact.
        before: how the prompt goes on, nothing injected.
        after: how it goes on, injected.
        problems: one line per expectation that was not met.
        seconds: that it took.
    """

    name: str
    prompt: str
    before: str
    after: str
    problems: list[str]
    seconds: float


class FactsError(DataError):
    """A file of facts is wrong.

    Attributes:
        problems: one line per mistake, each with the file and the fact.
    """

    def __init__(self, problems: list[str]) -> None:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        super().__init__(problems[0] + more)
        self.problems = [printable(problem) for problem in problems]


def check(model: Any, tokenizer: Any, fact: Fact) -> Outcome:
    """Score one fact by greedy generation.

    Args:
        model: with NP layers that are on; all of them are extracted from and injected into.
        tokenizer: of the model.
        fact: what is expected.

    Raises:
        TransferError: the injection cannot be made as asked; the message has the fact's name.
    """
    begun = time.perf_counter()
    sampling = Sampling(tokens=fact.tokens)
    try:
        modulation = extract(
            model, tokenizer, fact.source, position="all" if fact.sequence else -1, reduce="mean"
        )

        def continued(prompt: str, injected: bool) -> str:
            ids, _ = tokenize(tokenizer, prompt)
            if not injected:
                return str(tokenizer.decode(continue_ids(model, ids, sampling)[0]))
            with inject(
                model, modulation, position=fact.position, mode=fact.mode, when=fact.when,
                strength=fact.strength, tokenizer=tokenizer,
            ):  # fmt: skip
                return str(tokenizer.decode(continue_ids(model, ids, sampling)[0]))

        before, after = (continued(fact.prompt, injected) for injected in (False, True))
        problems = []
        if fact.begins is not None and not after.lstrip().startswith(fact.begins.lstrip()):
            problems.append(f"expected to begin with {fact.begins!r}, got {after!r}")
        if fact.contains is not None and fact.contains not in after:
            problems.append(f"expected to contain {fact.contains!r}, got {after!r}")
        for prompt in fact.must_not_change:
            expected, found = (continued(prompt, injected) for injected in (False, True))
            if found != expected:
                problems.append(f"{prompt!r} must go on {expected!r}, got {found!r}")
    except NPTError as error:
        raise TransferError(f"fact {fact.name!r}: {error}") from error
    return Outcome(fact.name, fact.prompt, before, after, problems, time.perf_counter() - begun)


def write_junit(outcomes: Sequence[Outcome], path: str | Path, suite: str) -> None:
    """Outcomes as the JUnit XML that CI systems read: a test case per fact.

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
        if outcome.problems:  # XML has no way to write most control characters: printable
            lines = [printable(problem) for problem in outcome.problems]
            ElementTree.SubElement(case, "failure", message=lines[0]).text = "\n".join(lines)
    ElementTree.indent(root)
    target = user_path(path)
    with disk_errors(target, TransferError):
        ElementTree.ElementTree(root).write(target, encoding="utf-8", xml_declaration=True)


def read_facts(path: str | Path) -> list[Fact]:
    """Read a file of facts; the module's docstring has its form.

    Raises:
        FactsError: it cannot be read, or has mistakes, with all of them.
    """
    path = user_path(path)
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise FactsError([f"{path}: {error.strerror}"]) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise FactsError([f"{path}: is no YAML: {' '.join(str(error).split())}"]) from error
    problems: list[str] = []
    top = _fields(document, _FILE, ["facts"], str(path), problems)
    facts: list[Fact] = []
    for number, given in enumerate(top.get("facts", ()), 1):
        named = given if isinstance(given, dict) else {}
        name = next((n for n in map(named.get, ("name", "prompt")) if isinstance(n, str)), number)
        where = f"{path}: fact {name!r}"
        known = len(problems)
        fact = _fact(given, str(name), where, problems)
        if name in [other.name for other in facts]:
            problems.append(f"{where}: there are two of that name")
        if fact is not None and len(problems) == known:
            facts.append(fact)
    if not problems and not facts:
        problems.append(f"{path}: has no facts")
    if problems:
        raise FactsError(problems)
    return facts


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """`yaml.safe_load`, but a key that is there twice is a mistake: the first would be lost."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.YAMLError(f"{key.value!r} is there twice{key.start_mark}")
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Kind(NamedTuple):
    """What the value of a key may be: in words, and whether a value is one."""

    name: str
    fits: Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_position(value: Any) -> bool:
    if isinstance(value, str):
        try:
            parse(value)
        except TransferError:
            return False
        return True
    return type(value) is int


def _one_of(names: Sequence[str]) -> _Kind:
    return _Kind(f"one of {', '.join(names)}", lambda value: value in names)


_TEXT = _Kind("a text", _is_text)
_FILE = {"facts": _Kind("a list", lambda value: isinstance(value, list))}
_FACT = {
    "name": _TEXT,
    "prompt": _TEXT,
    "inject": _Kind("a mapping with from", lambda value: isinstance(value, dict)),
    "expect": _Kind("a text or a mapping", lambda v: _is_text(v) or isinstance(v, dict)),
    "must_not_change": _Kind(
        "a list of prompts", lambda value: isinstance(value, list) and all(map(_is_text, value))
    ),
    "tokens": _Kind("a whole number from 1 on", lambda value: type(value) is int and value > 0),
}
_INJECT = {
    "from": _TEXT,
    "sequence": _Kind("true or false", lambda value: type(value) is bool),
    "position": _Kind("a number, 2:5, first, last, all, at:WORD or after:WORD", _is_position),
    "mode": _one_of(get_args(Mode)),
    "strength": _Kind("a number", lambda v: type(v) in (int, float) and math.isfinite(v)),
    "when": _one_of(get_args(When)),
}
_EXPECT = {"begins": _TEXT, "contains": _TEXT}


def _fields(
    given: Any, kinds: Mapping[str, _Kind], required: Sequence[str], where: str, problems: list[str]
) -> dict[str, Any]:
    """What of a mapping is right; the rest becomes problems."""
    if not isinstance(given, dict):
        problems.append(f"{where}: must be a mapping with {', '.join(required or kinds)}")
        return {}
    problems.extend(f"{where}: {line}" for line in _mistakes(given, kinds, required))
    return {
        key: given[key] for key, kind in kinds.items() if key in given and kind.fits(given[key])
    }


def _mistakes(
    given: Mapping[Any, Any], kinds: Mapping[str, _Kind], required: Sequence[str]
) -> Iterator[str]:
    for key, value in given.items():
        if key not in kinds:
            near = get_close_matches(str(key), kinds, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(kinds)}"
            yield f"unknown key {key!r}; {hint}"
        elif not kinds[key].fits(value):
            yield f"{key} must be {kinds[key].name}, not {value!r:.80}"
    yield from (f"{key} is missing" for key in required if key not in given)


def _fact(given: Any, name: str, where: str, problems: list[str]) -> Fact | None:
    """A fact, or None if it is too wrong to be one; mistakes go into `problems`."""
    known = len(problems)
    found = _fields(given, _FACT, ["prompt", "inject"], where, problems)
    injection = expected = {}
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
    renamed = {"source" if key == "from" else key: value for key, value in injection.items()}
    rest = {key: found[key] for key in ("prompt", "must_not_change", "tokens") if key in found}
    return Fact(name=name, **rest, **renamed, **expected)
