"""A Triton driver for a GPU that does not exist: kernels are compiled and launched, and do nothing.

Everything that Triton does on the host before the driver's own launch runs for real: it specialises
arguments, looks up keys in its caches, compiles kernels to machine code of a named GPU and hands
them to a launcher. This launcher records the launch if asked to, and returns. It replaces Triton's
C code and `cuLaunchKernel`, which therefore cost nothing here. CUDA's allocator and graph capture
are missing as well: their time and behaviour need a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver as drivers

from npt_fast.kernels import _launch, modulated_mlp, swiglu
from npt_fast.kernels._launch import Target
from npt_fast.kernels._plan import forget_plans


class Launched(NamedTuple):
    """A launch as Triton asked the driver for it.

    Attributes:
        kernel: name of the ``@triton.jit`` function.
        grid: numbers of programs.
        device: current device at the launch.
        source: compiled source, with ``signature``, ``constants`` and ``attrs``.
        arguments: all arguments of the kernel, constants included, in order.
    """

    kernel: str
    grid: tuple[int, int, int]
    device: str
    source: Any
    arguments: tuple[Any, ...]


class StubDriver:
    """The interface that Triton uses between ``kernel[grid](...)`` and the launch, and no more.

    Args:
        target: GPU to pretend to be.

    Attributes:
        device: current device. Triton caches compiled kernels by device; this name belongs to no
            real driver, so kernels for the stub and for a GPU never mix.
        loaded: names of kernels that were compiled or read from Triton's cache on disk.
        launches: recorded launches; None unless recording.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.device = f"stub {target}"
        self.loaded: list[str] = []
        self.launches: list[Launched] | None = None
        self._kernels: set[tuple[Any, str]] = set()

    @property
    def utils(self) -> StubDriver:
        """The utilities object in which Triton looks for a driver's C functions."""
        return self

    def get_current_device(self) -> str:
        return self.device

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget(*self.target, 64 if self.target.backend == "hip" else 32)

    def get_device_properties(self, device: str) -> dict[str, int]:
        """Limits for Triton's check that a program's shared memory fits."""
        return {"max_shared_mem": self.target.shared_bytes}

    def load_binary(self, name: str, *arguments: Any) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills and the most threads of a program.

        The module is 1 because Triton reloads a kernel without one at every launch.
        """
        self.loaded.append(name)
        return 1, 1, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        """Do nothing; Triton calls this since 3.8 when it drops a compiled kernel."""

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """The launcher that Triton calls for a compiled kernel."""
        self._kernels.add((source.fn, self.device))
        return partial(self._launch, source)

    def _launch(self, source: Any, *arguments: Any) -> None:
        if self.launches is not None:
            # stream, function, metadata and hooks come between the grid and the kernel's arguments
            grid, values = arguments[:3], arguments[9:]
            self.launches.append(Launched(source.fn.__name__, grid, self.device, source, values))

    def forget_kernels(self) -> None:
        """Remove kernels compiled for the stub from Triton's caches in memory, and our plans."""
        forget_plans()
        for kernel, device in self._kernels:
            kernel.device_caches.pop(device, None)

    @contextmanager
    def recorded(self) -> Iterator[list[Launched]]:
        """Record launches with their arguments, which stay alive as long as the list."""
        before, self.launches = self.launches, []
        try:
            yield self.launches
        finally:
            self.launches = before


@contextmanager
def stub_driver(target: str = "sm_90") -> Iterator[StubDriver]:
    """Send launches to a stub, and let our kernels treat CPU tensors as tensors on that GPU.

    Args:
        target: name of a GPU, such as ``sm_90`` or ``gfx942``.

    Raises:
        ValueError: `target` is no such name.
    """
    stub = StubDriver(Target.parse(target))
    before = drivers._active  # the property would create a driver, which fails without a GPU
    drivers.set_active(stub)
    try:
        with (
            patch.object(_launch, "_target", stub.target),
            patch.object(modulated_mlp, "supports", _supports),
        ):
            yield stub
    finally:
        stub.forget_kernels()
        drivers.set_active(before)


def _supports(tensor: Any, activation: str) -> bool:
    """`modulated_mlp.supports` as it answers on a GPU."""
    return activation in swiglu.ACTIVATIONS and tensor.dtype in _launch.DTYPES
