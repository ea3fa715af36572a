"""Make checkpoints as the original writes them, with torch, for tests and benchmarks.

Independent of the code under test: keys and shapes are written out here once more (SPEC 1.1, 2).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

PROJECTIONS = {"single": [""], "dual": ["_gate", "_up"], "triple": ["_gate", "_up", "_down"]}


def layer_weights(
    layer: int,
    *,
    d: int = 16,
    f: int = 24,
    rank: int = 4,
    num_ranks: int = 1,
    modulation: str = "triple",
    dtype: torch.dtype = torch.float32,
    seed: int | None = None,
    prefix: str = "layer_{}_np.",
) -> dict[str, torch.Tensor]:
    """Random weights of one layer, keys in the order in which the original saves them."""
    generator = torch.Generator().manual_seed(layer if seed is None else seed)
    weights = {}
    for projection in PROJECTIONS[modulation]:
        wide = (f, d) if projection == "_down" else (d, f)
        shapes = {"W_down": (d, rank), "W_a_up": (rank, wide[0]), "W_b_up": (rank, wide[1])}
        for stem, shape in shapes.items():
            for component in range(num_ranks):
                suffix = f".{component}" if num_ranks > 1 else ""
                name = f"{prefix.format(layer)}{stem}{projection}{suffix}"
                weights[name] = torch.randn(shape, generator=generator).to(dtype)
    return weights


def adamw_state(
    weights: Mapping[str, torch.Tensor], *, steps: int = 3, lr: float = 1e-3, seed: int = 0
) -> dict[str, Any]:
    """A training state from real AdamW steps over the weights in key order, random gradients."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [torch.nn.Parameter(tensor.clone().float()) for tensor in weights.values()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        scheduler.step()
    return {
        "global_step": steps,
        "batch_count": 4 * steps,
        "optimizer_state_dict": optimizer.state_dict(),
        "scheduler_state_dict": scheduler.state_dict(),
        "scaler_state_dict": None,
    }


def write_checkpoint(
    directory: Path,
    weights: Mapping[str, torch.Tensor],
    *,
    training_state: Mapping[str, Any] | None = None,
    multi_layer_state: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """A checkpoint directory in the original's layout."""
    directory.mkdir(parents=True)
    torch.save(dict(weights), directory / "npt_weights.pt")
    if training_state is not None:
        torch.save(dict(training_state), directory / "training_state.pt")
    if multi_layer_state is not None:
        torch.save(dict(multi_layer_state), directory / "multi_layer_state.pt")
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config, indent=2))
    return directory
