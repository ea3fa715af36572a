"""Times of all providers of a case, interleaved. Wrong providers are not timed.

Every round times every provider, in a rotating order, so that clocks and temperatures affect all
alike. Calls cycle through copies of the inputs that together exceed the L2 cache, because in a
model other layers run in between. If the inputs fit the cache, they are timed inside it as well.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache, partial
from typing import TypeVar

import torch

from npt_fast.benchmarks.device import (
    DEVICE,
    INTERPRETED,
    ON_GPU,
    device_error,
    milliseconds,
    synchronize,
)
from npt_fast.benchmarks.harness import MB
from npt_fast.benchmarks.kernel_cases import Case, Inputs
from npt_fast.benchmarks.kernel_checks import Prepared, copied, tensors
from npt_fast.benchmarks.rows import NOT_RUN, Row
from npt_fast.kernels import roofline

Result = TypeVar("Result")
_log = logging.getLogger(__name__)

_ROOFLINES = {path: path for path in ("gemm", "fused", "decode")}
_ROOFLINES["reference"] = roofline.EAGER_VECTORS
"""Provider -> the form that `roofline` counts."""
ROUNDS = 15 if ON_GPU else 1 if INTERPRETED else 5
_BATCH_MS = 20.0
"""Approximate milliseconds of one timing, which covers many calls if they are short."""
_WARM_SECONDS = 1.0 if ON_GPU else 0.0
"""Seconds of work before the rounds of a case, since the device cools while others compile."""
_MAX_COPIES = 16
"""Most copies of the inputs; small ones would need thousands to exceed the cache."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Times of one provider of one case, in one way of launching.

    Attributes:
        case: case that was timed.
        provider: name of the provider.
        status: ok, wrong (hence not timed), out of memory, failed, or not run.
        detail: error message.
        launch: whether launched to a stream or as a graph, and whether inputs are in the L2 cache.
        milliseconds: milliseconds of a call, one per round.
        ratios: ratios to the baseline's time in the same round.
        peak: peak bytes of a call beyond its inputs.
        flops: FLOPs of its matrix products.
        bytes: bytes of inputs and outputs, each counted once.
    """

    case: Case
    provider: str
    status: str = "ok"
    detail: str = ""
    launch: str = ""
    milliseconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    peak: int = 0
    flops: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class Ceilings:
    """The best rates that torch reaches on the device.

    Attributes:
        bytes_per_second: rate of a large copy or of a matrix times a vector, the faster of both.
        flops_per_second: rate of a large matrix product by the vendor's library.
    """

    bytes_per_second: float
    flops_per_second: float

    @property
    def numbers(self) -> dict[str, float]:
        """Both rates in the units of a row."""
        return {"GB/s": self.bytes_per_second / 1e9, "TFLOP/s": self.flops_per_second / 1e12}

    def floor_ms(self, flops: float, moved: float) -> float:
        """Least milliseconds for so many FLOPs and bytes: the larger of both times."""
        return 1e3 * max(moved / self.bytes_per_second, flops / self.flops_per_second)

    def share(self, timing: Timing) -> float:
        """Least time divided by measured time."""
        return self.floor_ms(timing.flops, timing.bytes) / statistics.median(timing.milliseconds)


@cache
def ceilings(dtype: torch.dtype) -> Ceilings | None:
    """The best rates of the device in a dtype, after 3 seconds of work to warm it up, 1 on a CPU.

    None in the interpreter, whose times mean nothing.
    """
    if INTERPRETED:
        return None
    n, count, seconds, calls = (8192, 1 << 29, 3.0, 20) if ON_GPU else (2048, 1 << 26, 1.0, 5)
    source = torch.randn(count, device=DEVICE, dtype=dtype)
    target = torch.empty_like(source)
    a, b = (source[i * n * n :][: n * n].view(n, n) for i in range(2))
    product = torch.empty_like(a)
    matrix = source.view(-1, 4096)
    column, sums = matrix[0].clone(), matrix[:, 0].clone()

    def multiply() -> None:
        torch.mm(a, b, out=product)

    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        milliseconds(multiply)

    def best(function: Callable[[], object]) -> float:
        # the minimum: a ceiling is what the device can do when nothing disturbs it
        return min(milliseconds(function) for _ in range(calls)) / 1e3

    # a CPU reads faster than it copies, because a write first reads the cache line
    copied = 2 * source.nbytes / best(lambda: target.copy_(source))
    read = source.nbytes / best(lambda: torch.mv(matrix, column, out=sums))
    return Ceilings(max(copied, read), 2 * n**3 / best(multiply))


class _Calls:
    """A provider's calls, which cycle through copies of the inputs."""

    def __init__(
        self, prepared: Prepared, name: str, copies: Sequence[Inputs], graph: bool
    ) -> None:
        provider = prepared.case.providers[name]
        self._fresh: Callable[[], None] = lambda: None
        if provider.overwrites:
            originals, copies = copies, [copied(inputs) for inputs in copies]

            def restore() -> None:
                for to, source in zip(tensors(copies), tensors(originals), strict=True):
                    to.copy_(source)

            self._fresh = restore
        calls = [partial(provider.run, *inputs) for inputs in copies]
        self._calls = [captured(call) for call in calls] if graph else calls
        self._next, self._count = 0, 1
        if INTERPRETED:  # a call takes a second, and its time means nothing
            return
        self._run(len(calls))
        synchronize()
        once = milliseconds(partial(self._run, len(calls))) / len(calls)
        self._count = max(1, math.ceil(_BATCH_MS / max(once, 1e-3)))

    def _run(self, count: int) -> None:
        for _ in range(count):
            self._calls[self._next]()
            self._next = (self._next + 1) % len(self._calls)

    def time(self) -> float:
        """Milliseconds of a call."""
        self._fresh()
        return milliseconds(partial(self._run, self._count)) / self._count


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """Replays a call as a CUDA graph."""
    # a capture must not be the first call: it may allocate, compile or choose an algorithm
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _copies(prepared: Prepared) -> tuple[list[Inputs], bool]:
    """Copies of the inputs, together larger than the L2 cache if memory allows, and whether one
    copy fits the cache."""
    if not ON_GPU:
        return [prepared.inputs, copied(prepared.inputs)], False
    size = sum(tensor.nbytes for tensor in tensors(prepared.inputs))
    l2 = torch.cuda.get_device_properties(DEVICE).L2_cache_size
    spare = torch.cuda.mem_get_info()[0] // 4 // size
    # twice the cache, so that an input has been driven out when its turn comes again
    more = min(1 + 2 * l2 // size, spare, _MAX_COPIES - 1)
    return [prepared.inputs, *(copied(prepared.inputs) for _ in range(more))], size <= l2


def as_row(timing: Timing, limits: Ceilings | None) -> Row:
    """A timing as a row of a table; the interpreter's times are left out."""
    case, ms = timing.case, timing.milliseconds
    found: Row = {
        "op": case.op, "what": f"{case.what}, {case.shape}", "provider": timing.provider,
        "launch": timing.launch, "status": timing.status, "detail": timing.detail,
    }  # fmt: skip
    if ms and limits is None:
        found["interpreter ms"] = ms[0]
    elif ms and limits:
        low, *_, high = statistics.quantiles(ms, n=5, method="inclusive") if ms[1:] else (ms * 2)
        median = statistics.median(ms)
        found |= {"ms": median, "p20": low, "p80": high}
        if timing.ratios:
            found["ratio"] = statistics.median(timing.ratios)
        found |= {"GB/s": timing.bytes / median / 1e6, "TFLOP/s": timing.flops / median / 1e9}
        found["of ceiling"] = limits.share(timing)
        found["ceilings"] = list(limits.numbers.values())
        found["of roofline"] = _roofline_ms(timing, limits) / median or None
        found |= {"peak MB": timing.peak / MB, "milliseconds": ms, "ratios": timing.ratios}
    return found


def _roofline_ms(timing: Timing, limits: Ceilings) -> float:
    """Least milliseconds of a path of the MLP; 0 for other ops and for dtypes it does not count."""
    form, case = _ROOFLINES.get(timing.provider), timing.case
    p = case.workload
    if case.chosen is None or form is None or p.dtype.itemsize != roofline.ELEMENT:
        return 0.0
    shape = roofline.Shape(p.hidden, p.intermediate, p.num_ranks, p.rank)
    gpu = roofline.GPU(limits.flops_per_second / 1e12, limits.bytes_per_second / 1e12)
    phases = ("decode",) if form == "decode" else tuple(case.what.split(" + "))
    costs = roofline.costs(shape, p.tokens)
    return sum(c.launch_by_launch_ms(gpu) for c in costs if c.form == form and c.phase in phases)


@lru_cache(maxsize=1)
def prepare(case: Case) -> Prepared:
    """A case with its inputs, cached until another case is prepared."""
    return Prepared(case)


def outcome_of(function: Callable[[], Result]) -> tuple[Result | None, str, str]:
    """Result of a function or None, a status, and the error message."""
    try:
        return function(), "ok", ""
    except AssertionError as error:
        return None, "wrong", str(error)
    except torch.OutOfMemoryError as error:
        message = str(error).partition(". ")[0]
    except Exception as error:  # one failure must not stop the others
        _log.debug("%s", error, exc_info=True)
        return None, "failed", "".join(traceback.format_exception_only(error)).strip()
    torch.cuda.empty_cache()  # the error no longer holds the tensors
    return None, "out of memory", message


def time_case(
    case: Case, names: Collection[str], deadline: float = math.inf, rounds: int = ROUNDS
) -> Iterator[Timing]:
    """Time the providers of a case; those with right values in every way of launching.

    Args:
        case: case to time.
        names: names of providers; the baseline is always timed too.
        deadline: time of `time.monotonic` after which nothing starts, and rounds end.
        rounds: number of rounds.
    """
    wanted = [name for name in case.providers if name in names or name == case.baseline]
    if time.monotonic() > deadline:  # check before drawing inputs
        yield from (Timing(case, name, NOT_RUN) for name in wanted)
        return
    prepared, status, detail = outcome_of(lambda: Prepared(case))
    if prepared is None:
        yield from (Timing(case, name, status, detail) for name in wanted)
        return
    right: dict[str, Timing] = {}
    for name in wanted:
        if time.monotonic() > deadline:
            yield Timing(case, name, NOT_RUN)
            continue
        peak, status, detail = outcome_of(partial(prepared.check, name))
        timing = Timing(case, name, status, detail, peak=peak or 0)
        if status != "ok":
            yield timing
            if lost := device_error():
                raise RuntimeError(f"the device failed: {lost}")
            continue
        flops, moved = prepared.exact(name)[1], prepared.bytes_moved(name)
        right[name] = replace(timing, flops=flops, bytes=moved)
    prepared.forget()
    torch.cuda.empty_cache()
    copies, cached = _copies(prepared)
    ways = [("stream", copies, False)]
    ways += [("graph", copies, True)] if case.graphs and ON_GPU else []
    ways += [("stream, L2", copies[:1], False)] if cached else []
    for launch, inputs, graph in ways:
        if time.monotonic() > deadline:
            for timing in right.values():
                yield replace(timing, launch=launch, status=NOT_RUN)
            continue
        calls: dict[str, _Calls] = {}
        for name, timing in right.items():
            made, status, detail = outcome_of(partial(_Calls, prepared, name, inputs, graph))
            if made is None:
                yield replace(timing, launch=launch, status=status, detail=detail)
            else:
                calls[name] = made
        times = _interleaved(calls, rounds, deadline)
        baseline = times.get(case.baseline, [])
        for name, own in times.items():
            ratios = [a / b for a, b in zip(own, baseline, strict=False)]
            yield replace(right[name], launch=launch, milliseconds=own, ratios=ratios)


def _interleaved(
    calls: Mapping[str, _Calls], rounds: int, deadline: float
) -> dict[str, list[float]]:
    """Run complete rounds, at least one, so that every ratio has both sides."""
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + _WARM_SECONDS
    while names and time.perf_counter() < end:
        for one in calls.values():
            one.time()
    for index in range(rounds):
        if index and time.monotonic() > deadline:
            break
        turned = names[index % len(names) :] + names[: index % len(names)] if names else []
        for name in turned:
            times[name].append(calls[name].time())
    return times


def ratio_to_baseline(prepared: Prepared, name: str) -> Callable[[], tuple[float, float]]:
    """A function that times the baseline and then a provider; returns milliseconds and ratio."""
    copies, _ = _copies(prepared)
    own, baseline = (
        _Calls(prepared, n, copies, graph=False) for n in (name, prepared.case.baseline)
    )

    def time_both() -> tuple[float, float]:
        before, own_ms = baseline.time(), own.time()
        return own_ms, own_ms / before

    return time_both
