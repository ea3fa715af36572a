"""Training states that cannot be joined or used."""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import npt_fast as npt
from tests.checkpoint.training_states import adamw_over, stepped, unstepped, with_state
from tests.checkpoints import (
    adamw_state,
    layer_weights,
    load_state,
    read_weights,
    trained_checkpoint,
    write_checkpoint,
)


class Stranger:
    """Pickled by reference: loading it would have to import this module."""


def optimizer_of(weights: Mapping[str, Tensor], kind: Any, **options: Any) -> dict[str, Any]:
    parameters = [torch.nn.Parameter(tensor.clone()) for tensor in weights.values()]
    optimizer = kind(parameters, **options)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {"global_step": 1, "optimizer_state_dict": optimizer.state_dict()}


def sgd(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    return optimizer_of(weights, torch.optim.SGD, lr=0.1)


def sgd_with_momentum(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    return optimizer_of(weights, torch.optim.SGD, lr=0.1, momentum=0.9)


def rmsprop(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    return optimizer_of(weights, torch.optim.RMSprop, lr=0.1)


def two_groups(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    tensors = [torch.nn.Parameter(tensor) for tensor in weights.values()]
    groups = [{"params": tensors[:4]}, {"params": tensors[4:]}]
    return {"global_step": 1, "optimizer_state_dict": torch.optim.AdamW(groups).state_dict()}


def too_few_parameters(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    return adamw_state(dict(list(weights.items())[:-1]))


def too_many_parameters(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    return adamw_state({**weights, "more": torch.zeros(1)})


def other_shapes(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    return adamw_state(layer_weights(11, rank=5))


def no_step(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    return {"optimizer_state_dict": adamw_state(weights)["optimizer_state_dict"]}


def foreign_object(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    return {**adamw_state(weights), "config": Stranger()}


def a_path(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    return {**adamw_state(weights), "config": {"output": Path("x")}}


def a_list(weights: Mapping[str, Tensor]) -> Any:
    return [1, 2]


STATES = [
    sgd, sgd_with_momentum, rmsprop, two_groups, too_few_parameters, too_many_parameters,
    other_shapes, no_step, foreign_object, a_path, a_list,
]  # fmt: skip


@pytest.mark.parametrize("make", STATES, ids=lambda make: make.__name__)
def test_what_cannot_be_joined_names_the_way_out(
    tmp_path: Path, make: Callable[[Mapping[str, Tensor]], Any]
) -> None:
    weights = layer_weights(11)
    path = write_checkpoint(tmp_path / "a", weights)
    torch.save(make(weights), path / "training_state.pt")
    with pytest.raises(npt.NPTError) as caught:
        npt.merge([path, trained_checkpoint(tmp_path / "b", 13)], tmp_path / "out")
    message = str(caught.value)
    assert str(path / "training_state.pt") in message
    assert "--weights_only" in message and "\n" not in message
    assert not (tmp_path / "out").exists()
    options = npt.MergeOptions(weights_only=True)
    npt.merge([path, tmp_path / "b"], tmp_path / "out", options=options)


@pytest.mark.parametrize("damage", ["garbage", "empty", "link", "directory"])
def test_weights_only_does_not_even_open_the_state(tmp_path: Path, damage: str) -> None:
    path = write_checkpoint(tmp_path / "a", layer_weights(11))
    state = path / "training_state.pt"
    if damage == "link":
        state.symlink_to(tmp_path / "nowhere")
    elif damage == "directory":
        state.mkdir()
    else:
        state.write_bytes(b"not a zip" * 99 if damage == "garbage" else b"")
    with pytest.raises(npt.NPTError, match="--weights_only"):
        npt.merge([path], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    options = npt.MergeOptions(weights_only=True)
    assert npt.merge([path], tmp_path / "out", verify=True, options=options).layers[0].layer == 11


def test_amsgrad_cannot_be_made_up(tmp_path: Path) -> None:
    weights = layer_weights(11)
    state = adamw_state(weights, amsgrad=True, steps=9)
    paths = [
        write_checkpoint(tmp_path / "a", weights, training_state=state),
        trained_checkpoint(tmp_path / "b", 13),
    ]
    with pytest.raises(npt.CheckpointError, match=r"amsgrad.*--weights_only"):
        npt.merge(paths, tmp_path / "out")
    report = npt.merge(
        paths, tmp_path / "out", verify=True, options=npt.MergeOptions(on_bad_state="skip")
    )
    assert [info.optimizer for info in report.layers] == ["kept", "fresh"]
    (warning,) = (line for line in report.warnings if "amsgrad" in line)
    assert warning.startswith(str(paths[1] / "training_state.pt"))
    assert warning.endswith("its layers start with a fresh optimizer")


def test_a_resumed_run_can_step_whoever_gives_the_scalars(tmp_path: Path) -> None:
    """The optimizer of another kind gives scalars only: its group lacks what AdamW needs."""
    weights = layer_weights(11)
    state = {**sgd(weights), "global_step": 99}
    other = write_checkpoint(tmp_path / "a", weights, training_state=state)
    try:
        npt.merge([other, trained_checkpoint(tmp_path / "b", 13)], tmp_path / "out")
    except npt.CheckpointError:
        return  # a refusal is right too
    parameters, optimizer, _ = adamw_over(read_weights(tmp_path / "out"))
    optimizer.load_state_dict(load_state(tmp_path / "out")["optimizer_state_dict"])
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


# --- what cannot be used


UNUSABLE: dict[str, tuple[Any, str]] = {
    "namespace": ({"args": argparse.Namespace(a=1)}, "args: refers to argparse.Namespace"),
    "date": ({"config": {"x": 1, "run": {"at": 3, "when": datetime.date(2026, 1, 2)}}},
             "config.run.when: refers to datetime.date"),
    "path": ({"config": {"where": Path("x"), "y": 1}}, "config.where: refers to pathlib"),
    "in a list": ({"log": [1, {"a": 2, "at": datetime.date(2026, 1, 2)}]}, "log.at: refers to"),
    "in a list of text": ({"log": ["a", "b", datetime.date(2026, 1, 2)]}, ": log: refers to"),
    "a short number": ({"log": {"of": np.float16(1), "n": 1}}, "log.of: a numpy value of an"),
    "a long number": ({"log": {"of": 1 << 200, "n": 1}}, "log.of: an integer of 26 bytes"),
    "array": ({"losses": np.zeros(3)}, "losses: refers to numpy"),
    "set": ({"seen": {1, 2}}, "seen: refers to"),
    "bytes": ({"raw": b"ab"}, "raw: a value of type bytes is neither plain data"),
    "dtype": ({"kind": {"dtype": torch.bfloat16}}, "kind.dtype: torch.bfloat16 is neither"),
    "tuple as key": ({"map": {(1, 2): 3}}, "map: a dict key of type tuple"),
    "another optimizer": (
        {"optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 1.0, "params": [0]}]}},
        "AdamW expected",
    ),
    "one parameter twice": (
        {"optimizer_state_dict": {
            **unstepped(), "param_groups": [{**unstepped()["param_groups"][0], "params": [0] * 9}],
        }},
        "does not match its parameter list",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNUSABLE)
def test_one_unusable_state_costs_its_own_optimizer_only(tmp_path: Path, case: str) -> None:
    content, told = UNUSABLE[case]
    bad = {"global_step": 900, "optimizer_state_dict": stepped(11), **content}
    inputs = [
        with_state(tmp_path / "a", 11, bad),
        trained_checkpoint(tmp_path / "b", 13, steps=3),
    ]
    with pytest.raises(npt.CheckpointError) as caught:
        npt.merge(inputs, tmp_path / "out")
    message = str(caught.value)
    assert message.startswith(str(inputs[0] / "training_state.pt")) and told in message
    assert "--on_bad_state skip" in message and "--weights_only" in message
    report = npt.merge(
        inputs, tmp_path / "out", verify=True, options=npt.MergeOptions(on_bad_state="skip")
    )
    assert [info.optimizer for info in report.layers] == ["fresh", "kept"]
    assert report.global_step == 3
    (warning,) = (line for line in report.warnings if "training_state" in line)
    assert told in warning and warning.endswith("its layers start with a fresh optimizer")
    again = npt.verify(tmp_path / "out")
    assert again.passed and again.compared == 18 + 9 * 3
