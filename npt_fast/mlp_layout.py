"""How an MLP names its projections, and which of them are one matrix."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from npt_fast.kernels.factored import MLPWeights


@dataclass(frozen=True)
class MLPLayout:
    """The submodules of a gated MLP, ``down(activation(gate(h)) * up(h))``.

    Attributes:
        gate: name of gate. If it is that of up, both are one matrix, gate's rows first.
        up: name of up.
        down: name of down.
        activation: name of the activation, which an MLP may lack.
    """

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    activation: str = "act_fn"

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the projections' modules, each once."""
        return tuple(dict.fromkeys((self.gate, self.up, self.down)))

    @property
    def joined(self) -> bool:
        """Whether gate and up are one matrix."""
        return self.gate == self.up

    @property
    def formula(self) -> str:
        """What the MLP computes, for messages."""
        if self.joined:
            return f"{self.down}(activation(gate) * up) with gate, up = {self.gate}(x)"
        return f"{self.down}(activation({self.gate}(x)) * {self.up}(x))"

    def module_name(self, projection: str) -> str:
        """Name of the module that computes a projection, ``"gate"``, ``"up"`` or ``"down"``."""
        name: str = getattr(self, projection)
        return name

    def rows(self, projection: str, tensor: Tensor) -> Tensor:
        """Rows of a module's weight, ``(out, in)``, or bias that are a projection's; a view."""
        if projection == "down" or not self.joined:
            return tensor
        return tensor.chunk(2)[projection == "up"]

    def weights(self, mlp: Any) -> MLPWeights:
        """Weights and biases of an MLP of plain projections; of a joined matrix they are views."""
        modules = [(p, getattr(mlp, getattr(self, p))) for p in ("gate", "up", "down")]
        biases = (None if m.bias is None else self.rows(p, m.bias) for p, m in modules)
        return MLPWeights(*(self.rows(p, m.weight) for p, m in modules), *biases)

    def fits(self, mlp: nn.Module | None) -> bool:
        """Whether a module has these projections."""
        return all(isinstance(getattr(mlp, name, None), nn.Module) for name in self.names)


GATED = MLPLayout()
"""Llama's MLP, and that of most models."""
