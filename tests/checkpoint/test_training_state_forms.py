"""What other programs leave in a training state."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import npt_fast as npt
from tests.checkpoint.training_states import loaded_state, stepped, unstepped, with_state
from tests.checkpoints import load_state, trained_checkpoint


def test_milestones_are_carried_over(tmp_path: Path) -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3], gamma=0.5)
    content = {"global_step": 0, "scheduler_state_dict": schedule.state_dict()}
    path = with_state(tmp_path / "a", 11, {**content, "optimizer_state_dict": stepped(11)})
    npt.merge([path, trained_checkpoint(tmp_path / "b", 13, steps=0)], tmp_path / "out")
    schedule.load_state_dict(load_state(tmp_path / "out")["scheduler_state_dict"])
    rates = []
    for _ in range(3):
        optimizer.step()
        schedule.step()
        rates += schedule.get_last_lr()
    assert rates == [1.0, 0.5, 0.25]


def rate(value: float) -> Tensor:
    return torch.tensor(value)


SOUND: dict[str, dict[str, Any]] = {
    "only the step": {},
    "a scheduler": {"scheduler_state_dict": {"last_epoch": 800, "_last_lr": [1e-4]}},
    "an optimizer that never stepped": {"optimizer_state_dict": unstepped()},
    "a rate in a tensor": {"optimizer_state_dict": stepped(11, lr=rate(1e-4))},
    "a rate in a tensor, never stepped": {
        "optimizer_state_dict": {
            "state": {},
            "param_groups": [{**unstepped()["param_groups"][0], "lr": rate(3e-4)}],
        }
    },
    "a rate of one element": {
        "optimizer_state_dict": {
            **stepped(11),
            "param_groups": [{**unstepped()["param_groups"][0], "lr": rate(3e-4)[None]}],
        }
    },
    "betas in tensors": {
        "optimizer_state_dict": stepped(11, lr=rate(1e-4), betas=(rate(0.9), rate(0.99)))
    },
    "infinite hyperparameters": {
        "scheduler_state_dict": {
            "best": float("inf"), "low": torch.tensor(float("-inf")), "odd": float("nan"),
            "window": torch.tensor([1.0, float("nan")]),
        },
        "optimizer_state_dict": stepped(11),
    },
    "rows and columns the other way round": {
        "matrix": torch.randn(3, 4).T, "cube": torch.randn(2, 3, 4).permute(2, 0, 1),
        "part": torch.randn(3, 4, 5)[1:, ::2, 1:4],
    },
    "an optimizer under another name": {
        "optimizer": {"param_groups": [{"lr": torch.tensor(float("inf"))}]}
    },
    "the step as a whole float": {"global_step": 800.0},
    "the step in a tensor": {"global_step": torch.tensor(800)},
    "the step in a bfloat16 tensor": {"global_step": torch.tensor(800, dtype=torch.bfloat16)},
    "other numbers": {"rng": torch.get_rng_state(), "loss": torch.tensor(2.5), "many": [1, (2,)]},
}  # fmt: skip


@pytest.mark.parametrize("case", SOUND)
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "with another"])
def test_sound_states_pass(tmp_path: Path, case: str, alone: bool) -> None:
    state = {"global_step": 800, **SOUND[case]}
    inputs = [with_state(tmp_path / "a", 11, state)]
    if not alone:
        inputs.append(with_state(tmp_path / "b", 13, {"global_step": 600}))
    for output, proven in (("proven", True), ("unproven", False)):
        npt.merge(inputs, tmp_path / output, verify=proven)
        report = npt.verify(tmp_path / output)
        assert report.passed, report.problems
        npt.merge([tmp_path / output], tmp_path / f"{output}-again", verify=True)
    merged = load_state(tmp_path / "proven-again")
    assert merged["global_step"] == 800 and type(merged["global_step"]) is int
    npt.inspect(tmp_path / "proven").to_dict()
    expected = loaded_state(inputs[0])
    for key in expected.keys() - {"global_step", "optimizer_state_dict"}:
        assert repr(merged[key]) == repr(expected[key])
    if alone and "optimizer_state_dict" in state:
        assert repr(merged["optimizer_state_dict"]) == repr(expected["optimizer_state_dict"])


def test_the_learning_rate_is_shown_wherever_it_stands(tmp_path: Path) -> None:
    state = {"global_step": 1, "optimizer_state_dict": stepped(11, lr=rate(0.125))}
    report = npt.inspect(with_state(tmp_path / "a", 11, state))
    assert report.training_state is not None
    assert report.training_state["optimizer"]["learning_rate"] == 0.125


@pytest.mark.parametrize("step", [800.5, -1, True, "800", float("nan"), float("inf"), 1e300, None,
                                  torch.ones(2), torch.tensor(0.5)])  # fmt: skip
def test_other_steps_are_refused_by_name(tmp_path: Path, step: Any) -> None:
    path = with_state(tmp_path / "a", 11, {"global_step": step})
    shown = r"a tensor \(F32" if isinstance(step, Tensor) else re.escape(repr(step))
    told = rf"training_state\.pt: its global_step is {shown}.*, not a number of steps"
    with pytest.raises(npt.CheckpointError, match=told):
        npt.merge([path], tmp_path / "out")


def test_a_layer_weight_that_is_not_a_number_is_no_second_one(tmp_path: Path) -> None:
    path = with_state(tmp_path / "a", 11, {"global_step": 1})
    weights = {11: float("nan")}
    torch.save({"layers_to_train": [11], "layer_weights": weights}, path / "multi_layer_state.pt")
    npt.merge([path], tmp_path / "out", verify=True)
    carried = torch.load(tmp_path / "out" / "multi_layer_state.pt", weights_only=True)
    assert math.isnan(carried["layer_weights"][11])


def test_a_state_without_a_step_names_all_its_keys(tmp_path: Path) -> None:
    for name, state, keys in (("a", {"optimizer_state_dict": stepped(11)}, "optimizer_state_dict"),
                              ("b", {}, "none")):  # fmt: skip
        path = with_state(tmp_path / name, 11, state)
        with pytest.raises(npt.CheckpointError, match=rf"has no global_step.*its keys: {keys}\)"):
            npt.merge([path], tmp_path / "out")


def test_parameters_may_be_text_as_after_json(tmp_path: Path) -> None:
    optimizer = stepped(11)
    text = {**optimizer, "state": {str(n): own for n, own in optimizer["state"].items()}}
    for name, state in (("numbers", optimizer), ("text", text)):
        path = with_state(tmp_path / name, 11, {"global_step": 1, "optimizer_state_dict": state})
        npt.merge([path], tmp_path / f"{name}-out", verify=True)
    numbers, text = (load_state(tmp_path / f"{n}-out") for n in ("numbers", "text"))
    assert repr(numbers["optimizer_state_dict"]) == repr(text["optimizer_state_dict"])


def test_a_state_without_a_step_tells_its_keys(tmp_path: Path) -> None:
    path = with_state(tmp_path / "a", 11, {"step": 3, "optimizer": {}})
    with pytest.raises(npt.CheckpointError, match=r"no global_step.*its keys: step, optimizer"):
        npt.merge([path], tmp_path / "out")
