"""The modulated MLP in float64, straight from the definition (design.md#definition).

It is independent of the code under test and slow on purpose: it looks names up one by one, and
forms the vectors of every token. Tests compare everything with it that must not change a function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu

Weights = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Situation:
    """A base MLP in Hugging Face layout, and its inputs.

    Attributes:
        attention: attention output, ``[tokens, d]``.
        x: MLP input, ``[tokens, d]``.
        gate: weight of gate, ``[f, d]``.
        up: weight of up, ``[f, d]``.
        down: weight of down, ``[d, f]``.
    """

    attention: Tensor
    x: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor

    @classmethod
    def random(cls, *, d: int = 16, f: int = 24, tokens: int = 7, seed: int = 0) -> Situation:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        return cls(
            attention=normal(tokens, d),
            x=normal(tokens, d),
            gate=normal(f, d),
            up=normal(f, d),
            down=normal(d, f),
        )


def vectors(
    weights: Weights, layer: int, projection: str, attention: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """(v_a, v_b) of every component of one projection; none if the layer does not modulate it."""
    stem = f"layer_{layer}_np.{{}}"
    names = [f"{{}}_{projection}"]
    if projection == "gate":
        names.append("{}")  # single modulation modulates the gate and does not name it
    found = []
    for name in names:
        full = stem.format(name)
        if full.format("W_down") in weights:
            suffixes = [""]
        else:
            count = sum(key.startswith(full.format("W_down") + ".") for key in weights)
            suffixes = [f".{component}" for component in range(count)]
        for suffix in suffixes:
            down, a_up, b_up = (
                weights[full.format(part) + suffix].double()
                for part in ("W_down", "W_a_up", "W_b_up")
            )
            z = attention @ down
            found.append((z @ a_up, z @ b_up))
    return found


def delta(weights: Weights, layer: int, projection: str, attention: Tensor, x: Tensor) -> Tensor:
    """What the weight change of one projection adds to its output: sum of v_b (v_a . x)."""
    total = torch.zeros((), dtype=torch.float64)
    for v_a, v_b in vectors(weights, layer, projection, attention):
        total = total + v_b * (v_a * x).sum(-1, keepdim=True)
    return total


def modulated_mlp(
    modules: Sequence[Weights], layer: int, where: Situation, scale: float = 1.0
) -> Tensor:
    """The MLP under the weight changes of all modules together, each times `scale`."""

    def change(projection: str, x: Tensor) -> Tensor:
        deltas = [delta(weights, layer, projection, where.attention, x) for weights in modules]
        return scale * sum(deltas, torch.zeros((), dtype=torch.float64))

    gate = where.x @ where.gate.T + change("gate", where.x)
    up = where.x @ where.up.T + change("up", where.x)
    m = silu(gate) * up
    return m @ where.down.T + change("down", m)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest value."""
    return float((actual - expected).abs().max() / expected.abs().max())
