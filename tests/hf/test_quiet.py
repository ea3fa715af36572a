"""Verbosity and progress bars of the libraries are the caller's again after each call."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils.tqdm import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from transformers.utils import logging as transformers_logging

import npt_fast as npt
from npt_fast.hf.base_model import load_base_model, load_skeleton
from npt_fast.hf.quiet import quiet
from tests.training import runs, tiny

State = tuple[int, int, bool, bool]


def state() -> State:
    return (
        transformers_logging.get_verbosity(),
        hub_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
        not are_progress_bars_disabled(),
    )


def set_state(given: State) -> None:
    transformers_logging.set_verbosity(given[0])
    hub_logging.set_verbosity(given[1])
    (
        transformers_logging.enable_progress_bar
        if given[2]
        else transformers_logging.disable_progress_bar
    )()
    if given[3]:
        enable_progress_bars()
    else:
        disable_progress_bars()


@pytest.fixture(params=[(20, 10, True, True), (10, 30, True, False), (40, 40, False, True)])
def before(request: pytest.FixtureRequest) -> Iterator[State]:
    own = state()
    set_state(request.param)
    assert state() == request.param
    yield request.param
    set_state(own)


def test_within_and_after(before: State) -> None:
    with pytest.raises(KeyError), quiet():
        assert state() == (40, 40, False, False)
        raise KeyError
    assert state() == before


def test_loading(before: State, tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "base")
    load_base_model(str(base))
    load_skeleton(str(base))
    with pytest.raises(npt.ModelError):
        load_base_model(str(tmp_path / "none"))
    assert state() == before


def test_training(before: State, tmp_path: Path) -> None:
    with runs.place(tmp_path / "place") as place:
        place.train(tmp_path / "run", max_steps=1, generation_steps=1, eval_steps=1)
    assert state() == before
