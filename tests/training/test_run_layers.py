"""How the fresh layers of a run start."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

import npt_fast as npt
from npt_fast.hf.convert import components
from npt_fast.training.data import beginning
from npt_fast.training.distillation import Distillation
from npt_fast.training.run_layers import start
from tests.checkpoints import read_weights
from tests.hf.small_models import build
from tests.training import runs
from tests.training.runs import Place
from tests.training.texts import random_texts, write_texts
from tests.training.windows import stream

PLAIN: dict[str, Any] = {"max_steps": 1, "logging_steps": 1, "learning_rate": 1e-9}


def errors(place: Place, output: Path, **settings: Any) -> list[float]:
    """Errors of layers 1 and 2 at a run's first step."""
    place.train(output, **{**PLAIN, **settings})
    line = runs.log(output)[0]
    return [line[f"mlp_direct_loss/layer_{n}"] for n in (1, 2)]


def test_a_run_starts_its_layers_near_their_targets(place: Place, tmp_path: Path) -> None:
    fitted = errors(place, tmp_path / "fitted")
    at_base = errors(place, tmp_path / "zero", init_strategy="zero")
    assert all(found < 0.8 * base for found, base in zip(fitted, at_base, strict=True))
    config = (tmp_path / "fitted" / "config.json").read_text()
    assert '"init_strategy": "fitted"' in config


def test_the_same_options_start_the_same(place: Place, tmp_path: Path) -> None:
    """Whichever layers are trained beside a layer."""
    both, alone = (
        place.train(tmp_path / layers, train_layers=layers, **PLAIN) for layers in ("1,2", "2")
    )
    whole = read_weights(both)
    assert all(torch.equal(tensor, whole[key]) for key, tensor in read_weights(alone).items())


def test_a_resumed_run_fits_its_fresh_layers_alone(place: Place, tmp_path: Path) -> None:
    first = place.train(tmp_path / "first", train_layers="1", **PLAIN)
    more = {"resume_from": str(first), "max_steps": 2}
    fitted = errors(place, tmp_path / "fitted", **more)
    at_base = errors(place, tmp_path / "zero", init_strategy="zero", **more)
    assert fitted[0] == at_base[0]
    assert fitted[1] < 0.8 * at_base[1]


def test_the_windows_that_are_fitted(tmp_path: Path) -> None:
    """Those that come first, each once."""
    windows = stream(write_texts(tmp_path / "a.jsonl", random_texts(50)), held_out=2)
    read = list(islice(windows, 200))
    numbers = [int(window["window"]) for window in read]
    epoch = numbers.index(numbers[0], 1) if numbers[0] in numbers[1:] else len(numbers)
    found = beginning(windows, 40)
    assert [int(window["window"]) for window in found] == numbers[:5]
    whole = beginning(windows, 10**9)
    assert len(whole) == len({int(window["window"]) for window in whole}) <= epoch
    assert [int(window["window"]) for window in islice(windows, 200)] == numbers
    assert beginning(windows, 0) == []


class Rows(list[Any]):
    """Windows of a text, which count those that are skipped."""

    skipped = 0

    def skip(self, windows: int) -> None:
        self.skipped += windows


@pytest.mark.parametrize(
    ("family", "options", "sharded", "left"),
    [
        ("llama", {}, False, None),
        ("llama", {}, True, [1, 2]),
        ("mixtral", {"residual": "kept"}, False, [1, 2]),
        ("gemma2", {}, False, [1, 2]),
        ("gemma2", {"residual": "kept"}, False, None),
    ],
    ids=["llama", "sharded", "experts", "post-norm removed", "post-norm kept"],
)
def test_layers_that_start_at_the_base_are_named(
    family: str, options: dict[str, Any], sharded: bool, left: list[int] | None
) -> None:
    model = build(family)
    npt.convert(model, npt.NPTConfig(layers=[1, 2], rank=4, **options))
    said: list[str] = []
    ids = torch.randint(3, 120, (6, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids[0])
    rows: Any = Rows(
        {"input_ids": row, "attention_mask": mask, "window": torch.tensor(number)}
        for number, row in enumerate(ids)
    )
    step = Distillation(model, sink_weight=64.0)
    run = npt.TrainOptions(train_layers="1,2", batch_size=2)
    start(step, [1, 2], run, ids[:2], rows, said.append, sharded=sharded)
    line = f"Note: layers {left} start at the base MLP, as with --init_strategy zero"
    assert said == ([] if left is None else [line])
    written = [bool(part.w_b_down.any()) for part in components(model).values()]  # type: ignore[union-attr]
    assert written == [left is None] * 2
    assert rows.skipped == 6
    start(step, [2], run, ids[:2], rows, said.append, sharded=sharded)
    assert rows.skipped == 6  # layer 1 goes on where it was
