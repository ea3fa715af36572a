"""Projections in int8: as compressed-tensors writes them, and as plain PyTorch computes.

Weights have one scale for each output, and inputs one for each token.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "all": {
            "targets": ["Linear"],
            "weights": {**_INT8, "strategy": "channel", "dynamic": False},
            "input_activations": {**_INT8, "strategy": "token", "dynamic": True},
        }
    },
}


# oneDNN adds two products in 16 bits where the CPU has no VNNI, and larger weights would overflow
WEIGHT_LIMIT, INPUT_LIMIT = 63, 127


def quantised(rows: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Integers up to a limit, as floats, and the scale of each row, ``(..., 1)``."""
    scale = rows.abs().amax(-1, keepdim=True) / limit
    return (rows / scale).round(), scale


def write_quantised(folder: Path) -> None:
    """Make the projections of the model in a folder int8."""
    weights = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        weights[name] = weight
        if name.endswith("_proj.weight"):
            integers, weights[f"{name}_scale"] = quantised(weight, WEIGHT_LIMIT)
            weights[name] = integers.to(torch.int8)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": CONFIG}))


@torch.no_grad()
def imitate(model: nn.Module) -> None:
    """Make the projections of a model compute what int8 projections compute, in its own dtype."""

    def rounded(_: nn.Module, args: tuple[Tensor, ...]) -> Any:
        integers, scale = quantised(args[0], INPUT_LIMIT)
        return (integers * scale, *args[1:])

    for name, module in model.named_modules():
        if name.endswith("_proj") and isinstance(module, nn.Linear):
            integers, scale = quantised(module.weight, WEIGHT_LIMIT)
            module.weight.copy_(integers * scale)
            module.register_forward_pre_hook(rounded)
