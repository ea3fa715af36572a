"""The tensors of a layer are a complete module of one architecture, or refused by name."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

import npt_fast as npt
from npt_fast.checkpoint.checkpoint import open_checkpoint
from npt_fast.checkpoint.np_module import Architecture
from tests.checkpoints import PROJECTIONS, layer_weights, write_checkpoint

ALL = list(itertools.product(PROJECTIONS, [1, 2, 17]))


@pytest.mark.parametrize(("modulation", "num_ranks"), ALL)
def test_architecture_is_read_from_the_tensors(
    tmp_path: Path, modulation: str, num_ranks: int
) -> None:
    weights = layer_weights(4, d=10, f=12, rank=3, num_ranks=num_ranks, modulation=modulation)
    shuffled = dict(sorted(weights.items(), reverse=True))
    module = open_checkpoint(str(write_checkpoint(tmp_path / "a", shuffled))).modules[4]
    assert module.architecture == Architecture(modulation, num_ranks, 3, 10, 12)
    assert module.numel == sum(tensor.numel() for tensor in weights.values())
    # parameter order is that of the original, whatever the order in the file
    assert [entry.name for entry in module.tensors.values()] == list(weights)
    assert module.architecture.names(4) == list(weights)


def test_layers_may_differ(tmp_path: Path) -> None:
    weights = {
        **layer_weights(13, rank=2, num_ranks=3, modulation="dual"),
        **layer_weights(2, rank=5, modulation="single"),
    }
    modules = open_checkpoint(str(write_checkpoint(tmp_path / "a", weights))).modules
    assert list(modules) == [2, 13]
    assert modules[2].architecture == Architecture("single", 1, 5, 16, 24)
    assert modules[13].architecture == Architecture("dual", 3, 2, 16, 24)


def test_a_single_numbered_component_loses_its_number(tmp_path: Path) -> None:
    """The original writes and reads the name of an only component without a number."""
    weights = layer_weights(3)
    numbered = {f"{name}.0": tensor for name, tensor in weights.items()}
    npt.merge([write_checkpoint(tmp_path / "a", numbered)], tmp_path / "out")
    merged = torch.load(tmp_path / "out" / "npt_weights.pt", weights_only=True)
    assert list(merged) == list(weights)


def refusal(tmp_path: Path, weights: Mapping[str, torch.Tensor]) -> str:
    path = write_checkpoint(tmp_path / "broken", weights)
    with pytest.raises(npt.CheckpointError) as caught:
        npt.merge([path], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


@pytest.mark.parametrize("missing", layer_weights(11, num_ranks=2))
def test_every_missing_tensor_is_named(tmp_path: Path, missing: str) -> None:
    weights = layer_weights(11, num_ranks=2)
    del weights[missing]
    message = refusal(tmp_path, weights)
    assert "layer 11 is incomplete" in message
    assert missing in message


@pytest.mark.parametrize("name", layer_weights(11))
@pytest.mark.parametrize("axis", [0, 1])
def test_every_wrong_shape_is_named(tmp_path: Path, name: str, axis: int) -> None:
    weights = layer_weights(11)
    shape = list(weights[name].shape)
    shape[axis] += 1
    weights[name] = torch.zeros(shape)
    message = refusal(tmp_path, weights)
    assert "layer 11 has a tensor of the wrong shape" in message
    if name not in ("layer_11_np.W_down_gate", "layer_11_np.W_b_up_gate"):
        assert name in message  # these two tensors determine the shapes of all others


GATE, UP = "layer_11_np.W_down_gate", "layer_11_np.W_a_up_up"
FORM_2 = "model.layers.11.np_component.W_down_gate"
FAR = "layer_12_np.W_down_gate.99999"
NO_MODULE = {
    "unknown-key": ("lm_head.weight", torch.zeros(2, 2), "lm_head.weight"),
    "single-in-dual": ("layer_11_np.W_down", torch.zeros(16, 4), "incomplete"),
    "with-and-without-number": (f"{GATE}.0", torch.zeros(16, 4), "incomplete"),
    "both-spellings": (FORM_2, torch.zeros(16, 4), "twice"),
    "one-axis": (GATE, torch.zeros(16), GATE),
    "three-axes": (GATE, torch.zeros(1, 16, 4), GATE),
    "no-axes": (GATE, torch.zeros(()), GATE),
    "empty": (GATE, torch.zeros(0, 4), GATE),
    "int64": (GATE, torch.zeros(16, 4, dtype=torch.int64), f"{GATE} is I64"),
    "bool": (UP, torch.zeros(4, 16, dtype=torch.bool), f"{UP} is BOOL"),
    "complex": (UP, torch.zeros(4, 16, dtype=torch.complex64), f"{UP} is C64"),
    "far-component": (FAR, torch.zeros(16, 4), "layer 12 is incomplete"),
}


@pytest.mark.parametrize("case", NO_MODULE)
def test_what_is_no_module_is_refused(tmp_path: Path, case: str) -> None:
    name, tensor, expected = NO_MODULE[case]
    weights = {**layer_weights(11, modulation="dual"), name: tensor}
    assert expected in refusal(tmp_path, weights)


def test_no_layers_at_all(tmp_path: Path) -> None:
    assert "holds no NPT layers" in refusal(tmp_path, {})


@pytest.mark.parametrize("value", [1.5, "text", None, [1, 2], {"a": torch.zeros(1)}], ids=repr)
def test_values_that_are_no_tensors(tmp_path: Path, value: object) -> None:
    directory = tmp_path / "broken"
    directory.mkdir()
    torch.save({**layer_weights(1), "extra": value}, directory / "npt_weights.pt")
    with pytest.raises(npt.CheckpointError, match="'extra' is not a named tensor"):
        npt.inspect(directory)
