"""Cost of a call of every path on the host: launches, torch operations and microseconds.

Tensors are so small that a GPU waits for the host. On a GPU this measures wall time between
synchronisations. Without one, launches go to `stub_driver` and this measures process time; tiny
products on the CPU then replace launches of the vendor's GEMMs, and the driver's own share
of a launch is missing.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from triton.runtime.jit import JITFunction

from npt_fast.benchmarks.device import DEVICE, ON_GPU, synchronize
from npt_fast.benchmarks.rows import Row, table
from npt_fast.benchmarks.stub_driver import stub_driver
from npt_fast.errors import NPTError
from npt_fast.functional import modulated_mlp
from npt_fast.kernels import factored
from npt_fast.kernels import modulated_mlp as paths
from npt_fast.kernels._launch import INTERPRETED
from npt_fast.kernels._plan import Plan
from npt_fast.kernels.factored import Factors, MLPWeights
from npt_fast.testing import Operations, Problem, make_inputs

PROBLEM = Problem(tokens=16, hidden=16, intermediate=16, num_ranks=2, rank=8)
"""The smallest problem with whole tiles, which compiles fastest."""

# process time leaves out what else runs on the machine, but also waiting for a GPU
_now = time.perf_counter if ON_GPU else time.process_time


class Call(NamedTuple):
    """One path in one direction.

    Attributes:
        path: name of the path.
        gradients: whether backward follows.
        run: function that makes the call.
    """

    path: str
    gradients: bool
    run: Callable[[], object]


def calls(dtype: torch.dtype) -> list[Call]:
    """All calls to measure; the unmodulated MLP comes first, for comparison.

    Calls named layer run `npt_fast.functional.modulated_mlp` as an NP layer does: with a batch, the
    path of `choose_path`, and factors in the activations' dtype, or in float32 beside the copies of
    them that the layer keeps.

    Args:
        dtype: dtype of activations and MLP weights.
    """
    x, h, weights, factors = make_inputs(PROBLEM, dtype=dtype, device=str(DEVICE))
    weights = MLPWeights._make(None if w is None else w.detach() for w in weights)
    wide = Factors._make(
        m.detach().float().requires_grad_() if isinstance(m, Tensor) else m for m in factors
    )

    def unmodulated() -> Tensor:
        inner = functional.silu(functional.linear(h, weights.gate)) * functional.linear(
            h, weights.up
        )
        return functional.linear(inner, weights.down)

    kept = Factors._make(m.detach() if isinstance(m, Tensor) else m for m in factors)

    def layer(factors: Factors, **options: Any) -> Tensor:
        batch = x.unsqueeze(0), h.unsqueeze(0)
        return modulated_mlp(*batch, weights.gate, weights.up, weights.down, factors, **options)

    def path(name: paths.Path) -> Callable[[], Tensor]:
        return partial(paths.modulated_mlp, x, h, weights, factors, path=name)

    name = str(dtype).removeprefix("torch.")
    both: dict[str, tuple[Callable[[], Tensor], Sequence[Any]]] = {
        "base MLP": (unmodulated, [h]),
        "gemm": (path("gemm"), [x, h, *factors]),
        "fused": (path("fused"), [x, h, *factors]),
        "factored": (partial(factored.modulated_mlp, x, h, weights, factors), [x, h, *factors]),
        "reference": (partial(layer, factors, impl="reference"), [x, h, *factors]),
        "layer, factors float32": (partial(layer, wide, impl="triton", copies=kept), [x, h, *wide]),
    }
    if dtype != torch.float32:
        both[f"layer, factors {name}"] = partial(layer, factors, impl="triton"), [x, h, *factors]

    def step(forward: Callable[[], Tensor], inputs: Sequence[Any]) -> Callable[[], object]:
        trained = [tensor for tensor in inputs if isinstance(tensor, Tensor)]
        with torch.no_grad():
            gradient = torch.ones_like(forward())
        return lambda: torch.autograd.grad(forward(), trained, gradient)

    forward = {"decode": path("decode")} | {name: run for name, (run, _) in both.items()}
    return [Call(name, False, run) for name, run in forward.items()] + [
        Call(name, True, step(*item)) for name, item in both.items()
    ]


def measure(
    *,
    dtype: torch.dtype = torch.bfloat16,
    target: str = "sm_90",
    rounds: int = 15,
    number: int = 20,
) -> list[Row]:
    """Launches, torch operations and host time of every path, on a GPU or else on a stub.

    Times are medians over rounds in which all paths take turns. The time of launching is the
    difference to a call whose launches return at once. The time of torch is that of the same torch
    calls, repeated one after the other. The rest is Python around both, and autograd's own work:
    all of backward where it is not ours.

    Args:
        dtype: dtype of activations and MLP weights.
        target: GPU that the stub pretends to be.
        rounds: number of rounds, at least two.
        number: calls per round.

    Returns:
        For each path and direction: ``path``; ``what``, the direction; ``launches`` of Triton
        kernels, and ``kernels``, which; ``torch ops`` that reach the dispatcher, views included;
        ``us`` per call, the median, with ``p20`` and ``p80``; and of these ``triton us``,
        ``torch us`` and ``rest us``.

    Raises:
        NPTError: Triton's interpreter is on.
        ValueError: the target is unknown.
    """
    if INTERPRETED:
        raise NPTError("TRITON_INTERPRET is set, and the interpreter launches nothing: unset it")
    driver: AbstractContextManager[Any] = nullcontext() if ON_GPU else stub_driver(target)
    with driver, _one_thread():
        measured = [_Measured(call) for call in calls(dtype)]
        for _ in range(rounds):
            for one in measured:
                one.time(number)
    return [one.row() for one in measured]


class _Measured:
    """A call, its launches and torch operations, and its times so far."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.whole: list[float] = []
        self.without_launches: list[float] = []
        self.torch_alone: list[float] = []
        with torch.set_grad_enabled(call.gradients):
            call.run()  # compiles
            with launched() as self.kernels, Operations() as operations:
                call.run()
            # autograd would count as one call and hide the calls inside it
            with patch.object(torch.autograd, "has_torch_function", lambda _: False):
                with _CallsOfTorch() as of_torch:
                    call.run()
        self.operations = operations.count
        self.of_torch = of_torch.found

    def time(self, number: int) -> None:
        with torch.set_grad_enabled(self.call.gradients):
            self.whole.append(_seconds(self.call.run, number))
            if self.kernels:
                nothing = _return_at_once
                with (
                    patch.object(JITFunction, "run", nothing),
                    patch.object(Plan, "launch", nothing),
                ):
                    self.without_launches.append(_seconds(self.call.run, number))
        with torch.no_grad():  # as inside our forward and backward
            self.torch_alone.append(_seconds(self._again, number))

    def _again(self) -> None:
        for function, arguments, options in self.of_torch:
            function(*arguments, **options)

    def row(self) -> Row:
        whole = statistics.median(self.whole)
        without = statistics.median(self.without_launches or self.whole)
        alone = statistics.median(self.torch_alone)
        # not the default way, which goes beyond the least of few values, even below 0
        fifths = statistics.quantiles(self.whole, n=5, method="inclusive")
        counts = Counter(name.strip("_").removesuffix("_kernel") for name in self.kernels)
        times = {
            "us": whole, "p20": fifths[0], "p80": fifths[-1],
            "triton us": whole - without, "torch us": alone, "rest us": without - alone,
        }  # fmt: skip
        return {
            "path": self.call.path,
            "what": "forward + backward" if self.call.gradients else "forward",
            "launches": len(self.kernels),
            "torch ops": self.operations,
            **{name: round(1e6 * seconds, 1) for name, seconds in times.items()},
            "kernels": ", ".join(f"{count} {name}" for name, count in counts.items()),
        }


def _return_at_once(*_: Any, **__: Any) -> None:
    """Stands in for a launch."""


@contextmanager
def launched() -> Iterator[list[str]]:
    """Names of the launched kernels, in order."""
    names: list[str] = []
    run, repeat = JITFunction.run, Plan.launch

    def noting(kernel: Any, *arguments: Any, **options: Any) -> Any:
        names.append(kernel.fn.__name__)
        return run(kernel, *arguments, **options)

    def noting_all(plan: Plan, *arguments: Any) -> None:
        names.extend(step.name for step in plan.steps)
        repeat(plan, *arguments)

    with patch.object(JITFunction, "run", noting), patch.object(Plan, "launch", noting_all):
        yield names


class _CallsOfTorch(TorchFunctionMode):
    """Records Python's calls of torch with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.found.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread, because process time adds up the time of all threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _seconds(function: Callable[[], object], number: int) -> float:
    """Microseconds of one call."""
    for _ in range(3):  # warm the caches after the call before
        function()
    synchronize()
    begin = _now()
    for _ in range(number):
        function()
    synchronize()
    return (_now() - begin) / number


if __name__ == "__main__":
    print(table(measure()))
