"""The curriculum of a merge, `multi_layer_state.pt`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import npt_fast as npt
from tests.checkpoint.training_states import BOTH
from tests.checkpoints import (
    adamw_state,
    layer_weights,
    multi_layer_state,
    trained_checkpoint,
    write_checkpoint,
)


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
