"""A merged training state is one that AdamW, the scheduler and torch.load accept and continue."""

from __future__ import annotations

import argparse
import datetime
import math
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import npt_fast as npt
from tests.checkpoints import (
    adamw_state,
    contents,
    layer_weights,
    load_state,
    multi_layer_state,
    raw,
    read_weights,
    trained_checkpoint,
    write_checkpoint,
)

BOTH = [11, 13]


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    """Layer 11 after 3 steps, and layer 13 after 5 and its warm-up, with other ranks."""
    return [
        trained_checkpoint(tmp_path / "a", 11, steps=3, num_ranks=2),
        trained_checkpoint(tmp_path / "b", 13, steps=5, rank=6, numpy_lr=True),
    ]


def loaded_state(path: Path) -> dict[str, Any]:
    """The training state of a source, loaded by torch, with its numpy scalars."""
    scalar = np.float64().__reduce__()[0]  # NumPy 2 has it in another place than 1
    numpy_scalar = [scalar, np.dtype, type(np.dtype("float64"))]  # design.md#training-state
    with torch.serialization.safe_globals(numpy_scalar):
        state = torch.load(path / "training_state.pt", weights_only=True)
    assert isinstance(state, dict)
    return state


def adamw_over(
    weights: Mapping[str, Tensor],
) -> tuple[list[torch.nn.Parameter], torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """The trainer's optimizer and scheduler: one group over all weights in key order."""
    parameters = [torch.nn.Parameter(tensor.clone()) for tensor in weights.values()]
    optimizer = torch.optim.AdamW(parameters, lr=7.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    return parameters, optimizer, scheduler


def test_every_moment_equals_its_source(pair: list[Path], tmp_path: Path) -> None:
    report = npt.merge(pair, tmp_path / "out", verify=True)
    assert [info.optimizer for info in report.layers] == ["kept", "kept"]
    weights = read_weights(tmp_path / "out")
    parameters, optimizer, _ = adamw_over(weights)
    optimizer.load_state_dict(load_state(tmp_path / "out")["optimizer_state_dict"])
    position = 0
    for path in pair:
        source = loaded_state(path)["optimizer_state_dict"]["state"]
        for index in range(len(source)):
            state = optimizer.state[parameters[position]]
            assert state.keys() == source[index].keys() == {"step", "exp_avg", "exp_avg_sq"}
            for name, tensor in source[index].items():
                assert state[name].dtype == tensor.dtype
                assert raw(state[name]) == raw(tensor)
            position += 1
    assert position == len(weights) == 27


def test_scalars_come_from_the_longest_run(pair: list[Path], tmp_path: Path) -> None:
    npt.merge(pair, tmp_path / "out")
    merged, base = load_state(tmp_path / "out"), loaded_state(pair[1])
    assert merged["global_step"] == 5
    assert merged["batch_count"] == 20
    assert merged["scheduler_state_dict"] == base["scheduler_state_dict"]
    assert merged["scaler_state_dict"] is None
    group = merged["optimizer_state_dict"]["param_groups"][0]
    expected = base["optimizer_state_dict"]["param_groups"][0]
    assert group["params"] == list(range(27))
    assert {**group, "params": None} == {**expected, "params": None}
    assert type(group["lr"]) is float


def test_a_tie_goes_to_the_first(tmp_path: Path) -> None:
    paths = []
    for layer, count in ((13, 1), (11, 2)):
        weights = layer_weights(layer)
        state = {**adamw_state(weights, steps=4), "batch_count": count}
        paths.append(write_checkpoint(tmp_path / str(layer), weights, training_state=state))
    npt.merge(paths, tmp_path / "out")
    assert load_state(tmp_path / "out")["batch_count"] == 1


def test_an_input_that_gives_no_layer_can_give_the_scalars(tmp_path: Path) -> None:
    """As in the original, the input with the highest step gives them."""
    first = trained_checkpoint(tmp_path / "a", 11, steps=2)
    second = trained_checkpoint(tmp_path / "b", 11, steps=6)
    npt.merge([first, second], tmp_path / "out")
    merged = load_state(tmp_path / "out")
    assert merged["global_step"] == 6
    moments = merged["optimizer_state_dict"]["state"]
    source = loaded_state(first)["optimizer_state_dict"]["state"]
    assert all(torch.equal(moments[n]["exp_avg"], source[n]["exp_avg"]) for n in source)


def test_merge_info_has_int_keys(pair: list[Path], tmp_path: Path) -> None:
    npt.merge(pair, tmp_path / "out")
    assert load_state(tmp_path / "out")["merge_info"] == {
        "merged_from": [str(path) for path in pair],
        "merged_layers": BOTH,
        "layer_sources": {11: str(pair[0]), 13: str(pair[1])},
    }


def test_a_further_step_equals_continuing_each_layer_apart(
    pair: list[Path], tmp_path: Path
) -> None:
    npt.merge(pair, tmp_path / "out")
    weights = read_weights(tmp_path / "out")
    generator = torch.Generator().manual_seed(1)
    gradients = {name: torch.randn(t.shape, generator=generator) for name, t in weights.items()}

    def step(own: Mapping[str, Tensor], state: Mapping[str, Any], lr: float) -> dict[str, Tensor]:
        parameters, optimizer, scheduler = adamw_over(own)
        optimizer.load_state_dict(dict(state["optimizer_state_dict"]))
        scheduler.load_state_dict(dict(state["scheduler_state_dict"]))
        optimizer.param_groups[0]["lr"] = lr
        for name, parameter in zip(own, parameters, strict=True):
            parameter.grad = gradients[name].clone()
        optimizer.step()
        return {name: p.detach() for name, p in zip(own, parameters, strict=True)}

    merged_state = load_state(tmp_path / "out")
    lr = merged_state["optimizer_state_dict"]["param_groups"][0]["lr"]
    together = step(weights, merged_state, lr)
    for path in pair:
        for name, tensor in step(read_weights(path), loaded_state(path), lr).items():
            assert torch.equal(together[name], tensor), name
            assert not torch.equal(tensor, weights[name])


def test_the_scheduler_goes_on(pair: list[Path], tmp_path: Path) -> None:
    npt.merge(pair, tmp_path / "out")
    state = load_state(tmp_path / "out")
    _, optimizer, scheduler = adamw_over(read_weights(tmp_path / "out"))
    optimizer.load_state_dict(state["optimizer_state_dict"])
    scheduler.load_state_dict(state["scheduler_state_dict"])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 / 6)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 / 7)


def test_a_layer_without_state_starts_fresh(tmp_path: Path) -> None:
    bare = write_checkpoint(tmp_path / "bare", layer_weights(2))
    trained = trained_checkpoint(tmp_path / "trained", 11)
    report = npt.merge([bare, trained], tmp_path / "out", verify=True)
    assert [info.optimizer for info in report.layers] == ["fresh", "kept"]
    state = load_state(tmp_path / "out")
    assert sorted(state["optimizer_state_dict"]["state"]) == list(range(9, 18))
    parameters, optimizer, _ = adamw_over(read_weights(tmp_path / "out"))
    optimizer.load_state_dict(state["optimizer_state_dict"])
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert optimizer.state[parameters[0]]["step"] == 1
    assert optimizer.state[parameters[9]]["step"] == 4


def test_parameters_that_were_never_stepped(tmp_path: Path) -> None:
    weights = layer_weights(11)
    state = adamw_state(weights)
    for index in (2, 5):
        del state["optimizer_state_dict"]["state"][index]
    path = write_checkpoint(tmp_path / "a", weights, training_state=state)
    report = npt.merge([path], tmp_path / "out")
    assert report.layers[0].optimizer == "partly fresh"
    merged = load_state(tmp_path / "out")["optimizer_state_dict"]["state"]
    assert sorted(merged) == [0, 1, 3, 4, 6, 7, 8]


def test_no_state_anywhere(tmp_path: Path) -> None:
    paths = [write_checkpoint(tmp_path / str(n), layer_weights(n)) for n in (1, 2)]
    report = npt.merge(paths, tmp_path / "out")
    assert not (tmp_path / "out" / "training_state.pt").exists()
    assert any("No valid training states found" in warning for warning in report.warnings)
    assert report.global_step is None


def test_a_state_without_optimizer(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "a", layer_weights(1), training_state={"global_step": 9})
    report = npt.merge([path, trained_checkpoint(tmp_path / "b", 2, steps=3)], tmp_path / "out")
    assert [info.optimizer for info in report.layers] == ["fresh", "kept"]
    state = load_state(tmp_path / "out")
    assert state["global_step"] == 9
    assert len(state["optimizer_state_dict"]["state"]) == 9


def test_other_fields_and_tensors_are_kept(tmp_path: Path) -> None:
    """A state of the original's base trainer has an epoch, a config and a random state."""
    weights = layer_weights(1)
    extra = {
        "current_epoch": 2,
        "best_val_loss": 0.25,
        "config": {"np_rank": 64, "layers": None},
        "rng": [torch.arange(16, dtype=torch.uint8), {"cuda": torch.randn(3).bfloat16()}],
    }
    path = write_checkpoint(
        tmp_path / "a", weights, training_state={**adamw_state(weights), **extra}
    )
    npt.merge([path], tmp_path / "out", verify=True)
    merged = load_state(tmp_path / "out")
    for name in ("current_epoch", "best_val_loss", "config"):
        assert merged[name] == extra[name]
    assert torch.equal(merged["rng"][0], extra["rng"][0])  # type: ignore[index]
    assert torch.equal(merged["rng"][1]["cuda"], extra["rng"][1]["cuda"])  # type: ignore[index]


def test_weights_only_leaves_everything_out(pair: list[Path], tmp_path: Path) -> None:
    options = npt.MergeOptions(weights_only=True)
    report = npt.merge(pair, tmp_path / "out", verify=True, options=options)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "npt_weights.pt", "config.json", "npt_config.json", "merge_summary.json",
        "merge_digests.txt",
    }  # fmt: skip
    assert {info.optimizer for info in report.layers} == {"left out"}
    assert report.global_step is None


def test_dtype_leaves_moments_alone(pair: list[Path], tmp_path: Path) -> None:
    npt.merge(pair, tmp_path / "out", verify=True, options=npt.MergeOptions(dtype="bfloat16"))
    assert {tensor.dtype for tensor in read_weights(tmp_path / "out").values()} == {torch.bfloat16}
    merged = load_state(tmp_path / "out")["optimizer_state_dict"]["state"]
    source = loaded_state(pair[1])["optimizer_state_dict"]["state"]
    for index in source:
        assert raw(merged[18 + index]["exp_avg"]) == raw(source[index]["exp_avg"])


def test_uniform_pads_moments_with_zeros(pair: list[Path], tmp_path: Path) -> None:
    report = npt.merge(pair, tmp_path / "out", verify=True, options=npt.MergeOptions(uniform=True))
    assert [info.optimizer for info in report.layers] == ["kept", "partly fresh"]
    weights = read_weights(tmp_path / "out")
    moments = load_state(tmp_path / "out")["optimizer_state_dict"]["state"]
    positions = {name: index for index, name in enumerate(weights)}
    for path, layer, component in ((pair[0], 11, 1), (pair[1], 13, 0)):
        source = loaded_state(path)["optimizer_state_dict"]["state"]
        suffix = f".{component}" if layer == 11 else ""
        for index, name in enumerate(read_weights(path)):
            if not name.endswith(suffix):
                continue
            target = moments[positions[name if layer == 11 else f"{name}.0"]]
            for moment in ("exp_avg", "exp_avg_sq"):
                rows, columns = source[index][moment].shape
                assert torch.equal(target[moment][:rows, :columns], source[index][moment])
                assert target[moment].count_nonzero() <= rows * columns
                assert target[moment].shape == weights[name if layer == 11 else f"{name}.0"].shape
            assert target["step"] == source[index]["step"]
    fresh = [i for n, i in positions.items() if n.startswith("layer_13") and n.endswith(".1")]
    assert not set(fresh) & set(moments)


def test_concat_keeps_the_moments_of_both(tmp_path: Path) -> None:
    paths = [
        trained_checkpoint(tmp_path / str(n), 11, steps=n, num_ranks=n, seed=n) for n in (1, 2)
    ]
    npt.merge(paths, tmp_path / "out", options=npt.MergeOptions(on_conflict="concat"))
    names = list(read_weights(tmp_path / "out"))
    moments = load_state(tmp_path / "out")["optimizer_state_dict"]["state"]
    for path, first in ((paths[0], 0), (paths[1], 1)):
        source = loaded_state(path)["optimizer_state_dict"]["state"]
        for index, name in enumerate(read_weights(path)):
            stem, _, component = name.removeprefix("layer_11_np.").partition(".")
            merged = f"layer_11_np.{stem}.{first + int(component or 0)}"
            found = moments[names.index(merged)]
            assert raw(found["exp_avg_sq"]) == raw(source[index]["exp_avg_sq"])
            assert found["step"] == source[index]["step"]


def test_amsgrad_is_kept(tmp_path: Path) -> None:
    weights = layer_weights(1)
    state = adamw_state(weights, amsgrad=True)
    path = write_checkpoint(tmp_path / "a", weights, training_state=state)
    npt.merge([path], tmp_path / "out")
    merged = load_state(tmp_path / "out")["optimizer_state_dict"]["state"]
    source = state["optimizer_state_dict"]["state"]
    assert raw(merged[3]["max_exp_avg_sq"]) == raw(source[3]["max_exp_avg_sq"])


def test_a_step_that_is_a_number(tmp_path: Path) -> None:
    """torch before 1.12 stored steps as Python numbers."""
    weights = layer_weights(1)
    state = adamw_state(weights)
    for slot in state["optimizer_state_dict"]["state"].values():
        slot["step"] = 3
    path = write_checkpoint(tmp_path / "a", weights, training_state=state)
    npt.merge([path], tmp_path / "out")
    assert load_state(tmp_path / "out")["optimizer_state_dict"]["state"][0]["step"] == 3


# what is refused --------------------------------------------------------------------------------


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
    assert "--weights-only" in message and "\n" not in message
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
    with pytest.raises(npt.NPTError, match="--weights-only"):
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
    with pytest.raises(npt.CheckpointError, match=r"amsgrad.*--weights-only"):
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


# multi_layer_state.pt ---------------------------------------------------------------------------


def curriculum(directory: Path) -> dict[str, Any]:
    state = torch.load(directory / "multi_layer_state.pt", weights_only=True)
    assert isinstance(state, dict)
    return state


def test_the_curriculum_is_written_for_the_merged_layers(tmp_path: Path) -> None:
    stage = {"name": "mixed", "until_step": 7, "mixing_ratio": 0.5}
    states = {
        11: multi_layer_state([11, 12], layer_weights={11: 0.25, 12: 0.5}),
        13: multi_layer_state([13], layer_weights={13: 2.0}, curriculum_schedule=[stage]),
        15: multi_layer_state([15], layer_weights={}),
    }
    paths = []
    for layer, state in states.items():
        weights = layer_weights(layer)
        path = write_checkpoint(
            tmp_path / str(layer),
            weights,
            training_state=adamw_state(weights, steps=9 if layer == 13 else 2),
            multi_layer_state=state,
        )
        paths.append(path)
    paths.append(write_checkpoint(tmp_path / "none", layer_weights(17)))
    npt.merge(paths, tmp_path / "out", verify=True)
    merged = curriculum(tmp_path / "out")
    assert merged["layers_to_train"] == [11, 13, 15, 17]
    assert merged["layer_weights"] == {11: 0.25, 13: 2.0, 15: 1.0, 17: 1.0}
    # of the run that also gives the step: the stages belong to its clock
    assert merged["curriculum_schedule"] == [stage]
    assert merged["teacher_cache_hits"] == 0


def test_a_curriculum_of_one_input_serves_all(tmp_path: Path) -> None:
    first = write_checkpoint(tmp_path / "a", layer_weights(1))
    second = write_checkpoint(
        tmp_path / "b", layer_weights(2), multi_layer_state=multi_layer_state([2])
    )
    npt.merge([first, second], tmp_path / "out")
    assert curriculum(tmp_path / "out")["layers_to_train"] == [1, 2]


def test_no_curriculum_no_file(tmp_path: Path) -> None:
    npt.merge([write_checkpoint(tmp_path / "a", layer_weights(1))], tmp_path / "out")
    assert not (tmp_path / "out" / "multi_layer_state.pt").exists()


def test_copy_multi_layer_state(pair: list[Path], tmp_path: Path) -> None:
    template = tmp_path / "template.pt"
    torch.save(multi_layer_state([99], current_stage_index=4), template)
    options = npt.MergeOptions(copy_multi_layer_state=template)
    npt.merge(pair, tmp_path / "out", verify=True, options=options)
    merged = curriculum(tmp_path / "out")
    assert merged["current_stage_index"] == 4
    assert merged["layers_to_train"] == BOTH


def missing(path: Path) -> None: ...


def a_folder(path: Path) -> None:
    path.mkdir()


def no_layers(path: Path) -> None:
    torch.save({"layer_weights": {}}, path)


def odd_weights(path: Path) -> None:
    torch.save({"layers_to_train": [1], "layer_weights": [1.0]}, path)


def with_tensor(path: Path) -> None:
    torch.save(multi_layer_state([1], extra=torch.zeros(3)), path)


def garbage(path: Path) -> None:
    path.write_bytes(b"garbage" * 50)


@pytest.mark.parametrize(
    "make",
    [missing, a_folder, no_layers, odd_weights, with_tensor, garbage],
    ids=lambda make: make.__name__,
)
def test_a_bad_curriculum_is_refused(
    pair: list[Path], tmp_path: Path, make: Callable[[Path], None]
) -> None:
    template = tmp_path / "template.pt"
    make(template)
    options = npt.MergeOptions(copy_multi_layer_state=template)
    with pytest.raises(npt.CheckpointError) as caught:
        npt.merge(pair, tmp_path / "out", options=options)
    assert str(template) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_inputs_are_never_touched(pair: list[Path], tmp_path: Path) -> None:
    before = [contents(path) for path in pair]
    npt.merge(pair, tmp_path / "out", verify=True)
    assert [contents(path) for path in pair] == before


# --- what other programs leave in a state


def with_state(path: Path, layer: int, state: Mapping[str, Any]) -> Path:
    return write_checkpoint(path, layer_weights(layer), training_state=state)


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


def stepped(layer: int, **options: Any) -> dict[str, Any]:
    """The state dict of an AdamW after one step over a layer's weights."""
    parameters = [torch.nn.Parameter(tensor) for tensor in layer_weights(layer).values()]
    optimizer = torch.optim.AdamW(parameters, **options)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer.state_dict()


def unstepped() -> dict[str, Any]:
    parameters = [torch.nn.Parameter(tensor) for tensor in layer_weights(11).values()]
    return torch.optim.AdamW(parameters).state_dict()


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


# --- the right file


class Sources:
    """Random inputs; every number in their states identifies its input."""

    def __init__(self, seed: int, root: Path) -> None:
        self.dice = random.Random(seed)
        self.root = root
        self.layers: list[list[int]] = []
        self.steps: list[int] = []
        self.has_optimizer: list[bool] = []

    def number(self, origin: int) -> float:
        """The integer part of a number is the index of its input, plus 1."""
        return origin + 1 + self.dice.randrange(1, 8) / 8

    def leaf(self, origin: int) -> Any:
        value = self.number(origin)
        return self.dice.choice([
            value, torch.tensor(value), torch.full((3,), value, dtype=torch.float64),
            [value, torch.tensor(value)], {"deep": (torch.tensor(value), {"er": value})},
        ])  # fmt: skip

    def write(self, origin: int, layers: list[int]) -> str:
        dice = self.dice
        weights: dict[str, Tensor] = {}
        for layer in layers:
            weights |= layer_weights(layer, num_ranks=dice.choice([1, 2]), seed=origin)
        state: dict[str, Any] = {"global_step": dice.randrange(1, 5)}
        for key in ("scheduler_state_dict", "scaler_state_dict", "data_state"):
            if dice.random() < 0.6:
                state[key] = {"own": self.leaf(origin), "more": [self.leaf(origin)]}
        optimizer = dice.random() < 0.7
        if optimizer:
            moments = {
                index: {
                    "step": torch.tensor(self.number(origin)),
                    "exp_avg": torch.full(tensor.shape, self.number(origin)),
                    "exp_avg_sq": torch.full(tensor.shape, self.number(origin)),
                }
                for index, tensor in enumerate(weights.values())
                if dice.random() < 0.8
            }
            betas = (self.number(origin), torch.tensor(self.number(origin)))
            group = {
                "lr": self.leaf(origin), "betas": betas, "eps": self.leaf(origin),
                "weight_decay": self.number(origin), "params": list(range(len(weights))),
            }  # fmt: skip
            state["optimizer_state_dict"] = {"state": moments, "param_groups": [group]}
        self.layers.append(layers)
        self.steps.append(state["global_step"])
        self.has_optimizer.append(optimizer)
        items = list(state.items())
        dice.shuffle(items)
        return str(with_weights(self.root / str(origin), weights, dict(items)))


def with_weights(path: Path, weights: dict[str, Tensor], state: dict[str, Any]) -> Path:
    return write_checkpoint(path, weights, training_state=state)


def origins(value: Any) -> set[int]:
    """The inputs that the numbers in nested data come from."""
    if isinstance(value, Tensor):
        return {int(number) - 1 for number in value.flatten().tolist()}
    if isinstance(value, dict):
        return set().union(*(origins(item) for item in value.values()))
    if isinstance(value, (list, tuple)):
        return set().union(*(origins(item) for item in value))
    return {int(value) - 1}


@pytest.mark.parametrize("seed", range(30))
def test_every_leaf_comes_from_the_input_that_the_rules_name(tmp_path: Path, seed: int) -> None:
    sources = Sources(seed, tmp_path)
    dice = sources.dice
    given = [
        sources.write(origin, sorted(dice.sample(range(4), dice.randrange(1, 4))))
        for origin in range(dice.randrange(2, 5))
    ]
    policy = dice.choice(["first", "last"])
    npt.merge(given, tmp_path / "out", verify=True, options=npt.MergeOptions(on_conflict=policy))
    merged = load_state(tmp_path / "out")

    everyone = range(len(given))
    base = max(everyone, key=lambda origin: (sources.steps[origin], -origin))
    assert merged["global_step"] == sources.steps[base]
    for key in ("scheduler_state_dict", "scaler_state_dict", "data_state"):
        assert origins(merged.get(key, {})) <= {base}
    stepped_inputs = [origin for origin in everyone if sources.has_optimizer[origin]]
    if not stepped_inputs:
        assert "optimizer_state_dict" not in merged
        return
    group = max(stepped_inputs, key=lambda origin: (sources.steps[origin], -origin))
    (found,) = merged["optimizer_state_dict"]["param_groups"]
    assert origins({k: v for k, v in found.items() if k != "params"}) == {group}

    holders = everyone if policy == "last" else reversed(everyone)
    owner = {layer: origin for origin in holders for layer in sources.layers[origin]}
    for index, name in enumerate(read_weights(tmp_path / "out")):
        layer = int(name.removeprefix("layer_").split("_")[0])
        state = merged["optimizer_state_dict"]["state"].get(index, {})
        assert origins(state) <= {owner[layer]}
        assert not state or sources.has_optimizer[owner[layer]]


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
    assert "--on-bad-state skip" in message and "--weights-only" in message
    report = npt.merge(
        inputs, tmp_path / "out", verify=True, options=npt.MergeOptions(on_bad_state="skip")
    )
    assert [info.optimizer for info in report.layers] == ["fresh", "kept"]
    assert report.global_step == 3
    (warning,) = (line for line in report.warnings if "training_state" in line)
    assert told in warning and warning.endswith("its layers start with a fresh optimizer")
    again = npt.verify(tmp_path / "out")
    assert again.passed and again.compared == 18 + 9 * 3


def test_a_bad_curriculum_can_be_skipped_alone(tmp_path: Path) -> None:
    path = trained_checkpoint(tmp_path / "a", 11)
    torch.save({"layers_to_train": [11], "layer_weights": [1]}, path / "multi_layer_state.pt")
    report = npt.merge(
        [path], tmp_path / "out", options=npt.MergeOptions(on_bad_state="skip"), verify=True
    )
    assert [info.optimizer for info in report.layers] == ["kept"]
    assert any("its curriculum is left out" in line for line in report.warnings)
    assert not (tmp_path / "out" / "multi_layer_state.pt").exists()


# --- curricula that went through JSON


@pytest.mark.parametrize("layers", [["11", "13"], [11.0, 13.0], ("11", 13)])
@pytest.mark.parametrize("weights", [{"11": 0.25, "13": 0.5}, {11: 0.25, "13": 0.5},
                                     {"11": 0.25, 11: 0.25, 13: 0.5}])  # fmt: skip
def test_layers_may_be_text(tmp_path: Path, layers: list[Any], weights: dict[Any, float]) -> None:
    path = write_checkpoint(
        tmp_path / "a",
        {**layer_weights(11), **layer_weights(13)},
        multi_layer_state={"layers_to_train": layers, "layer_weights": weights},
    )
    npt.merge([path], tmp_path / "out", verify=True)
    merged = torch.load(tmp_path / "out" / "multi_layer_state.pt", weights_only=True)
    assert merged == {"layers_to_train": [11, 13], "layer_weights": {11: 0.25, 13: 0.5}}
    found = npt.inspect(path).multi_layer_state
    assert found is not None and found["layers_to_train"] == [11, 13]


@pytest.mark.parametrize(("state", "told"), [
    ({"layers_to_train": [11], "layer_weights": {"11": 0.25, 11: 0.5}}, "two weights of layer 11"),
    ({"layers_to_train": [11], "layer_weights": {"eleven": 1.0}}, "'eleven' is not the index"),
    ({"layers_to_train": [11], "layer_weights": {"-1": 1.0}}, "'-1' is not the index"),
    ({"layers_to_train": "11"}, "layers_to_train are not a list"),
    ({"layers_to_train": [11], "layer_weights": {11: torch.tensor(0.25)}},
     "layer_weights.11: is a tensor"),
    ({"layers_to_train": [11.5]}, "11.5 is not the index of a layer"),
    ({"layers_to_train": [True]}, "True is not the index of a layer"),
])  # fmt: skip
def test_other_layers_are_refused_by_name(tmp_path: Path, state: dict[str, Any], told: str) -> None:
    path = write_checkpoint(tmp_path / "a", layer_weights(11), multi_layer_state=state)
    with pytest.raises(npt.CheckpointError, match=told):
        npt.merge([path], tmp_path / "out")
