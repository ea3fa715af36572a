"""Names of NPT tensors: both spellings, and nothing else."""

from __future__ import annotations

import pytest

from npt_fast.checkpoint.keys import NPTKey, parse_key
from tests.checkpoints import PROJECTIONS, layer_weights

NAMES = {
    "W_down": ("", "W_down", None),
    "W_a_up": ("", "W_a_up", None),
    "W_b_up.3": ("", "W_b_up", 3),
    "W_down_gate": ("gate", "W_down", None),
    "W_down_up": ("up", "W_down", None),
    "W_down_down.0": ("down", "W_down", 0),
    "W_a_up_up.12": ("up", "W_a_up", 12),
    "W_a_up_down": ("down", "W_a_up", None),
    "W_b_up_up": ("up", "W_b_up", None),
    "W_b_up_gate.99999": ("gate", "W_b_up", 99999),
}


@pytest.mark.parametrize("prefix", ["layer_{}_np.", "model.layers.{}.np_component."])
@pytest.mark.parametrize("layer", [0, 7, 11, 127])
@pytest.mark.parametrize("name", NAMES)
def test_both_spellings_are_read_and_the_first_is_written(
    prefix: str, layer: int, name: str
) -> None:
    projection, stem, component = NAMES[name]
    key = parse_key(prefix.format(layer) + name)
    assert key == NPTKey(layer, projection, stem, component)
    assert str(key) == f"layer_{layer}_np.{name}"


@pytest.mark.parametrize("modulation", PROJECTIONS)
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_every_name_the_original_writes_survives(modulation: str, num_ranks: int) -> None:
    for name in layer_weights(5, modulation=modulation, num_ranks=num_ranks):
        assert str(parse_key(name)) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "W_down",
        "layer_3_np",
        "layer_3_np.",
        "xlayer_3_npfoo",
        "xlayer_3_np.W_down",
        "layer_3_np.W_down.x",
        "layer_3_np.W_down ",
        "layer_3_np.W_down\n",
        "layer_3_npXW_down",
        "layer_3_np.W_down.gate",
        "layer_3_np.W_down_gate.00",
        "layer_3_np.W_down_gate.-1",
        "layer_3_np.W_down_gate.1.2",
        "layer_3_np.W_down_gate_up",
        "layer_3_np.W_c_up_gate",
        "layer_3_np.w_down",
        "layer_03_np.W_down",
        "layer_-3_np.W_down",
        "layer_123456_np.W_down",
        "layer_٣_np.W_down",
        "layer_3_np.W_down_gate.٣",
        "model.layers.3.np_component",
        "model.layers.3.np_componentXW_down",
        "module.model.layers.3.np_component.W_down",
        "model.layers.3.mlp.gate_proj.weight",
    ],
)
def test_anything_else_is_no_key(name: str) -> None:
    assert parse_key(name) is None
