"""Matrices of int8 numbers with a float32 scale for each output channel, and their products.

Rounding is symmetric and of weights alone: ``w[:, n]`` is ``values[:, n] * scale[n]``, with
``scale[n] = max |w[:, n]| / 127``. So a product's float32 sums are scaled once for each channel.
Values are stored such that the numbers of one channel are neighbours in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

LARGEST = 127  # not -128: the range is symmetric


@dataclass(frozen=True)
class Int8Matrix:
    """A matrix of int8 numbers that torch's functions see as one of floats.

    Each function gets the matrix in `dtype`, made for this call, so that one matrix at a time is
    held in floats. It has no gradient.

    Attributes:
        values: int8 numbers, of the matrix's shape.
        scale: float32, ``(1, N)`` if the columns are the output channels, ``(N, 1)`` if the rows.
        dtype: dtype of the floats.
    """

    values: Tensor
    scale: Tensor
    dtype: torch.dtype = torch.float32
    requires_grad: ClassVar[bool] = False

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def to(self, dtype: torch.dtype) -> Int8Matrix:
        """The same matrix, which functions get in another dtype."""
        return replace(self, dtype=dtype)

    def t(self) -> Int8Matrix:
        return replace(self, values=self.values.t(), scale=self.scale.t())

    def narrow(self, dim: int, start: int, length: int) -> Int8Matrix:
        values, scale = self.values.narrow(dim, start, length), self.scale
        if scale.shape[dim] == self.shape[dim]:
            scale = scale.narrow(dim, start, length)
        return replace(self, values=values, scale=scale)

    def dense(self) -> Tensor:
        """The matrix in floats; each is the product in float32, rounded once."""
        out = torch.empty_like(self.values, dtype=self.dtype)
        if torch.compiler.is_compiling():  # fuses both, and plans buffers itself
            return (self.values * self.scale).to(self.dtype)
        return torch.mul(self.values, self.scale, out=out)

    def __rmatmul__(self, left: Tensor) -> Tensor:
        return left @ self.dense()

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        floats = (arg.dense() if isinstance(arg, Int8Matrix) else arg for arg in args)
        return function(*floats, **(kwargs or {}))


@torch.no_grad()
def quantize(matrix: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Round a matrix to int8.

    Args:
        matrix: floats, ``(rows, columns)``.
        channels: dimension of the output channels: 1 for ``x @ matrix``, 0 for ``x @ matrix.t()``.

    Returns:
        int8 values of the matrix's shape, the numbers of each channel adjacent in memory, and
        float32 scales, ``(1, columns)`` or ``(rows, 1)``.

    Raises:
        ValueError: the matrix has NaN or infinite numbers, or some that float32 cannot hold.
    """
    by_channel = matrix.detach().movedim(channels, 0).to(torch.float32)
    scale = by_channel.abs().amax(1, keepdim=True) / LARGEST
    if not bool(scale.isfinite().all()):
        raise ValueError("NaN and infinite numbers cannot be rounded to int8")
    # a channel of zeros has scale 0, and one of the smallest subnormals may underflow to it
    divisor = torch.where(scale > 0, scale, 1)
    values = (by_channel / divisor).round_().clamp_(-LARGEST, LARGEST)
    values = values.to(torch.int8, memory_format=torch.contiguous_format)
    return values.movedim(0, channels), scale.movedim(0, channels)
