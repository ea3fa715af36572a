"""The rates of `RelativeAdamW` written out by the original's names (design.md#learning-rate)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from npt_fast.hf.convert import components


def named(model: Any) -> dict[str, Tensor]:
    """Views of the parameters by the original's names."""
    return {
        f"layer_{n}_np.{name}": view
        for n, component in components(model).items()
        for name, view in component.split().items()
    }


def rates(weights: Mapping[str, Tensor], lr: float) -> dict[str, float]:
    """The rate of each tensor, from all tensors of its layer before the step."""
    sizes: dict[tuple[str, bool], list[Tensor]] = {}
    for name, tensor in weights.items():
        sizes.setdefault(_group(name), []).append(tensor.detach().double().flatten())
    found = {}
    for name in weights:
        size = torch.cat(sizes[_group(name)]).square().mean().sqrt().item()
        found[name] = lr * (size / 0.02 if "W_down" in name else min(size / 0.02, 1.0))
    return found


@torch.no_grad()
def relative_step(optimizer: torch.optim.AdamW, weights: Mapping[str, Tensor]) -> None:
    """A step of plain AdamW, of which each tensor keeps the share that its own rate has."""
    before = {name: tensor.detach().clone() for name, tensor in weights.items()}
    optimizer.step()
    for name, share in rates(before, 1.0).items():
        weights[name].copy_(before[name] + share * (weights[name] - before[name]))


def _group(name: str) -> tuple[str, bool]:
    return name.partition("_np.")[0], "W_down" in name
