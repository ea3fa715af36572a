"""Facts: injections and their expected effect, the list `facts` of a suite file.

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

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from npt_fast.config import Injection, InjectionMode, InjectionTime
from npt_fast.errors import TransferError
from npt_fast.schema import (
    FLAG,
    MAPPING,
    NUMBER,
    POSITIVE,
    WHOLE,
    Kind,
    is_text,
    list_of,
    one_of,
    shown,
)
from npt_fast.transfer.generate import MOST_TOKENS
from npt_fast.transfer.positions import parse
from npt_fast.transfer.strict_yaml import MAX_MISTAKES, WORDS, fields


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


def parse_facts(given: Sequence[Any], where: str, problems: list[str]) -> list[Fact]:
    """The facts of a list; mistakes are added to `problems`, each behind `where`, the file."""
    facts: dict[str | int, Fact] = {}
    for number, entry in enumerate(given, 1):
        named = entry if isinstance(entry, dict) else {}
        name = next((n for n in map(named.get, ("name", "prompt")) if isinstance(n, str)), number)
        place = f"{where}: fact {shown(name)}"
        known = len(problems)
        fact = _fact(entry, str(name), place, problems)
        if name in facts:
            problems.append(f"{place}: another fact has that name")
        if fact is not None:
            facts[name] = fact
        if len(problems) > max(known, MAX_MISTAKES):
            break
    return list(facts.values())


def _is_position(value: Any) -> bool:
    if isinstance(value, str):
        try:
            parse(value)
        except TransferError:
            return False
        return is_text(value)
    return WHOLE.fits(value) or (bool(value) and list_of(WHOLE).fits(value))


_FACT = {
    "name": WORDS,
    "prompt": WORDS,
    "inject": Kind("a mapping with from", MAPPING.fits),
    "expect": Kind("a text or a mapping", lambda v: WORDS.fits(v) or MAPPING.fits(v)),
    "must_not_change": Kind("a list of prompts", list_of(WORDS).fits),
    "tokens": Kind(
        f"a whole number from 1 to {MOST_TOKENS:,}",
        lambda value: POSITIVE.fits(value) and value <= MOST_TOKENS,
    ),
}
_INJECT = {
    "from": WORDS,
    "sequence": FLAG,
    "position": Kind(
        "a number, a list of them, 2:5, first, last, last_3, all, at:WORD or after:WORD",
        _is_position,
    ),
    "mode": one_of(get_args(InjectionMode)),
    "strength": NUMBER,
    "when": one_of(get_args(InjectionTime)),
}
_EXPECT = {"begins": WORDS, "contains": WORDS}


def _fact(given: Any, name: str, where: str, problems: list[str]) -> Fact | None:
    """A fact, or None if it has mistakes, which are added to `problems`."""
    known = len(problems)
    found = fields(given, _FACT, ["prompt", "inject"], where, problems)
    injection: dict[str, Any] = {}
    expected: dict[str, Any] = {}
    if "inject" in found:
        injection = fields(found["inject"], _INJECT, ["from"], f"{where}: inject", problems)
    if "expect" in found:
        wanted = found["expect"]
        wanted = {"contains": wanted} if isinstance(wanted, str) else wanted
        expected = fields(wanted, _EXPECT, [], f"{where}: expect", problems)
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
