"""Launching kernels: the target device, tile sizes, and a record of launches.

`kernels/aot.py` and the tests record launches and read them instead of running them.
"""

from __future__ import annotations

import threading
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
    """A kind of GPU that kernels are compiled for.

    Attributes:
        backend: ``"cuda"`` or ``"hip"``.
        arch: a number such as 90 for sm_90, or a name such as ``"gfx942"``.
    """

    backend: str
    arch: int | str

    @classmethod
    def parse(cls, name: str) -> Target:
        """The target of a name such as ``sm_90`` or ``gfx942``.

        Raises:
            ValueError: the name is of neither form.
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
        """Bytes of shared memory that a program can have (design.md#triton)."""
        if self.backend == "hip":
            return 65_536
        limits = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 103: 232_448}
        # the smallest limit for GPUs that are not listed: what fits there fits everywhere
        return limits.get(int(self.arch), 101_376)


@dataclass(frozen=True, slots=True)
class Tiles:
    """Tile sizes of a GEMM kernel ``(m, n, k)``, warps of a program, and stages of its loads."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k} w{self.warps} s{self.stages}"


class Launch(NamedTuple):
    """A recorded launch: the kernel, its grid, its arguments by name, and the launch options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]


class Launched(NamedTuple):
    """An observed launch: name of the kernel, what Triton compiled, grid, and all arguments."""

    name: str
    compiled: Any
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]


class _Observed(threading.local):
    launches: list[Launched] | None = None


_record: list[Launch] | None = None
_target: Target | None = None
_observed = _Observed()


@contextmanager
def recorded_launches(target: Target) -> Iterator[list[Launch]]:
    """Record launches for `target` instead of running them; tensors may be on the meta device."""
    global _record, _target
    before = _record, _target
    _record, _target = [], target
    try:
        yield _record
    finally:
        _record, _target = before


def is_recording() -> bool:
    """Whether launches are recorded instead of run."""
    return _record is not None


@contextmanager
def observed_launches() -> Iterator[list[Launched]]:
    """Note the launches of this thread while they run."""
    before = _observed.launches
    launches: list[Launched] = []
    _observed.launches = launches
    try:
        yield launches
    finally:
        _observed.launches = before


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
        grid: numbers of programs; nothing runs if one of them is 0.
        arguments: all arguments of the kernel except constants, in order.
        warps: number of warps of a program.
        stages: number of stages of loads in flight in its loops.
        constants: values of its ``tl.constexpr`` arguments.
    """
    if 0 in grid:
        return
    # fp fusion is explicit because its default changes in Triton 3.10 (design.md#triton)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    if _record is not None:
        # not strict: arg_names ends with the constexprs, which are in `constants`
        named = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
        _record.append(Launch(kernel, grid, named, options))
        return
    device = arguments[0].device
    # Triton launches on the current device, whatever the tensors are on (design.md#triton-bugs)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        compiled = kernel[grid](*arguments, **constants, **options)
    if _observed.launches is not None:
        values = *arguments, *(constants[name] for name in kernel.arg_names[len(arguments) :])
        x, y, z = (*grid, 1, 1)[:3]
        _observed.launches.append(Launched(kernel.__name__, compiled, (x, y, z), values))


def target_of(tensor: Tensor) -> Target:
    """The target of the tensor's device; sm_90 for a CPU tensor, as in the interpreter."""
    if _target is not None:
        return _target
    return _device_target(tensor.device) if tensor.is_cuda else Target("cuda", 90)


@cache
def _device_target(device: torch.device) -> Target:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        # gcnArchName goes on with features, as in gfx942:sramecc+:xnack-
        return Target("hip", properties.gcnArchName.split(":")[0])
    return Target("cuda", properties.major * 10 + properties.minor)


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of `tl.dot` for a dtype: TF32 for float32 if torch allows TF32."""
    if dtype != torch.float32:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    # exists since torch 2.9; once it was set, reading allow_tf32 raises
    told = getattr(matmul, "fp32_precision", None) or ("tf32" if matmul.allow_tf32 else "ieee")
    return "tf32" if told == "tf32" else "ieee"


def contiguous_rows(tensor: Tensor) -> Tensor:
    """The tensor with a contiguous last dimension; copied only if it has none."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def contiguous_bias(bias: Tensor | None) -> Tensor | None:
    """A bias without gaps, since kernels read neighbours; a strided one is copied."""
    return None if bias is None else contiguous_rows(bias)


def cdiv(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return -(-a // b)
