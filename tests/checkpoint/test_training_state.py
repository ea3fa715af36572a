"""A merged training state is one that AdamW, the scheduler and torch.load accept and continue."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import npt_fast as npt
from tests.checkpoint.training_states import BOTH, adamw_over, loaded_state
from tests.checkpoints import (
    adamw_state,
    contents,
    layer_weights,
    load_state,
    raw,
    read_weights,
    trained_checkpoint,
    write_checkpoint,
)


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


def test_inputs_are_never_touched(pair: list[Path], tmp_path: Path) -> None:
    before = [contents(path) for path in pair]
    npt.merge(pair, tmp_path / "out", verify=True)
    assert [contents(path) for path in pair] == before
