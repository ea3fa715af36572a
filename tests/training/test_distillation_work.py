"""What a training step runs: no layer that no loss needs, and none whose output is cached."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from npt_fast.hf.convert import decoder_layers
from npt_fast.training.curriculum import Stage
from npt_fast.training.distillation import Distillation
from tests.training.truth import MIXED, STUDENT, TEACHER, batch, converted, llama, outcome, same

pytestmark = pytest.mark.usefixtures("one_thread")


@contextmanager
def watched(model: Any) -> Iterator[dict[str, list[Any]]]:
    """Record the calls of layers, as base layers and as trained ones, and of what is in them.

    ``layers`` has their indices in the order of the calls, a trained one with an asterisk.
    """
    calls: dict[str, list[Any]] = {"layers": [], "attention": [], "lm_head": []}
    handles = []
    for index, layer in enumerate(decoder_layers(model)):

        def on_layer(layer: Any, args: Any, kwargs: Any, index: int = index) -> None:
            calls["layers"].append(f"{index}*" if "scaffold" in kwargs else f"{index}")

        def on_attention(module: Any, args: Any, index: int = index) -> None:
            calls["attention"].append(index)

        handles.append(layer.register_forward_pre_hook(on_layer, with_kwargs=True))
        handles.append(layer.get_submodule("self_attn").register_forward_pre_hook(on_attention))
    head = model.get_output_embeddings()
    handles.append(head.register_forward_pre_hook(lambda *_: calls["lm_head"].append("head")))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize(
    ("layers", "stage", "layer_calls", "attention_calls"),
    [
        # a single layer needs no student pass in any stage, and its attention is known
        pytest.param([2], TEACHER, "0 1 2 2*", "0 1 2", id="lone-teacher"),
        pytest.param([2], MIXED, "0 1 2 2*", "0 1 2", id="lone-mixed"),
        pytest.param([2], STUDENT, "0 1 2 2*", "0 1 2", id="lone-student"),
        pytest.param([0], STUDENT, "0 0*", "0", id="first-student"),
        # in the teacher stage no trained layer reads the output of another one
        pytest.param([1, 3], TEACHER, "0 1 2 3 1* 3*", "0 1 2 3", id="teacher"),
        pytest.param([0, 2, 4], TEACHER, "0 1 2 3 4 0* 2* 4*", "0 1 2 3 4", id="three-teacher"),
        # the student starts at the first trained layer, whose attention is the teacher's
        pytest.param([1, 3], MIXED, "0 1 2 3 1* 2 3*", "0 1 2 3 2 3", id="mixed"),
        pytest.param([1, 3], STUDENT, "0 1 2 3 1* 2 3*", "0 1 2 3 2 3", id="student"),
    ],
)
def test_no_layer_is_run_that_no_loss_needs(
    layers: list[int], stage: Stage, layer_calls: str, attention_calls: str
) -> None:
    model = converted(llama(), layers)
    step = Distillation(model, reg_weight=0.2)
    with watched(model) as calls:
        step(**batch(), stage=stage, measure_norms=True).total.backward()
    assert calls["layers"] == layer_calls.split()
    assert calls["attention"] == [int(index) for index in attention_calls.split()]
    assert calls["lm_head"] == []


@pytest.mark.parametrize(
    ("stage", "attention_calls"),
    [
        pytest.param(
            TEACHER, "0 1 2 3 4 2 4", id="teacher"
        ),  # attention is known in trained layers only
        pytest.param(STUDENT, "0 1 2 3 4 2 3 4", id="student"),
    ],
)
def test_logits_need_all_layers_from_the_first_trained_one(
    stage: Stage, attention_calls: str
) -> None:
    model = converted(llama(), [1, 3])
    step = Distillation(model, fidelity_weight=0.7)
    with watched(model) as calls:
        losses = step(**batch(), stage=stage)
    assert calls["layers"] == "0 1 2 3 4 1* 2 3* 4".split()
    assert calls["attention"] == [int(index) for index in attention_calls.split()]
    assert calls["lm_head"] == ["head"] * 2
    with watched(model) as calls:
        losses.total.backward()
    assert calls["layers"] == [], "only logits are made once more"


def test_no_more_logits_than_needed_when_evaluating() -> None:
    model = converted(llama(), [2])
    with watched(model) as calls, torch.no_grad():
        Distillation(model)(**batch(), evaluate=True)
    assert calls["layers"] == "0 1 2 3 4 2* 3 4".split()
    assert calls["lm_head"] == ["head"] * 2


@pytest.mark.parametrize(
    ("layers", "stage"),
    [
        pytest.param([2], STUDENT, id="single layer"),  # in any stage
        pytest.param([1, 3], TEACHER, id="teacher"),
    ],
)
def test_the_cache_changes_nothing(layers: list[int], stage: Stage) -> None:
    model = converted(llama(), layers)
    plain = Distillation(model, reg_weight=0.2)
    cached = Distillation(model, reg_weight=0.2, cache_bytes=10**9)
    inputs = {**batch(), "windows": torch.tensor([7, 3, 11])}
    first = outcome(cached, stage, **inputs)
    assert (cached.cache.hits, cached.cache.misses) == (0, 3)
    for actual, expected in zip(first, outcome(plain, stage, **inputs), strict=True):
        same(actual, expected, 1e-12)
    with watched(model) as calls:
        second = outcome(cached, stage, **inputs)
    assert calls["layers"] == [f"{layer}*" for layer in layers], "no base model the second time"
    assert (cached.cache.hits, cached.cache.misses) == (3, 3)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "bit for bit"
    assert plain.cache.hits == plain.cache.misses == plain.cache.size == 0


def test_a_stop_empties_the_cache_and_shows_in_no_bit() -> None:
    """Windows come back in another order; some are in the cache and some are not."""
    model = converted(llama(), [1, 3], dtype=torch.float32)
    kept = Distillation(model, cache_bytes=10**9)
    fresh = Distillation(model, cache_bytes=10**9)
    windows = torch.tensor([0, 1, 2])
    padded = {**batch(), "windows": windows}
    for step in (kept, fresh):
        step.calibrate(padded["input_ids"], [])
    outcome(kept, **padded)  # the first epoch, before the stop
    for rows in ([2, 0], [0], [1, 1, 2]):
        epoch = {name: tensor[rows] for name, tensor in padded.items()}
        if rows == [0]:
            del epoch["attention_mask"]  # a batch without padding comes without a mask
        pairs = zip(outcome(kept, **epoch), outcome(fresh, **epoch), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), rows
    assert (kept.cache.hits, kept.cache.misses) == (2 + 1 + 3, 3)
    # after its restart the second one computed 2, 0 and then 1, once each
    assert (fresh.cache.hits, fresh.cache.misses) == (0 + 1 + 2, 3)


def test_the_cache_is_not_used_where_the_student_is_run() -> None:
    model = converted(llama(), [1, 3])
    step = Distillation(model, cache_bytes=10**9)
    inputs = {**batch(), "windows": torch.tensor([0, 1, 2])}
    outcome(step, MIXED, **inputs)
    step(**inputs, stage=TEACHER, evaluate=True)
    step(**batch(), stage=TEACHER)  # windows without numbers
    assert step.cache.hits == step.cache.misses == step.cache.size == 0
