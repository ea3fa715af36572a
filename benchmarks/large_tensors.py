"""Every kernel on tensors of more than 2^31 elements, whose offsets do not fit 32 bits.

A float64 truth of that size would fit no device. So a kernel's result for all rows is compared with
its result for some rows alone: the first, the last, and those around element 2^31.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from npt_fast.benchmarks.device import DEVICE, DTYPE
from npt_fast.kernels import coefficients, modulated_linear, probe, swiglu

_NARROW = 32
"""Columns of operands that need not be large."""
_ROWS = 128
"""Rows that are computed again in one call."""


@dataclass(frozen=True, slots=True)
class LargeCase:
    """One kernel on inputs ``(T, width)`` of random numbers.

    Attributes:
        what: the kernel, in words.
        tokens: T.
        width: columns of the largest tensors.
        inputs: columns of each input.
        written: columns of all results together.
        run: takes the inputs and gives the results; draws weights from torch's generator.
    """

    what: str
    tokens: int
    width: int
    inputs: Sequence[int]
    written: int
    run: Callable[..., Sequence[Tensor]]

    @property
    def bytes(self) -> int:
        """Memory for the inputs and the results."""
        return self.tokens * (sum(self.inputs) + self.written) * DTYPE.itemsize

    def check(self) -> None:
        """Compare some rows of the results with calls for these rows alone.

        Raises:
            AssertionError: they differ by more than 2 %.
        """
        inputs = [torch.randn(self.tokens, n, device=DEVICE, dtype=DTYPE) for n in self.inputs]
        results = self._seeded(*inputs)
        middle = min(2**31 // self.width, self.tokens - _ROWS)
        for begin in (0, middle - _ROWS // 2, self.tokens - _ROWS):
            some = slice(begin, begin + _ROWS)
            alone = self._seeded(*(t[some] for t in inputs))
            for found, expected in zip(results, alone, strict=True):
                torch.testing.assert_close(found[some], expected, rtol=0.02, atol=0.02)

    def _seeded(self, *inputs: Tensor) -> Sequence[Tensor]:
        torch.manual_seed(0)  # weights are the same in every call
        return self.run(*inputs)


def large_cases(*, tiny: bool) -> list[LargeCase]:
    """All kernels; with `tiny`, sizes that only try the comparison."""
    width, rank = (64, 16) if tiny else (4096, 64)
    tokens = 300 if tiny else 2**31 // width + 193
    k = width // rank

    def weight(*shape: int) -> Tensor:
        values: Tensor = torch.randn(shape, device=DEVICE, dtype=DTYPE) / shape[0] ** 0.5
        return values

    def coefficients_bwd(dz: Tensor, u: Tensor, p: Tensor, s: Tensor) -> Sequence[Tensor]:
        du = torch.empty_like(u)
        one = (t.unsqueeze(0) for t in (dz, u, p, s.float(), du))
        dp, z = coefficients.coefficients_bwd(*one)
        return dp, z[0], du

    def coefficients_fwd(u: Tensor, p: Tensor) -> Sequence[Tensor]:
        s, z = coefficients.coefficients_fwd(u.unsqueeze(0), p.unsqueeze(0), k)
        return s[0], z[0]

    def probe_fwd(a: Tensor, u: Tensor) -> Sequence[Tensor]:
        s, z, p = probe.probe(a, weight(width, _NARROW), u.unsqueeze(0), k, True)
        return s[0], z[0], p

    def to_wide(a: Tensor) -> Sequence[Tensor]:
        return [modulated_linear.modulated_linear([a, a], [weight(_NARROW, width)] * 2, None)]

    def from_wide(a: Tensor) -> Sequence[Tensor]:
        return [modulated_linear.modulated_linear([a, a], [weight(width, _NARROW)] * 2, None)]

    def gate_up(h: Tensor) -> Sequence[Tensor]:
        back = weight(width, _NARROW)
        arguments = (back, back, h.unsqueeze(0), weight(_NARROW, width), None, None, None, True)
        return modulated_linear.modulated_gate_up(h, *arguments)

    def case(
        what: str, inputs: Sequence[int], written: int, run: Callable[..., Sequence[Tensor]]
    ) -> LargeCase:
        return LargeCase(what, tokens, width, inputs, written, run)

    return [
        case("coefficients, forward", (width, width), width + 2 * k, coefficients_fwd),
        case("coefficients, backward", (width, width, width, k), 3 * width, coefficients_bwd),
        case("swiglu, forward", (width, width), width, lambda *a: [swiglu.swiglu_fwd(*a)]),
        case("swiglu, backward", (width, width, width), 3 * width, swiglu.swiglu_bwd),
        case("modulated_linear, wide result", (_NARROW,), width, to_wide),
        case("modulated_linear, wide operand", (width,), _NARROW, from_wide),
        case("modulated_linear, gate and up", (_NARROW,), 3 * width, gate_up),
        case("probe", (_NARROW, width), 2 * width + 2 * k, probe_fwd),
    ]
