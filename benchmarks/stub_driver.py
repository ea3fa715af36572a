"""A Triton driver for a GPU that is not there: kernels are compiled and launched, and do nothing.

All that Triton does on the host before the driver's own launch runs for real: arguments are
specialised, keys looked up in its caches, kernels compiled to machine code of a named GPU and
handed to a launcher. That launcher notes the launch, if asked to, and returns. What it stands for,
Triton's C code and `cuLaunchKernel`, costs nothing here, and a torch for CPUs has neither CUDA's
allocator nor graphs to capture launches into: time and behaviour of those need a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver as drivers

from npt_fast.kernels import _launch, modulated_mlp
from npt_fast.kernels._launch import Target


class Launched(NamedTuple):
    """A launch as the driver was asked for it.

    Attributes:
        kernel: name of the ``@triton.jit`` function.
        grid: numbers of programs.
        device: what was the current one.
        source: what was compiled: has ``signature``, ``constants`` and ``attrs``.
        arguments: all of the kernel's, constants included, in their order.
    """

    kernel: str
    grid: tuple[int, int, int]
    device: str
    source: Any
    arguments: tuple[Any, ...]


class StubDriver:
    """What Triton asks of a driver between ``kernel[grid](...)`` and the launch, and no more.

    Args:
        target: the GPU that it stands for.

    Attributes:
        device: the current one. Triton keeps compiled kernels by device; under a name that no real
            driver gives, those for the stub and those for a GPU do not meet.
        loaded: names of the kernels that were compiled, or read from Triton's cache on disk.
        launches: what is noted, while there is somebody to note it for.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.device = f"stub {target}"
        self.loaded: list[str] = []
        self.launches: list[Launched] | None = None
        self._kernels: set[tuple[Any, str]] = set()

    @property
    def utils(self) -> StubDriver:
        """Where Triton looks for what comes with a driver's C code."""
        return self

    def get_current_device(self) -> str:
        return self.device

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget(*self.target, 64 if self.target.backend == "hip" else 32)

    def get_device_properties(self, device: str) -> dict[str, int]:
        """For Triton's check that a program's shared memory fits."""
        return {"max_shared_mem": self.target.shared_bytes}

    def load_binary(self, name: str, *arguments: Any) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills, and the threads that a program can have.

        Triton loads again at every launch what has no module, hence the 1.
        """
        self.loaded.append(name)
        return 1, 1, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        """Called since Triton 3.8 when a compiled kernel is dropped."""

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """What Triton calls to launch a compiled kernel."""
        self._kernels.add((source.fn, self.device))
        return partial(self._launch, source)

    def _launch(self, source: Any, *arguments: Any) -> None:
        if self.launches is not None:
            # between the grid and the kernel's arguments: stream, function, metadata, hooks
            grid, values = arguments[:3], arguments[9:]
            self.launches.append(Launched(source.fn.__name__, grid, self.device, source, values))

    def forget_kernels(self) -> None:
        """Take out of Triton's caches in memory what was compiled for the stub."""
        for kernel, device in self._kernels:
            kernel.device_caches.pop(device, None)

    @contextmanager
    def recorded(self) -> Iterator[list[Launched]]:
        """Launches are noted, with their arguments, which stay alive as long as the list."""
        before, self.launches = self.launches, []
        try:
            yield self.launches
        finally:
            self.launches = before


@contextmanager
def stub_driver(target: str = "sm_90") -> Iterator[StubDriver]:
    """Launches go to a stub, and our kernels take tensors on a CPU for some on that GPU.

    Args:
        target: such as ``sm_90`` or ``gfx942``.

    Raises:
        ValueError: `target` is neither.
    """
    stub = StubDriver(Target.parse(target))
    before = drivers._active  # without making one, which fails where there is no GPU
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
    """As `modulated_mlp.supports` on a GPU."""
    return activation == "silu" and tensor.dtype in _launch.DTYPES
