"""Kernels run on a GPU, under ttsem as if on one, or on a CPU in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import InterpreterError

from npt_fast.kernels._tiles import INTERPRETED
from tests.interpreter import quicken
from tests.kernels.cases import DEVICE, SIMULATED

if INTERPRETED:
    quicken()
if SIMULATED:  # of the compiler ttsem needs the first stage; the others would take most of the time
    from ttsem import harness, mlir

    mlir.enable_generic_printing()
    mlir.parse = cache(mlir.parse)
    stages: dict[str, dict[str, str]] = {}

    def first_stage(fn: Any, args: Any, kwargs: Any, target: Any) -> dict[str, str]:
        """The first stage, made once for all launches that would compile the same."""
        key = repr((fn, target, *harness._specialize(fn, args, kwargs, target)))
        if key not in stages:
            launch = SimpleNamespace(fn=fn, args=args, kwargs=kwargs)
            stages[key] = {"ttir": harness._stage_text(launch, "ttir", target)}
        return stages[key]

    harness._compile_asm = first_stage
    torch.set_printoptions(threshold=0, edgeitems=1)  # it prints what `Tensor.to` is called on

Normal = Callable[..., Tensor]


@triton.jit
def _counting_kernel(out_ptr, end):
    for index in range(end):
        tl.store(out_ptr, index)


@pytest.fixture(autouse=True, scope="session")
def interpreter() -> None:
    """Skip if the interpreter cannot take NumPy's arrays, as Triton 3.6 with NumPy 2.4."""
    try:
        if INTERPRETED:
            _counting_kernel[(1,)](torch.zeros(1, dtype=torch.int32), 1)
    except InterpreterError as error:
        if "only 0-dimensional arrays" not in str(error):
            raise
        pytest.skip(f"Triton {triton.__version__} cannot interpret with this NumPy: {error}")


@pytest.fixture
def device() -> str:
    """Where kernels run."""
    return DEVICE


@pytest.fixture
def normal(device: str) -> Normal:
    """Random tensors of variance 1 / fan_in, the same in every run."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int, dtype: torch.dtype, fan_in: int = 1) -> Tensor:
        values = torch.randn(shape, generator=generator) / fan_in**0.5
        return values.to(device, dtype)

    return make


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """One thread; the tensors are so small that threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def new_memory_is_nan() -> Iterator[None]:
    """Fill new memory with NaN, so that reads of unwritten memory show in results."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill
