"""The expected effect of `inject`, and the tolerance of comparisons."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from npt_fast.config import InjectionMode
from npt_fast.transfer.modulation import Modulation
from tests.transfer.models import (
    TEXT,
    Vectors,
    ids_of,
    mixed,
    spelled_out,
)

IDS = ids_of(TEXT)  # "the red house", 13 tokens
MODES: tuple[InjectionMode, ...] = ("replace", "blend", "add", "exact-blend", "exact-add")


def close(actual: Tensor, expected: Tensor) -> None:
    """Equal within 1e-9 in float64, and within 1e-5 where `generate` returned float32."""
    tolerance = 1e-9 if actual.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=tolerance, atol=tolerance)


@contextmanager
def truth(
    model: Any,
    modulations: Modulation | list[Modulation | None],
    places: list[list[int]],
    mode: InjectionMode = "replace",
    strength: float = 1.0,
) -> Iterator[None]:
    """Apply the definition of `inject` with dense weights; `places` are columns, by row."""

    def rule(layer: int, row: int, t: int, name: str, own: Vectors | None) -> Tensor | None:
        m = modulations if isinstance(modulations, Modulation) else modulations[row]
        if m is None or t not in places[row] or name not in m.layers.get(layer, {}):
            return None
        return mixed(mode, strength, m.layers[layer][name], own)

    with spelled_out(model, rule):
        yield
