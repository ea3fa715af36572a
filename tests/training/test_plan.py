"""Plans: each set of layers against `npt.evaluate`, and orders against known figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import npt_fast as npt
from npt_fast.errors import ModelError, OptionError
from npt_fast.training import plan as module
from npt_fast.training.evaluation import Evaluation, Figures
from npt_fast.training.plan import Measured, Plan
from tests.training import tiny
from tests.training.texts import random_texts, write_texts

LAYERS = [0, 1, 2, 3]
KL = {0: 0.5, 1: math.nan, 2: 0.25, 3: 0.5}
"""What `known` says of each layer alone; layers together have the sum."""


@pytest.fixture
def model() -> Any:
    found = tiny.model(vocab_size=258, initializer_range=0.2)
    return npt.convert(found, npt.NPTConfig(layers=LAYERS, rank=2, init="improved"))


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The layers that were on in each evaluation, which gives figures from `KL`."""
    seen: list[list[int]] = []

    def known(model: Any, *given: Any, **options: Any) -> Callable[[], Evaluation]:
        def evaluate() -> Evaluation:
            seen.append(on(model))
            kl = sum(KL[layer] for layer in seen[-1])
            return Evaluation.of(Figures(7, 2.0, 1.0, 2.0, kl, 1.0, 0.0, {}), {})

        return evaluate

    monkeypatch.setattr(module, "open_evaluation", known)
    return seen


def on(model: Any) -> list[int]:
    return [status.layer for status in npt.status(model) if status.enabled]


def planned(model: Any, **options: Any) -> Plan:
    return npt.plan(model, tiny.tokenizer(), "a.txt", **options)


def test_every_figure_is_that_of_evaluate(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("npt_fast.training.other_texts._MOST_TOKENS", 256)  # to be quick
    source = write_texts(tmp_path / "a.jsonl", random_texts(40))
    tokenizer = tiny.bos_tokenizer()
    with torch.no_grad():  # so that the order is not that of the numbers
        model.model.layers[2].np_component.w_down.mul_(20)
    options: dict[str, Any] = {"windows": 3, "max_length": 48, "special_tokens": False}
    found = npt.plan(model, tokenizer, source, layers=[1, 3, 2], counts=[2], **options)

    def expected(layers: Sequence[int]) -> Evaluation:
        with npt.disabled(model, [layer for layer in LAYERS if layer not in layers]):
            return npt.evaluate(model, tokenizer, source, **options)

    def check(measured: Measured, layers: Sequence[int]) -> float:
        figures = expected(layers)
        assert measured.layers == tuple(sorted(layers))
        assert measured.tokens == figures.tokens == 3 * 48
        assert measured.kl == figures.kl
        assert measured.perplexity_ratio == figures.perplexity_ratio
        assert measured.worst == figures.worst and len(measured.worst) == 2
        assert measured.nbytes == len(layers) * npt.status(model)[0].nbytes
        assert measured.seconds > 0
        return figures.kl

    alone = {one.layers[0]: check(one, one.layers) for one in found.alone}
    assert sorted(alone) == [1, 2, 3]
    assert list(found.order) == sorted(alone, key=alone.__getitem__)
    assert list(found.order) not in ([1, 2, 3], [3, 2, 1])
    (two, _) = found.prefixes
    check(two.planned, found.order[:2])
    assert (found.data, found.seed) == (str(source), 42)
    assert on(model) == LAYERS


def test_the_order_and_its_first_layers(model: Any, evaluated: list[list[int]]) -> None:
    """A layer whose KL is not finite comes last, and of equal ones the lower comes first."""
    found = planned(model, counts=[10, 3, 1, 3])
    assert found.order == (2, 0, 3, 1)
    assert [one.kl for one in found.alone] == [0.25, 0.5, 0.5, None]
    assert [prefix.count for prefix in found.prefixes] == [1, 3, 4]
    for prefix in found.prefixes:
        for order, measured in (
            (found.order, prefix.planned), (found.random_order, prefix.control)
        ):  # fmt: skip
            assert measured.layers == tuple(sorted(order[: prefix.count]))
    assert found.prefixes[1].planned.kl == 1.25
    # single layers and all layers are shared by both orders
    assert evaluated[:4] == [[0], [1], [2], [3]] and len(evaluated) == 4 + 2 + 1


def test_the_control_is_a_matter_of_its_seed(model: Any, evaluated: list[list[int]]) -> None:
    orders = [planned(model, seed=seed).random_order for seed in range(8)]
    assert orders == [planned(model, seed=seed).random_order for seed in range(8)]
    assert len(set(orders)) > 4 and all(sorted(order) == LAYERS for order in orders)


def test_layers_that_are_off_are_left_out_and_stay_off(
    model: Any, evaluated: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with npt.disabled(model, [0]):
        found = planned(model)
        assert found.order == (2, 3, 1) and not any(0 in layers for layers in evaluated)
        assert on(model) == [1, 2, 3]
        with pytest.raises(ModelError, match=r"layer 0 is no NP layer that is on; .*\[1, 2, 3\]"):
            planned(model, layers=[1, 0])
    monkeypatch.setattr(module, "open_evaluation", lambda *given, **options: lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        planned(model)
    assert on(model) == LAYERS


def test_progress(model: Any, evaluated: list[list[int]]) -> None:
    told: list[tuple[str, int, int]] = []
    planned(model, layers=[0, 2], progress=lambda *line: told.append(line))
    together = ("Layers together", 1, 1)
    assert told == [("Each layer alone", 1, 2), ("Each layer alone", 2, 2), together]


def test_what_cannot_be_planned(model: Any) -> None:
    with pytest.raises(OptionError, match="there is no layer 9, the model has 4 layers"):
        planned(model, layers=[1, 9])
    with npt.disabled(model), pytest.raises(ModelError, match="no NP layers that are on"):
        planned(model)
    with pytest.raises(ModelError, match="no NP layers that are on"):
        planned(npt.unload(model))
    npt.convert(model, npt.NPTConfig(layers=LAYERS, rank=2))
    for wrong, problem in (
        ({"counts": [1, 0]}, "counts must be a list, each item a whole number from 1 on"),
        ({"layers": []}, "layers must name a layer"),
        ({"layers": [1, 1]}, "names a layer twice"),
    ):
        with pytest.raises(OptionError, match=problem):
            planned(model, **wrong)
