"""Sessions: the shelf, operations, undo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import npt_fast as npt
from npt_fast.config import Injection
from npt_fast.errors import ModelError, TransferError
from npt_fast.transfer.compare import compare
from npt_fast.transfer.generate import Sampling
from npt_fast.transfer.session import Session, fingerprint
from tests.training import tiny


def weights(session: Session) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in session.model.state_dict().items()}


def test_needs_np_layers() -> None:
    with pytest.raises(ModelError, match="no NPT layers"):
        Session(tiny.model(), tiny.tokenizer())


def test_operations_are_those_of_the_library(session: Session) -> None:
    one = session.extract("a", "first", position=-2)
    sequence = session.extract("s", "first", sequence=True)
    model, tokenizer = session.model, session.tokenizer
    assert fingerprint(one) == fingerprint(npt.extract(model, tokenizer, "first", position=3))
    whole = npt.extract(model, tokenizer, "first", position="all", reduce="mean")
    assert fingerprint(sequence) == fingerprint(whole)
    session.track(["x"])
    sampling = Sampling(tokens=3)
    found = session.inject("a", "other", Injection(), sampling=sampling).comparison
    expected = compare(
        model, tokenizer, one, "other", Injection(), sampling=sampling, tracked=["x"]
    )
    for name in (
        "no_injection",
        "injected",
        "top",
        "no_injection_top",
        "tracked",
        "kl",
        "kls",
        "positions",
    ):
        assert getattr(found, name) == getattr(expected, name), name
    assert session.predict("other").top == [(t.text, t.before) for t in expected.no_injection_top]


def test_everything_can_be_undone(two: Session) -> None:
    before = two.state
    changes: list[Callable[[], object]] = [
        lambda: two.extract("a", "another"),
        lambda: two.delete("b"),
        lambda: two.calculate("c", "-a"),
        lambda: two.track(["x", "y"]),
        lambda: two.untrack(["x"]),
        lambda: two.activate([2]),
        lambda: two.set(seed=3),
    ]
    states = []
    for change in changes:
        states.append(two.state)
        change()
        assert two.state != states[-1]
    enabled = [status.enabled for status in npt.status(two.model)]
    assert enabled == [False, True]
    for state in reversed(states):
        two.undo()
        assert two.state == state
    assert two.state == before
    assert all(status.enabled for status in npt.status(two.model))


def test_baking_is_undone_bit_for_bit(two: Session) -> None:
    original = weights(two)
    plain = two.predict("text").top
    two.bake("a", 2.0)
    assert two.predict("text").top != plain
    two.bake("b")
    two.track(["x"])
    assert two.bakes == 2
    for _ in range(3):
        two.undo()
    assert all(torch.equal(tensor, original[name]) for name, tensor in weights(two).items())
    assert two.predict("text").top == plain
    two.bake("a")
    two.bake("b")
    shelf = two.state
    two.reset()
    assert two.bakes == 0 and not two.state.shelf
    assert all(torch.equal(tensor, original[name]) for name, tensor in weights(two).items())
    assert two.undo() == "reset"
    assert two.state == shelf
    with pytest.raises(TransferError, match="nothing to undo"):
        two.undo()


def test_layers_that_are_off(two: Session) -> None:
    two.activate([2])
    found = two.inject("a", "text", Injection())
    assert found.comparison.layers == [2] and found.left_out == [1]
    part = two.extract("c", "first")
    assert list(part.layers) == [2]
    two.activate([1])
    with pytest.raises(TransferError, match=r"'c' changes layers \[2\], which are off; on are"):
        two.inject("c", "text", Injection())
    with pytest.raises(TransferError, match="layer 3 is not loaded; loaded are 1, 2"):
        two.activate([1, 3])
    assert two.state.layers == (1,)


@pytest.mark.parametrize(
    ("make", "mode", "strength", "reason"),
    [
        ("a", "add", 0.0, "strength is 0"),
        ("own", "replace", 1.0, "is the token's own"),
        ("zero", "exact-add", 1.0, "modulation is zero"),
        ("a", "replace", 1.0, ""),
    ],
)
def test_no_effect_is_explained(
    two: Session, make: str, mode: Any, strength: float, reason: str
) -> None:
    two.extract("own", "text")
    two.calculate("zero", "0 * a")
    found = two.inject(make, "text", Injection(mode=mode, strength=strength))
    assert (reason in found.no_effect) if reason else found.no_effect == ""


def test_names_are_suggested(two: Session) -> None:
    two.extract("knowledge", "text")
    with pytest.raises(TransferError, match="'knowlege'; did you mean 'knowledge'"):
        two.inject("knowlege", "text", Injection())
