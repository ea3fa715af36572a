"""Optimizer steps: their tokens, learning rates and randomness."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import npt_fast as npt
from tests.checkpoints import (
    assert_same_tensors,
    contents,
    load_state,
    read_weights,
)
from tests.training import runs
from tests.training.runs import Place


def in_one_go(place: Place, folder: Path, **changes: Any) -> Path:
    """Take one step over all windows of the short text, of which one is padded."""
    settings = {"max_steps": 1, "num_eval_samples": 1, "gradient_clip": 0, **changes}
    begin = str(runs.start(folder / "start", 1, 2))
    return place.train(folder / "out", data=str(place.short), resume_from=begin, **settings)


STAGES = ["teacher:5", "mixed:5:0.5,student:5"]


@pytest.mark.parametrize("stages", STAGES)
def test_accumulation_is_exact(place: Place, tmp_path: Path, stages: str) -> None:
    """Each token has the same weight, although one window has only five."""
    found = {}
    for batch in (8, 4, 2, 1):
        changes = {"batch_size": batch, "gradient_accumulation_steps": 8 // batch}
        path = in_one_go(
            place, tmp_path / str(batch), curriculum_stages=stages, fidelity_weight=1.0, **changes
        )
        found[batch] = runs.gradient(path)
    for batch in (4, 2, 1):
        assert (found[batch] - found[8]).norm() < 1e-6 * found[8].norm(), batch


def test_clipping(place: Place, tmp_path: Path) -> None:
    """Clipping applies to the gradients of each layer, after accumulation."""
    free = runs.by_name(in_one_go(place, tmp_path / "free"))
    clipped = runs.by_name(in_one_go(place, tmp_path / "clipped", gradient_clip=0.25))
    for layer in ("layer_1_", "layer_2_"):
        names = [name for name in free if name.startswith(layer)]
        squares = sum(free[name]["exp_avg"].double().square().sum() for name in names)
        norm = 10 * math.sqrt(squares)  # a first moment is a tenth of the gradient
        assert norm > 0.5
        for name in names:
            expected = free[name]["exp_avg"] * (0.25 / norm)
            torch.testing.assert_close(clipped[name]["exp_avg"], expected)


@pytest.mark.parametrize(
    ("schedule", "warmup"), [("cosine", 3), ("cosine", 0), ("constant", 3), ("cosine", None)]
)
def test_learning_rates(place: Place, tmp_path: Path, schedule: str, warmup: int | None) -> None:
    """It is linear from 0, then half a cosine to 0 at max_steps, or constant; also resumed."""
    settings = {
        "lr_schedule": schedule, "warmup_steps": warmup, "logging_steps": 1, "batch_size": 1,
        "gradient_accumulation_steps": 1,
    }  # fmt: skip
    half = place.train(tmp_path / "out", max_steps=4, **settings)
    place.train(tmp_path / "out", max_steps=20, resume_from=str(half), **settings)
    first = 2 if warmup is None else warmup  # without a number, a tenth of the steps

    def expected(step: int, end: int, first: int) -> float:
        if step < first:
            return 1e-2 * step / first
        progress = (step - first) / (end - first) if schedule == "cosine" else 0
        return 1e-2 * (1 + math.cos(math.pi * progress)) / 2

    begun = warmup or 0
    found = [line["training/learning_rate"] for line in runs.log(tmp_path / "out")]
    assert found == pytest.approx(
        [expected(step, 4, begun) for step in range(4)]
        + [expected(step, 20, first) for step in range(4, 20)]
    )
    state = load_state(tmp_path / "out" / "checkpoints" / "final")
    assert state["scheduler_state_dict"]["last_epoch"] == 20


@pytest.mark.parametrize("start", ["conservative", "zero"])
def test_the_originals_starts_have_one_rate(place: Place, tmp_path: Path, start: str) -> None:
    """AdamW's first step is its rate for every number with a gradient."""
    settings = {"init_strategy": start, "max_steps": 1, "warmup_steps": 0, "weight_decay": 0}
    settings |= {"np_init_scale": 0.3, "lr_schedule": "constant"}
    before, after = (
        read_weights(place.train(tmp_path / str(lr), learning_rate=lr, **settings))
        for lr in (1e-30, 1e-3)
    )
    rates = {name: (after[name] - before[name]).abs().median() for name in before}
    one = [rate for name, rate in rates.items() if rate == pytest.approx(1e-3, rel=0.02)]
    assert len(one) == len(rates) if start == "conservative" else len(one) < len(rates)


def test_a_layer_does_not_know_of_others(place: Place, tmp_path: Path) -> None:
    """In the teacher stage without clipping, a layer starts and ends the same beside any others."""
    settings = {"gradient_clip": 0, "max_steps": 3}
    both = read_weights(place.train(tmp_path / "both", train_layers="2,0", **settings))
    for layer in (0, 2):
        own = read_weights(place.train(tmp_path / str(layer), train_layers=[layer], **settings))
        assert_same_tensors(own, {name: both[name] for name in own})
    assert list(both) == sorted(both, key=lambda name: name[:7])


def test_measuring_does_not_disturb(place: Place, tmp_path: Path) -> None:
    settings = {"curriculum_stages": "mixed:9", "lambda_reg": 0.1}
    plain = place.train(tmp_path / "plain", **settings)
    often = {"generation_steps": 1, "logging_steps": 1, "eval_steps": 2, "save_steps": 3}
    busy = place.train(tmp_path / "busy", **often, **settings)
    runs.assert_same_end(plain, busy)


def test_seeds(place: Place, tmp_path: Path) -> None:
    """The same seed gives the same bits; another seed gives another start and another order."""
    first, same, other = (
        read_weights(place.train(tmp_path / f"{n}", max_steps=2, seed=seed))
        for n, seed in enumerate((1, 1, 2))
    )
    assert_same_tensors(first, same)
    assert all(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(("strategy", "changes"), [("zero", False), ("improved", True)])
def test_initialization(place: Place, tmp_path: Path, strategy: str, changes: bool) -> None:
    """With a learning rate near 0 the checkpoint holds the initial weights."""
    settings = {"learning_rate": 1e-30, "weight_decay": 0, "max_steps": 1}
    weights = read_weights(
        place.train(tmp_path / "out", init_strategy=strategy, np_init_scale=0.5, **settings)
    )
    writes = [tensor for name, tensor in weights.items() if "W_b_up" in name]
    assert all((tensor.abs().max() > 1e-3) == changes for tensor in writes)


def test_layer_weights_weigh(place: Place, tmp_path: Path) -> None:
    plain = runs.by_name(in_one_go(place, tmp_path / "plain"))
    weighed = runs.by_name(in_one_go(place, tmp_path / "weighed", layer_weights="4,0.25"))
    for name, state in plain.items():
        factor = 4 if "layer_1_" in name else 0.25
        assert torch.equal(weighed[name]["exp_avg"], state["exp_avg"] * factor)


def test_a_loss_that_is_not_finite(place: Place, tmp_path: Path) -> None:
    good = place.train(tmp_path / "out", max_steps=2)
    before = contents(good)
    with pytest.raises(npt.TrainingError) as caught:
        place.train(
            tmp_path / "out", max_steps=9, resume_from=str(good), learning_rate=1e30, save_steps=3
        )
    assert "of layer 1, 2 is not finite at step 4" in str(caught.value)
    assert f"the last good checkpoint is {good.with_name('checkpoint-3')}" in str(caught.value)
    assert contents(good) == before
    assert not good.with_name("checkpoint-4").exists()
