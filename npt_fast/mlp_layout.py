"""How an MLP names its projections, and which of them are one matrix."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from npt_fast.checkpoint.keys import PROJECTIONS, modulated
from npt_fast.errors import OptionError
from npt_fast.kernels.factored import MLPWeights


@dataclass(frozen=True)
class MLPLayout:
    """The submodules of an MLP, ``down(activation(gate(h)) * up(h))``.

    A plain MLP has no gate: ``down(activation(up(h)))``.

    Attributes:
        gate: name of gate. If it is that of up, both are one matrix, gate's rows first. None if the
            MLP is plain.
        up: name of up.
        down: name of down.
        activation: name of the activation, which an MLP may lack.
    """

    gate: str | None = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    activation: str = "act_fn"

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the projections' modules, each once."""
        return tuple(dict.fromkeys(filter(None, (self.gate, self.up, self.down))))

    @property
    def projections(self) -> tuple[str, ...]:
        """The projections, in order."""
        return PROJECTIONS if self.gate else PROJECTIONS[1:]

    @property
    def joined(self) -> bool:
        """Whether gate and up are one matrix."""
        return self.gate == self.up

    @property
    def formula(self) -> str:
        """What the MLP computes, for messages."""
        if self.gate is None:
            return f"{self.down}(activation({self.up}(x)))"
        if self.joined:
            return f"{self.down}(activation(gate) * up) with gate, up = {self.gate}(x)"
        return f"{self.down}(activation({self.gate}(x)) * {self.up}(x))"

    def modulation(self, wanted: str) -> str:
        """The modulation type that is meant: ``"triple"`` is all projections that the MLP has."""
        return "plain" if self.gate is None and wanted == "triple" else wanted

    def check(self, modulation: str) -> None:
        """Raise OptionError unless a modulation type is for this kind of MLP."""
        needs_gate = "gate" in modulated(modulation)
        if needs_gate and self.gate is None:
            raise OptionError(f"modulation {modulation} needs an MLP with a gate; take plain")
        if not needs_gate and self.gate is not None:
            raise OptionError(
                f"modulation {modulation} is for an MLP without a gate; take single, dual or triple"
            )

    def rows(self, projection: str, tensor: Tensor) -> Tensor:
        """Rows of a module's weight, ``(out, in)``, or bias that are a projection's; a view."""
        if projection == "down" or not self.joined:
            return tensor
        return tensor.chunk(2)[projection == "up"]

    def weights(self, mlp: Any) -> MLPWeights:
        """Weights and biases of a gated MLP of linear layers; of a joined matrix they are views."""
        modules = [(p, getattr(mlp, getattr(self, p))) for p in PROJECTIONS]
        biases = (None if m.bias is None else self.rows(p, m.bias) for p, m in modules)
        return MLPWeights(*(self.rows(p, m.weight) for p, m in modules), *biases)

    def widths(self, mlp: Any) -> tuple[int, int]:
        """Model width D and MLP width F."""
        return _inputs(getattr(mlp, self.up)), _inputs(getattr(mlp, self.down))

    def fits(self, mlp: nn.Module | None) -> bool:
        """Whether a module has these projections."""
        return all(isinstance(getattr(mlp, name, None), nn.Module) for name in self.names)


def _inputs(projection: Any) -> int:
    """Number of inputs of a projection; GPT-2's Conv1D has a name of its own for it."""
    count: int = projection.in_features if hasattr(projection, "in_features") else projection.nx
    return count


GATED = MLPLayout()
"""Llama's MLP, and that of most models."""
