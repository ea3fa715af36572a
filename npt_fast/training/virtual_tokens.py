"""Virtual tokens: what a layer does with attention outputs that the training text does not have.

A weight change grows with the square of the attention output, so a layer that never saw a large one
may answer it with an output hundreds of times too long. The base MLP gives the exact target for any
attention output, so training adds some (design.md#virtual-tokens).
"""

from __future__ import annotations

import torch
from torch import Tensor

from npt_fast.hf.scaffold import VirtualTokens
from npt_fast.training.teacher_pass import Activations

WEIGHT = 0.01  # of a virtual token in the loss; with 0.1 fitted layers have a quarter more KL
_LARGEST = 6.0  # times the attention output: rare tokens have up to 5 times the usual length
_GOLDEN = 0.6180339887498949  # multiples of it, modulo 1, are spread evenly


class VirtualPlan:
    """Which virtual tokens belong to a batch: the same for a window, whatever batch it is in.

    Every `stride`-th token of a row lends its hidden state. The attention output is that of the
    token half a row further on, cyclically, times a factor from 1 to 6 by position.

    Args:
        weights: 1 for tokens, 0 for padding at the end of rows, ``(B, S)``.
        stride: positions from one virtual token to the next.

    Attributes:
        weights: 1 for virtual tokens of real tokens, else 0, ``(B, V)``.
    """

    def __init__(self, weights: Tensor, stride: int) -> None:
        length = weights.shape[1]
        self._hosts = torch.arange(0, length, stride, device=weights.device)
        count = weights.sum(1, keepdim=True).long().clamp_min(1)
        self._guests = (self._hosts + count // 2) % count
        order = torch.arange(len(self._hosts), device=weights.device, dtype=torch.float64)
        self._scales = _LARGEST ** (order * _GOLDEN % 1)
        self.weights = weights[:, self._hosts] * weights.gather(1, self._guests)

    def tokens(self, seen: Activations) -> VirtualTokens:
        """The virtual tokens of a layer, by the base model's activations in it."""
        guests = self._guests.unsqueeze(-1).expand(-1, -1, seen.attention.shape[-1])
        scales = self._scales.to(seen.attention.dtype).unsqueeze(-1)
        return VirtualTokens(seen.hidden[:, self._hosts], seen.attention.gather(1, guests) * scales)
