"""How a fact is scored, and how scores are written for CI."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

import npt_fast as npt
from npt_fast.config import Injection
from npt_fast.errors import TransferError
from npt_fast.hf.tokenizer import PLAIN, Reading
from npt_fast.transfer.check import Outcome, check, write_junit
from npt_fast.transfer.facts import Fact
from tests.transfer import models


class Tokenizer:
    """One letter per token, without loss when ids are decoded."""

    def __call__(self, text: str, **options: Any) -> Any:
        return models.tokenizer(text, **options)

    def decode(self, ids: Any, **options: Any) -> str:
        letters = [(models.tokenizer.decode([int(i)]), int(i)) for i in ids]
        return "".join(
            a if a.isascii() and a.isprintable() else chr(0x4E00 + i) for a, i in letters
        )


tokenizer = Tokenizer()


@pytest.fixture(scope="module")
def model() -> Any:
    return models.converted()


def said(model: Any, prompt: str, source: str = "", tokens: int = 6, **how: Any) -> str:
    """The continuation of `generate`, with an injection if there is a source."""
    inputs = models.left_padded([prompt])
    if not source:
        found, _ = models.greedy(model, inputs, tokens)
    else:
        everywhere = how.pop("sequence", False)
        modulation = npt.extract(
            model, tokenizer, source,
            position="all" if everywhere else "last", reduce="mean",
        )  # fmt: skip
        with npt.inject(model, modulation, tokenizer=tokenizer, **how):
            found, _ = models.greedy(model, inputs, tokens)
    return tokenizer.decode(found[0])


HOW: list[dict[str, Any]] = [
    {},
    {"sequence": True},
    {"position": "at:use", "strength": 4.0},
    {"mode": "exact-add", "strength": -2.0},
    {"when": "both"},
]


@pytest.mark.parametrize("how", HOW, ids=str)
def test_the_continuation_is_that_of_generate(model: Any, how: dict[str, Any]) -> None:
    fact = Fact(
        name="x",
        prompt=models.TEXT,
        source=models.SOURCE,
        tokens=6,
        contains="",
        sequence=how.get("sequence", False),
        injection=Injection(**{k: v for k, v in how.items() if k != "sequence"}),
    )
    outcome = check(model, tokenizer, fact)
    assert outcome.before == said(model, models.TEXT)
    assert outcome.after == said(model, models.TEXT, models.SOURCE, **how)
    assert outcome.before != outcome.after, "an injection without effect proves nothing"
    assert outcome.problems == [] and outcome.seconds > 0


def test_expectations(model: Any) -> None:
    after = said(model, models.TEXT, models.SOURCE)
    given: dict[str, Any] = {"name": "x", "prompt": models.TEXT, "source": models.SOURCE}

    def problems(**expected: Any) -> list[str]:
        return check(model, tokenizer, Fact(**given, tokens=6, **expected)).problems

    assert problems(begins=after[:2], contains=after[2:4]) == []
    assert problems(begins=" " + after.lstrip()[:2]) == []
    assert problems(begins=after[1:]) == [f"expected to begin with {after[1:]!r}, got {after!r}"]
    assert problems(contains="nowhere") == [f"expected to contain 'nowhere', got {after!r}"]
    assert len(problems(begins="nowhere", contains="nowhere")) == 2
    # the prompt changes; the source does not, as the modulation is its own
    before = said(model, models.TEXT)
    assert problems(must_not_change=[models.SOURCE]) == []
    assert problems(must_not_change=[models.SOURCE, models.TEXT]) == [
        f"{models.TEXT!r} must continue with {before!r}, got {after!r}"
    ]


def test_an_injection_that_cannot_be_made_names_the_fact(model: Any) -> None:
    there = Injection(position="at:q")
    fact = Fact(name="mine", prompt="abc", source="x", injection=there, contains="")
    with pytest.raises(TransferError, match="fact 'mine': 'q' does not occur in 'abc'"):
        check(model, tokenizer, fact)
    fact = Fact(name="mine", prompt="abq", source="x", injection=there, must_not_change=["abc"])
    with pytest.raises(TransferError, match="fact 'mine': 'q' does not occur in 'abc'"):
        check(model, tokenizer, fact)


def test_junit(tmp_path: Path) -> None:
    outcomes = [
        Outcome("fine", "p", "s", ["p"], [0], "a", "b", [], 0.5),
        Outcome(
            "<bad>\x00", "p", "s", ["p"], [0], "a", "b", ["got '\x1b' & \"<x>\"", "second"], 1.0
        ),
    ]
    write_junit(outcomes, tmp_path / "a.xml", "facts.yaml")
    suite = ElementTree.parse(tmp_path / "a.xml").getroot()[0]
    assert suite.attrib == {
        "name": "facts.yaml", "tests": "2", "failures": "1", "errors": "0", "time": "1.500",
    }  # fmt: skip
    assert [case.get("name") for case in suite] == ["fine", "<bad>\\x00"]
    assert [len(case) for case in suite] == [0, 1]
    assert suite[1][0].text == "got '\\x1b' & \"<x>\"\nsecond"
    with pytest.raises(TransferError, match="none"):
        write_junit(outcomes, tmp_path / "none" / "a.xml", "x")


def test_nothing_of_the_model_changes(model: Any) -> None:
    before = [p.clone() for p in model.parameters()]
    hooks = sum(len(part._forward_hooks) for part in model.modules())
    fact = Fact(name="x", prompt="abc", source="xyz", must_not_change=["q"])
    check(model, tokenizer, fact)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert sum(len(part._forward_hooks) for part in model.modules()) == hooks


def test_bos_is_read_and_counted() -> None:
    model, tokenizer = models.converted(vocab_size=258), models.bos_tokenizer
    fact = Fact(name="x", prompt="abc", source="xyz", contains="", tokens=4)
    inputs = tokenizer("abc", return_tensors="pt")
    source = npt.extract(model, tokenizer, "xyz")
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    found = check(model, tokenizer, fact)
    assert found.before == tokenizer.decode(model.generate(**inputs, **options)[0, 4:])
    with npt.inject(model, source):
        assert found.after == tokenizer.decode(model.generate(**inputs, **options)[0, 4:])
    assert (found.tokens, found.positions) == (["<bos>", *"abc"], [3])
    assert found.source == "\"xyz\" at 3 'z'"
    alone = check(model, tokenizer, fact, PLAIN)
    assert (alone.tokens, alone.positions) == (list("abc"), [2])
    chat = check(model, tokenizer, fact, Reading(chat=True))
    assert chat.tokens == ["<bos>", *"user:abc;me:"] and chat.source == "\"xyz\" at 12 ':'"
