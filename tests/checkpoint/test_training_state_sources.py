"""Every part of a merged training state comes from the right input."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import npt_fast as npt
from tests.checkpoints import layer_weights, load_state, read_weights, write_checkpoint


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
