"""The factors of one NP layer in an engine: for inference, maybe sharded over devices.

Tensor parallelism shards gate and up by their outputs and down by its inputs, and so the factors
that are as wide: W_b of gate and up, W_a of down. The rest is on every device. Where a device has a
part of down's input, its probe is a part of a sum, which is taken before the coefficients.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from npt_fast.functional import scaled_bottlenecks
from npt_fast.modules import NPComponent

_BY_WIDTH = ("w_a_mid", "w_b_gate", "w_b_up")
"""The factors whose columns are those of the MLP's width."""


class ShardedFactors(nn.Module):
    """One device's part of the factors of an NP layer.

    The factors are buffers: an engine that checks which parameters it has read knows none of them.

    Args:
        component: the whole factors; int8 factors become floats.
        device: device of this part.
        dtype: dtype of this part, that of the model.
        shard: index of this part.
        shards: number of parts; it must divide the MLP's width.
        reduce: function that returns the sum of a tensor over all parts.
    """

    w_down: Tensor
    w_a_in: Tensor
    w_a_mid: Tensor
    w_b_gate: Tensor
    w_b_up: Tensor
    w_b_down: Tensor

    def __init__(
        self,
        component: NPComponent,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        shard: int = 0,
        shards: int = 1,
        reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        super().__init__()
        if component.is_int8:
            component.dequantize()
        self.num_ranks = component.num_ranks
        self.kept = component.residual == "kept"
        self.modulates_up = component.w_b_up is not None
        self.modulates_down = component.w_b_down is not None
        self._reduce = reduce
        for name, whole in component.joined.items():
            part = whole.detach()
            if name in _BY_WIDTH:
                part = part.chunk(shards, 1)[shard]
            self.register_buffer(name, part.to(device, dtype, copy=True), persistent=False)

    def bottleneck(self, x: Tensor) -> Tensor:
        """The bottlenecks ``(c, T, R)`` of an attention output ``(T, D)``."""
        u: Tensor = (x @ self.w_down).unflatten(-1, (-1, self.w_b_gate.shape[0])).movedim(-2, 0)
        return u

    def gate_up_change(self, u: Tensor, h: Tensor) -> Tensor:
        """What is added to this part's outputs of gate and up, side by side.

        Args:
            u: `bottleneck`.
            h: input of the MLP, ``(T, D)``.

        Returns:
            ``(T, 2 F / shards)``; zeros for up if only gate is modulated.
        """
        count = 1 + self.modulates_up
        p = (h @ self.w_a_in.t()).unflatten(-1, (count, -1)).movedim(-2, 0)
        z = scaled_bottlenecks(u[:count], p, num_ranks=self.num_ranks)
        gate = z[0] @ self.w_b_gate
        if not self.modulates_up:
            return pad(gate, (0, gate.shape[-1]))
        return torch.cat((gate, z[1] @ self.w_b_up), -1)

    def down_change(self, u: Tensor, inner: Tensor) -> Tensor | None:
        """What is added to the output of down, the same on every device; None if nothing is.

        Args:
            u: `bottleneck`.
            inner: this part's input of down, ``(T, F / shards)``.

        Returns:
            ``(T, D)``.
        """
        if not self.modulates_down:
            return None
        p = self._reduce(inner @ self.w_a_mid.t())
        z = scaled_bottlenecks(u[2:], p.unsqueeze(0), num_ranks=self.num_ranks)[0]
        change: Tensor = z @ self.w_b_down
        return change
