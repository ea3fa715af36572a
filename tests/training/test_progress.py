"""The progress in a training state: a value of a wrong type gives one line with its key."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import npt_fast as npt
from npt_fast.checkpoint.checkpoint import open_checkpoint
from npt_fast.checkpoint.training_state import TrainingState
from npt_fast.training.progress import Progress, read_progress
from npt_fast.training.state import read_state
from tests.checkpoints import load_state
from tests.training.runs import Place


@pytest.fixture(scope="module")
def saved(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a checkpoint at step 2."""
    return place.train(tmp_path_factory.mktemp("run"), max_steps=2)


def deep(levels: int) -> list[Any]:
    return reduce(lambda inner, _: [inner], range(levels), [])


def put(state: Any, path: str, value: Any) -> None:
    *parents, last = (int(key) if key.isdigit() else key for key in path.split("."))
    for key in parents:
        state = state[key]
    state[last] = value


@pytest.fixture(scope="module")
def state(saved: Path) -> TrainingState:
    found = read_state(open_checkpoint(str(saved)))
    assert found is not None
    return replace(found, content={**found.content, "scaler_state_dict": SCALER})


def changed(state: TrainingState, path: str, value: Any) -> TrainingState:
    """Copy the checkpoint with one value changed."""
    whole = copy.deepcopy({"group": dict(state.group or {}), **state.content})
    put(whole, path, value)
    return replace(state, group=whole.pop("group"), content=whole)


SCALER = {
    "scale": 1024.0,
    "growth_factor": 2.0,
    "backoff_factor": 0.5,
    "growth_interval": 2000,
    "_growth_tracker": 0,
}
COUNTS = [
    "batch_count",
    *(f"scaler_state_dict.{name}" for name in ("growth_interval", "_growth_tracker")),
    *(f"scheduler_state_dict.{name}" for name in ("last_epoch", "_step_count")),
    *(
        f"data_state.{name}"
        for name in (
            "max_length", "stride", "held_out", "block", "windows", "before", "epoch", "window",
            "skip",
        )
    ),
]  # fmt: skip
NUMBERS = [
    *(f"group.{name}" for name in ("lr", "initial_lr", "eps", "weight_decay")),
    *(f"scaler_state_dict.{name}" for name in ("scale", "growth_factor", "backoff_factor")),
]
MAPPINGS = ["scaler_state_dict", "scheduler_state_dict", "data_state"]
LISTS = ["scheduler_state_dict.base_lrs", "scheduler_state_dict._last_lr", "data_state.tokens"]
OTHERS = ["best_val_loss", "group.betas", "data_state.seed", "data_state.source"]
OTHERS += ["data_state.documents", "group.amsgrad", "group.fused"]

NONE_OF_THEM = st.one_of(
    st.binary(max_size=3),
    st.complex_numbers(),
    st.just(10**400),
    st.just(-(10**400)),
    st.sets(st.integers(), max_size=2),
    st.builds(deep, st.integers(3, 3000)),
    st.just({1: {}}),
    st.builds(object),
)
NO_NUMBER = st.one_of(
    NONE_OF_THEM, st.text(), st.sampled_from([math.nan, -1.0, -1, True, 1 << 63, [], {}])
)
NO_COUNT = st.one_of(NO_NUMBER, st.sampled_from([0.5, math.inf]))


@pytest.mark.parametrize("path", [*COUNTS, *NUMBERS, *MAPPINGS, *LISTS, *OTHERS])
@settings(max_examples=30)
@given(data=st.data())
def test_a_wrong_type_is_one_line_with_file_and_key(
    state: TrainingState, path: str, data: st.DataObject
) -> None:
    if path in COUNTS:
        wrong = data.draw(NO_COUNT)
    elif path in NUMBERS:
        wrong = data.draw(NO_NUMBER)
    elif path in LISTS:
        one = st.lists(NO_NUMBER, min_size=1, max_size=3)
        wrong = data.draw(st.one_of(NO_COUNT.filter(lambda value: value != []), one))
    elif path in MAPPINGS:
        wrong = data.draw(st.one_of(st.text(), st.integers(), st.lists(st.none()), st.binary()))
    else:
        wrong = data.draw(NONE_OF_THEM)
    with pytest.raises(npt.CheckpointError) as raised:
        read_progress(changed(state, path, wrong))
    line = str(raised.value)
    assert line.startswith(f"{state.path}: ") and len(line) < len(str(state.path)) + 200
    assert f" {path.rpartition('.')[2]} must be" in line


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        ("group.betas", "text"),
        ("group.betas", [0.9]),
        ("group.betas", (0.9, math.nan)),
        ("group.betas", (0.9, 1.0)),
        ("data_state.documents", "no JSON"),
        ("data_state.documents", "[1]"),
        ("data_state.documents", "[" * 100_000),
        ("data_state.documents", '{"epoch": ' * 100_000),
        ("data_state.windows", 10**6),
        ("data_state.windows", 1 << 62),
        ("data_state.seed", 1.0),
    ],
)
def test_a_value_of_the_right_type_that_cannot_be(
    state: TrainingState, path: str, wrong: Any
) -> None:
    with pytest.raises(npt.CheckpointError, match=rf"{path.rpartition('.')[2]} must be"):
        read_progress(changed(state, path, wrong))


@pytest.mark.parametrize("part", ["scaler_state_dict", "data_state"])
def test_what_is_missing_is_named(state: TrainingState, part: str) -> None:
    for key, value in state.content[part].items():
        rest = {name: item for name, item in state.content[part].items() if name != key}
        assert value is not None
        with pytest.raises(npt.CheckpointError, match=rf"{part}: {key} is missing"):
            read_progress(changed(state, part, rest))


def test_what_training_wrote(state: TrainingState) -> None:
    assert read_progress(None) == Progress()
    found = read_progress(state)
    assert found.micro_batches == 4 and found.best_kl is None and found.scaler == SCALER
    assert found.data == state.content["data_state"]


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("best_val_loss", math.inf, Progress(best_kl=None)),  # the original's first value
        ("best_val_loss", math.nan, Progress(best_kl=None)),
        ("best_val_loss", 2, Progress(best_kl=2.0)),
        ("batch_count", None, Progress()),
        ("batch_count", 7, Progress(micro_batches=7)),
        ("scaler_state_dict", {}, Progress()),
        ("scheduler_state_dict", None, Progress()),
        ("data_state", None, Progress()),
    ],
)
def test_what_other_runs_wrote(
    state: TrainingState, path: str, value: Any, expected: Progress
) -> None:
    bare = replace(state, content={"global_step": 2}, group=None)
    assert read_progress(changed(bare, path, value)) == expected


# ---- through `train`


def resave(saved: Path, target: Path, change: Callable[[Any], None]) -> Path:
    shutil.copytree(saved, target)
    state = load_state(target)
    change(state)
    torch.save(state, target / "training_state.pt")
    return target


def adamw(**values: Any) -> Callable[[Any], None]:
    """Change AdamW's state of the first tensor of the first layer."""
    return lambda state: state["optimizer_state_dict"]["state"][0].update(values)


CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "batch_count": (
        lambda state: state.update(batch_count={"a": 1}),
        "batch_count must be a whole number from 0 to 2^62, or null, not a dict",
    ),
    "tokens beyond the vocabulary": (
        lambda state: state["data_state"].update(tokens=[257]),
        "data_state: its tokens are not in the vocabulary",
    ),
    "tokens of text": (
        lambda state: state["data_state"].update(tokens=["a"]),
        "tokens must be a list, each item a whole number",
    ),
    "a position in other data": (
        lambda state: state["data_state"].update(documents='{"epoch": 0}'),
        "data_state: cannot resume with this data: documents is not a position in it",
    ),
    "betas": (
        lambda state: state["optimizer_state_dict"]["param_groups"][0].update(betas="text"),
        "optimizer_state_dict: betas must be two numbers",
    ),
    "a step of 0": (adamw(step=torch.tensor(0.0)), "has tensors at step 0 and others at step 2"),
    "half a step": (adamw(step=torch.tensor(1.5)), "step must be a whole number, not 1.5"),
    "a negative step": (adamw(step=-1), "step must be a whole number, not -1"),
    "a step of NaN": (adamw(step=torch.tensor(math.nan)), "step must be a whole number, not nan"),
    "a complex step": (adamw(step=torch.tensor(1j)), "step must be a whole number, not None"),
    "a huge step": (
        adamw(step=1e300),
        "step must be a whole number, not a number of more than 64 bits",
    ),
    "a moment of NaN": (
        lambda state: state["optimizer_state_dict"]["state"][0]["exp_avg"].fill_(math.nan),
        "exp_avg of layer_1_np.W_down_gate.0 must be finite",
    ),
    "whole moments": (
        lambda state: state["optimizer_state_dict"]["state"][0].update(
            exp_avg=state["optimizer_state_dict"]["state"][0]["exp_avg"].long()
        ),
        "exp_avg of layer_1_np.W_down_gate.0 must be finite",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_resuming_from_it_is_one_line(place: Place, saved: Path, tmp_path: Path, name: str) -> None:
    change, message = CHANGES[name]
    broken = resave(saved, tmp_path / "broken", change)
    with pytest.raises(npt.NPTError) as raised:
        place.train(tmp_path / "out", resume_from=str(broken), max_steps=3)
    line = str(raised.value)
    assert str(broken) in line and message in line
    assert not list((tmp_path / "out" / "checkpoints").glob("*"))


def test_a_state_that_was_saved_again_goes_on(place: Place, saved: Path, tmp_path: Path) -> None:
    """The run resumes without the changes of the tests above, so these are what stops it."""
    again = resave(saved, tmp_path / "again", lambda state: None)
    place.train(tmp_path / "out", resume_from=str(again), max_steps=3)
