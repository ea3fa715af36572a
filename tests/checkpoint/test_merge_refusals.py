"""Inputs that do not belong together or are not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import npt_fast as npt
from tests.checkpoint.merging import json_of, one_layer, refuse
from tests.checkpoints import layer_weights, write_checkpoint


@pytest.mark.parametrize(
    ("name", "size"), [("hidden_size", {"d": 18}), ("intermediate_size", {"f": 26})]
)
def test_another_base_model(tmp_path: Path, name: str, size: dict[str, int]) -> None:
    inputs = [one_layer(tmp_path / "a", 1), one_layer(tmp_path / "b", 2, **size)]
    refuse(tmp_path, inputs, f"layer 2 was trained on another base model: {name}")
    refuse(tmp_path, inputs, name, allow_different_base=True)


def test_another_model_name(tmp_path: Path) -> None:
    inputs = [
        write_checkpoint(tmp_path / name, layer_weights(n), config={"model_name": name})
        for n, name in enumerate(("meta/a", "b"))
    ]
    refuse(tmp_path, inputs, "model_name is 'meta/a' in .* 'b' in .*--allow_different_base")
    options = npt.MergeOptions(allow_different_base=True)
    npt.merge(inputs, tmp_path / "out", options=options)
    assert json_of(tmp_path / "out" / "config.json")["model_name"] == "meta/a"


def test_a_name_that_only_one_input_knows(tmp_path: Path) -> None:
    first = one_layer(tmp_path / "a", 1)
    second = write_checkpoint(tmp_path / "b", layer_weights(2), config={"model_name": "m"})
    npt.merge([first, second], tmp_path / "out")
    assert npt.inspect(tmp_path / "out").model_name == "m"


def test_another_number_of_layers(tmp_path: Path) -> None:
    inputs = []
    for n, layers in ((1, 30), (2, 16)):
        path = one_layer(tmp_path / str(n), n)
        base = {"format_version": 1, "base_model": {"num_hidden_layers": layers}}
        (path / "npt_config.json").write_text(json.dumps(base))
        inputs.append(path)
    refuse(tmp_path, inputs, "num_hidden_layers is 30 in .* and 16 in", allow_different_base=True)


def test_inputs_that_are_not_there(tmp_path: Path) -> None:
    present = one_layer(tmp_path / "a", 1)
    refuse(tmp_path, [present, tmp_path / "missing"], "Checkpoint not found: .*missing")
    refuse(tmp_path, [present, tmp_path], "NPT weights not found at")
    refuse(tmp_path, [], "no checkpoints given")
