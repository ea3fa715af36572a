"""How kernels are launched: for which device, with which tiles; and the record of launches.

Tiles come from `choose_tiles`, a pure function of kernel, dtype and device, so that every process
and every run computes alike. `kernels/aot.py` and the tests read launches instead of running them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Target(NamedTuple):
    """What kernels are compiled for.

    Attributes:
        backend: ``"cuda"`` or ``"hip"``.
        arch: 90 for sm_90; ``"gfx942"``.
    """

    backend: str
    arch: int | str

    @classmethod
    def parse(cls, name: str) -> Target:
        """From ``sm_90`` or ``gfx942``.

        Raises:
            ValueError: neither.
        """
        if name.startswith("sm_") and name[3:].isdecimal():
            return cls("cuda", int(name[3:]))
        if name.startswith("gfx"):
            return cls("hip", name)
        raise ValueError(f"arch must be like sm_90 or gfx942, got {name!r}")

    def __str__(self) -> str:
        return f"sm_{self.arch}" if self.backend == "cuda" else str(self.arch)

    @property
    def shared_bytes(self) -> int:
        """Shared memory that a program can have (KERNELS 3)."""
        if self.backend == "hip":
            return 65_536
        limits = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 103: 232_448}
        return limits.get(int(self.arch), 101_376)


@dataclass(frozen=True, slots=True)
class Tiles:
    """Sizes of a GEMM kernel's tiles, and how a program runs them."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k} w{self.warps} s{self.stages}"


class Launch(NamedTuple):
    """A launch that was recorded: the kernel, its grid, arguments by name, launch options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]


_record: list[Launch] | None = None
_target: Target | None = None


@contextmanager
def recorded(target: Target) -> Iterator[list[Launch]]:
    """Launches are listed instead of run, as on a device of that kind; tensors may be meta."""
    global _record, _target
    before = _record, _target
    _record, _target = [], target
    try:
        yield _record
    finally:
        _record, _target = before


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    warps: int,
    stages: int = 1,
    **constants: Any,
) -> None:
    """Run a kernel on the device of its first argument.

    Args:
        kernel: a ``@triton.jit`` function.
        grid: numbers of programs; with a 0 among them nothing runs.
        arguments: its arguments but for the constants, in their order.
        warps: of a program.
        stages: of loads in flight in its loops.
        constants: its ``tl.constexpr`` arguments.
    """
    if 0 in grid:
        return
    # contraction is said, not left to a default that triton 3.10 changes
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    if _record is not None:
        named = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
        _record.append(Launch(kernel, grid, named, options))
        return
    device = arguments[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*arguments, **constants, **options)


def target_of(tensor: Tensor) -> Target:
    """The kind of device a tensor is on; in the interpreter, and beside a GPU, sm_90."""
    if _target is not None:
        return _target
    return _device_target(tensor.device) if tensor.is_cuda else Target("cuda", 90)


@cache
def _device_target(device: torch.device) -> Target:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Target("hip", properties.gcnArchName.split(":")[0])
    return Target("cuda", properties.major * 10 + properties.minor)


def precision(dtype: torch.dtype) -> str:
    """How float32 operands are multiplied: as torch is told to."""
    matmul = torch.backends.cuda.matmul
    # since torch 2.9; says what allow_tf32 does, which cannot be read once this one is written
    told = getattr(matmul, "fp32_precision", None) or ("tf32" if matmul.allow_tf32 else "ieee")
    return "tf32" if dtype == torch.float32 and told == "tf32" else "ieee"


def rows(tensor: Tensor) -> Tensor:
    """The tensor with its last dimension contiguous, copied only where it is not."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
