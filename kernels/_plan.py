"""Calls that are prepared once: a plan holds their launches, and later calls fill in the pointers.

`kernel[grid](...)` looks at every argument to find the machine code. For a call of few tokens the
GPU waits for that. The launches of a planned function depend on the forms of its operands alone:
shapes, strides, dtypes, devices, and what Triton compiles for, the alignment of their memory. So
the first call of a form runs the function and notes what it launched. A later call needs memory
for the result, one workspace for everything in between, and the launches again with new pointers.

A plan holds no tensor. Its workspace comes from torch's allocator at every call, which keeps
streams, threads and captured graphs apart. Where Triton returns no compiled kernel, as in its
interpreter, there are no plans, and every call runs the function.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

from npt_fast.kernels._launch import Launched, dot_precision, is_recording, observed_launches

_MOST_PLANS = 1024
"""Plans in memory; beyond it all are made anew, since strides may be new in every call."""
_ALIGNMENT = 256
"""Bytes between which tensors of the workspace begin: that of an allocator, or a divisor of it."""
_plans: dict[Hashable, Plan] = {}


def planned(
    function: Callable[..., Tensor], operands: Sequence[Tensor | None], *options: Hashable
) -> Tensor:
    """``function(*operands, *options)`` by its plan.

    Args:
        function: computes a new tensor by `launch` alone, with the operands' own pointers; torch
            gives it memory and views.
        operands: tensors or None.
        options: what its launches depend on besides.
    """
    if is_recording():
        return function(*operands, *options)
    forms = tuple([None if t is None else _form(t) for t in operands])
    key = (function, options, dot_precision(forms[0][0]), forms)  # type: ignore[index]
    plan = _plans.get(key)
    if plan is not None:
        return plan.run(operands)
    with observed_launches() as launches:
        result = function(*operands, *options)
    plan = Plan.of(launches, operands, result)
    if plan is not None:
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        _plans[key] = plan
    return result


def forget_plans() -> None:
    """Forget all plans, since the driver that their kernels were loaded by goes away."""
    _plans.clear()


def _form(tensor: Tensor) -> tuple[Any, ...]:
    """All that the launches and their machine code depend on: about 0.4 us a tensor on a CPU."""
    form = (
        tensor.dtype, tensor.get_device(), tensor.shape, tensor.stride(), tensor.data_ptr() % 16
    )  # fmt: skip
    # on AMD, Triton compiles 32-bit offsets for storages of less than 2 GiB
    return form if torch.version.hip is None else (*form, tensor.untyped_storage().nbytes() >> 31)


class _Step(NamedTuple):
    """One launch: its name, what starts it, its arguments, and where the pointers among them go.

    ``pointers`` are positions, indices of buffers, and offsets in bytes.
    """

    name: str
    start: Callable[..., None]
    arguments: list[Any]
    pointers: list[tuple[int, int, int]]


class Plan:
    """The launches of a call, without its tensors."""

    def __init__(self, steps: list[_Step], workspace: int, result: Tensor) -> None:
        self.steps = steps
        self.workspace = workspace
        self.shape, self.dtype = result.shape, result.dtype

    @classmethod
    def of(
        cls, launches: list[Launched], operands: Sequence[Tensor | None], result: Tensor
    ) -> Plan | None:
        """The plan of a call from what it launched; None if the call cannot be repeated by one."""
        # buffers: the operands, the result, and the workspace
        pointers = [0 if t is None else t.data_ptr() for t in (*operands, result)]
        known = {pointer: index for index, pointer in enumerate(pointers) if pointer}
        given = len(pointers) - pointers.count(0)
        compiled = all(isinstance(one.compiled, CompiledKernel) for one in launches)
        # two operands at one address could not be told apart
        if not launches or not compiled or len(known) < given or not result.is_contiguous():
            return None
        offsets: dict[int, int] = {}
        size = 0
        steps = []
        for one in launches:
            arguments, places = list(one.arguments), []
            for position, value in enumerate(arguments):
                if not isinstance(value, Tensor):
                    continue
                index, offset = known.get(value.data_ptr()), 0
                if index is None:
                    storage = value.untyped_storage()
                    start = storage.data_ptr()
                    if start not in offsets:
                        offsets[start] = size
                        size += triton.cdiv(storage.nbytes(), _ALIGNMENT) * _ALIGNMENT
                    index, offset = len(pointers), offsets[start] + value.data_ptr() - start
                arguments[position] = 0
                places.append((position, index, offset))
            steps.append(_Step(one.name, one.compiled[one.grid], arguments, places))
        return cls(steps, size, result)

    def run(self, operands: Sequence[Tensor | None]) -> Tensor:
        """Repeat the call for operands of the same forms; returns a new result."""
        first = operands[0]
        assert first is not None
        device = first.device
        result = torch.empty(self.shape, dtype=self.dtype, device=device)
        workspace = torch.empty(self.workspace, dtype=torch.uint8, device=device)
        buffers = [0 if t is None else t.data_ptr() for t in operands]
        buffers += (result.data_ptr(), workspace.data_ptr())
        current = driver.active.get_current_device()
        if device.type == "cpu" or device.index == current:  # a CPU's tensors go to a stub driver
            self.launch(buffers, driver.active.get_current_stream(current))
        else:
            with torch.cuda.device(device):
                self.launch(buffers, driver.active.get_current_stream(device.index))
        return result

    def launch(self, buffers: Sequence[int], stream: int) -> None:
        """Start all kernels with the buffers at these addresses, on a stream."""
        for _, start, arguments, pointers in self.steps:
            filled = arguments.copy()  # other threads fill theirs
            for position, index, offset in pointers:
                filled[position] = buffers[index] + offset
            start(*filled, stream=stream)
