"""The parts of a GPU day, most valuable first, as lists of jobs.

A part is a function that lists its jobs and hardly uses the device. Its docstring appears in the
report. `PARTS` holds their order and estimated seconds.
"""

from __future__ import annotations

import gc
import json
import math
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import get_args

import torch

from npt_fast.benchmarks.device import DTYPE, ON_GPU, device_facts, peak_bytes
from npt_fast.benchmarks.harness import MB, machine_facts
from npt_fast.benchmarks.kernel_cases import OURS, Case, cases, layer_inputs
from npt_fast.benchmarks.kernel_checks import tensors
from npt_fast.benchmarks.kernel_timing import (
    Timing,
    as_row,
    ceilings,
    outcome_of,
    prepare,
    time_case,
)
from npt_fast.benchmarks.large_tensors import LargeCase, large_cases
from npt_fast.benchmarks.programs import Program, run_tests
from npt_fast.benchmarks.rows import NOT_RUN, SKIPPED, Job, Row
from npt_fast.benchmarks.saved_bytes import FORMS, formula_bytes, kept_bytes
from npt_fast.benchmarks.workloads import REAL, TINY, Shapes
from npt_fast.kernels import modulated_mlp as mlp
from npt_fast.kernels._tuning import disable_autotuning, enable_autotuning

PATHS = get_args(mlp.Path)
MLP_OPS = ("decode", "modulated_mlp")


@dataclass(frozen=True, slots=True)
class Day:
    """The selection of a GPU day.

    Attributes:
        tiny: whether to use small problems.
        ops: names of the ops to time.
        providers: names of the providers to time; baselines are always timed.
        shapes: regular expression; problems whose names match are timed.
    """

    tiny: bool
    ops: Sequence[str]
    providers: Sequence[str]
    shapes: str = ""

    def cases(self, *ops: str) -> list[Case]:
        """The selected cases of the named ops."""
        shapes: Shapes = TINY if self.tiny else REAL
        found = (case for op in ops if op in self.ops for case in cases(op, shapes))
        return [case for case in found if re.search(self.shapes, case.shape)]


def row_job(what: str, function: Callable[[], Row | None], **more: object) -> Job:
    """A job with one row: the result of a function, or how it failed."""

    def run(deadline: float) -> Iterator[Row]:
        result, status, detail = outcome_of(function)
        yield {"what": what, **more, "status": status, "detail": detail, **(result or {})}

    return Job(what, run)


def environment(day: Day) -> list[Job]:
    """Versions, the device, and the programs that are installed."""
    packages = ("torch", "triton", "transformers", "accelerate", "numpy", "liger-kernel", "pytest")

    def run(deadline: float) -> Iterator[Row]:
        for name, value in (machine_facts(*packages) | device_facts()).items():
            yield {"what": name, "status": "ok", "detail": value}
        for program in ("git", "gcc", "nvcc", "ncu", "compute-sanitizer"):
            found = shutil.which(program) or "not on PATH"
            yield {"what": program, "status": "ok", "detail": found}

    return [Job("environment", run)]


def values(day: Day) -> list[Job]:
    """Values of every kernel in every dtype against its definition, by tests/kernels.

    Tests that simulate a GPU, compile for other GPUs or need a model are left out.
    """
    if day.tiny:  # without a GPU CI runs all of them anyway, and they take minutes
        chosen = ["tests/kernels/test_tuning.py"]
        return [Job("tests/kernels", partial(run_tests, chosen, processes=1))]
    left_out = ("ttsem", "aot", "smollm2", "gpu_only", "offsets")
    files = [f"--ignore=tests/kernels/test_{name}.py" for name in left_out]
    return [Job("tests/kernels", partial(run_tests, ["tests/kernels", *files]))]


def graphs(day: Day) -> list[Job]:
    """Tests of CUDA graphs, second devices and offsets beyond 2^31, which need an idle GPU."""
    chosen = ["tests/kernels/test_gpu_only.py"]
    chosen += [] if day.tiny else ["tests/kernels/test_offsets.py"]
    return [Job("tests of graphs and offsets", partial(run_tests, chosen, processes=1))]


def timings(day: Day) -> list[Job]:
    """Decode and the MLP by all paths, plain torch, the reference form and the unmodulated MLP.

    Times are medians of interleaved rounds. Providers with wrong values are not timed. Ratios are
    to the time of the factored form in plain torch: smaller is faster. GB/s counts inputs and
    outputs once. The ceiling is the least time on this device: that of copying or reading these
    bytes, or of a vendor's product with as many FLOPs, whichever is longer. The roofline is the
    same per launch, with a path's bytes as kernels/roofline.py counts them.
    """
    return [Job("ceilings", _ceilings), *_timing_jobs(day, day.cases(*MLP_OPS), _is_quick)]


def compilers(day: Day) -> list[Job]:
    """The same under `torch.compile`, and with Liger's SwiGLU, beginning with the first shapes."""
    found = day.cases(*MLP_OPS)
    first = next(iter(REAL.training)).partition(" T=")[0]
    found.sort(key=lambda case: not case.shape.startswith(first))  # compiling may use up the budget
    return _timing_jobs(day, found, lambda name: not _is_quick(name))


def small_ops(day: Day) -> list[Job]:
    """The ops of the MLP, one by one, and plain torch, `torch.compile` and Liger for comparison."""
    others = [op for op in day.ops if op not in MLP_OPS]
    return _timing_jobs(day, day.cases(*others), lambda name: True)


def tiles(day: Day) -> list[Job]:
    """The fused path with the tiles that measured fastest, and these tiles.

    Times with the default tiles are in the part timings.
    """
    if not ON_GPU:
        return [row_job("fused, tiles measured", lambda: _skipped("needs a GPU"))]
    return [
        Job(str(case), partial(_with_measured_tiles, case, day))
        for case in day.cases("modulated_mlp")
    ]


def _is_quick(name: str) -> bool:
    return not name.startswith(("compile", "liger"))


def _skipped(reason: str) -> Row:
    return {"status": SKIPPED, "detail": reason}


def _ceilings(deadline: float) -> Iterator[Row]:
    found = ceilings(DTYPE)
    what = {"op": "ceilings", "what": "copying or reading, a large product"}
    if found is None:
        yield what | _skipped("times of the interpreter mean nothing")
    else:
        yield what | {"status": "ok", "detail": "", **found.numbers}


def _timing_jobs(day: Day, found: Sequence[Case], wanted: Callable[[str], bool]) -> list[Job]:
    jobs = []
    for case in found:
        names = [name for name in case.providers if wanted(name) and name in day.providers]
        if names:
            jobs.append(Job(str(case), partial(_timing_rows, case, names)))
    return jobs


def _timing_rows(case: Case, names: Sequence[str], deadline: float) -> Iterator[Row]:
    limits, timed = ceilings(case.workload.dtype), []
    for timing in time_case(case, names, deadline):
        timed.append(timing)
        yield as_row(timing, limits)
    for launch, found in groupby(timed, lambda timing: timing.launch):
        group = [timing for timing in found if timing.provider in PATHS]
        if launch and case.chosen and len(group) > 1:
            yield _path_row(f"{case}, {launch}", case.chosen, group)


def _path_row(what: str, chosen: str, group: Sequence[Timing]) -> Row:
    """The path that `choose_path` takes, and the fastest path."""
    times = {
        timing.provider: statistics.median(timing.milliseconds)
        for timing in group
        if timing.milliseconds
    }
    found: Row = {"op": "paths", "what": what, "status": "ok", "chosen": chosen}
    if ON_GPU and chosen in times:
        fastest = min(times, key=lambda path: times[path])
        found |= {"fastest": fastest, "chosen / fastest": times[chosen] / times[fastest]}
    return found


def _with_measured_tiles(case: Case, day: Day, deadline: float) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tiles.json"
        enable_autotuning(file)
        try:
            yield from _timing_rows(case, [n for n in ("fused",) if n in day.providers], deadline)
            measured = json.loads(file.read_text()) if file.exists() else {}
        finally:
            disable_autotuning()
    for launch, sizes in measured.items():
        detail = " ".join(map(str, sizes))
        yield {"op": "tiles", "what": launch, "status": "ok", "detail": f"m n k w s: {detail}"}


def model(day: Day) -> list[Job]:
    """A Llama with Llama-3.2-1B's widths and random weights: decoding, one layer, training."""
    from npt_fast.benchmarks import whole_model  # takes a while to import

    return [row_job(*found) for found in whole_model.measurements(tiny=day.tiny)]


def host(day: Day) -> list[Job]:
    """Host microseconds and launches per call of every path.

    Tensors are so small that the device has almost nothing to do.
    """

    def run(deadline: float) -> Iterator[Row]:
        if not ON_GPU:
            yield {"what": "calls", **_skipped("npt-fast bench --host measures without a GPU")}
            return
        from npt_fast.benchmarks.host import measure

        for found in measure():
            about = {"what": found.pop("what"), "provider": found.pop("path")}
            yield about | {"status": "ok", "detail": "", **found}

    return [Job("calls", run)]


def memory(day: Day) -> list[Job]:
    """Bytes that a training step saves for backward, counted and by formula, and its peak."""
    factored, again, reference = FORMS
    forms = {
        "factored": factored,
        "gemm": factored,
        "fused": factored,
        "gemm-again": again,
        "reference": reference,
    }
    return [
        row_job(f"{case.shape}, {name}", partial(_memory_row, case, name, form))
        for case in day.cases("modulated_mlp")
        if case.what != "forward"
        for name, form in forms.items()
        if name in day.providers
    ]


def _memory_row(case: Case, name: str, form: object) -> Row:
    expected = formula_bytes(case.workload, form, case.workload.dtype)  # type: ignore[arg-type]
    inputs = prepare(case).inputs
    run = partial(case.providers[name].run, *inputs)
    kept = kept_bytes(inputs[:4], run)  # backward saves nothing more
    found: Row = {"kept MB": kept / MB, "formula MB": expected / MB}
    found["kept / formula"] = kept / expected
    if ON_GPU:
        found["peak MB"] = peak_bytes(run) / MB
    return found | {"status": "ok" if abs(kept / expected - 1) <= 0.02 else "differs"}


def large(day: Day) -> list[Job]:
    """Tensors of more than 2^31 elements: some rows compared with calls for these rows alone.

    The rows are the first, the last, and those around element 2^31.
    """
    return [
        row_job(
            case.what,
            partial(_large_row, case),
            elements=case.tokens * case.width,
            GB=case.bytes / 1e9,
        )
        for case in large_cases(tiny=day.tiny)
    ]


def _large_row(case: LargeCase) -> Row | None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] if ON_GPU else math.inf
    if 1.05 * case.bytes > free:
        return _skipped(f"the device has {free / 1e9:.1f} GB free")
    case.check()
    return None


def determinism(day: Day) -> list[Job]:
    """Whether two runs give the same bits, and a token decoded alone those it gets among others."""
    jobs = []
    for case in day.cases(*MLP_OPS):
        for name in case.providers:
            if name in OURS and name in day.providers:
                jobs.append(row_job(f"{case}, {name}", partial(_two_runs_row, case, name)))
        if case.op == "decode":
            jobs.append(row_job(f"{case}, first token alone", partial(_token_alone_row, case)))
    return jobs


def _two_runs_row(case: Case, name: str) -> Row:
    run = partial(case.providers[name].run, *prepare(case).inputs)
    pairs = zip(tensors(run()), tensors(run()), strict=True)
    same = all(torch.equal(first, second) for first, second in pairs)
    return {"status": "ok" if same else "differs", "detail": "" if same else "of another run"}


def _token_alone_row(case: Case) -> Row:
    """A difference is reported but no failure: tiles for more tokens may sum in another order."""
    x, h, weights, m = prepare(case).inputs
    alone = mlp.modulated_mlp(x[:1], h[:1], weights, m, path="decode")
    among = mlp.modulated_mlp(x, h, weights, m, path="decode")[:1]
    if torch.equal(alone, among):
        return {"detail": f"the same bits as among {len(x)}"}
    error = (alone - among).norm() / among.norm()
    return {"detail": f"relative difference {error.item():.1e} from that among {len(x)}"}


def sanitizer(day: Day) -> list[Job]:
    """Accesses out of bounds and races that NVIDIA's compute-sanitizer finds.

    It runs two small problems, one of odd sizes.
    """
    tool = shutil.which("compute-sanitizer") if ON_GPU else None
    if not tool:
        reason = "compute-sanitizer is not on PATH" if ON_GPU else "needs a GPU"
        script = partial(_check_script_rows, "its script, without it", (), ("swiglu",), 120.0)
        return [
            row_job("compute-sanitizer", lambda: _skipped(reason)),
            Job("script", script),
        ]
    # padding helps only if torch allocates each tensor on its own, see _check_script_rows
    memcheck = (tool, "--tool=memcheck", "--padding=4096")
    racecheck = (tool, "--tool=racecheck")
    return [
        Job("memcheck", partial(_check_script_rows, "memcheck", memcheck, day.ops, 150.0)),
        Job("racecheck", partial(_check_script_rows, "racecheck", racecheck, day.ops, 120.0)),
    ]


def _check_script_rows(
    what: str, tool: Sequence[str], ops: Sequence[str], seconds: float, deadline: float
) -> Iterator[Row]:
    # torch probes for peers and attributes with calls that are meant to fail
    options = ["--report-api-errors=no", "--error-exitcode=1"] if tool else []
    command = [*tool, *options, sys.executable, "-m", "npt_fast.benchmarks.kernel_checks", *ops]
    variables = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    limit = min(deadline, time.monotonic() + seconds)
    program = Program(command, limit, variables)
    output = [line for line in program.lines() if line.strip()]
    detail = output[-1] if output else ""
    status = "failed" if program.code else "ok"
    if program.code is None:
        status, detail = NOT_RUN, f"ended after {seconds:.0f} s, or with the budget; {detail}"
    yield {"what": what, "status": status, "detail": detail, "output": output[-200:]}


def prepare_process() -> None:
    """Prepare the process that does the jobs."""
    if not ON_GPU:  # on a busy machine small operations wait for the slowest thread
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)


def free_memory() -> None:
    """Free inputs and models that the jobs of a part share, before another part starts."""
    prepare.cache_clear()
    layer_inputs.cache_clear()
    if whole_model := sys.modules.get("npt_fast.benchmarks.whole_model"):
        whole_model.build.cache_clear()
    gc.collect()
    torch.cuda.empty_cache()


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a GPU day.

    Attributes:
        jobs: function that lists its jobs.
        seconds: estimate for an H100, not yet measured. With a budget a part is cut off at 1.2
            times its estimate, so that the parts after it get their turn.
    """

    jobs: Callable[[Day], list[Job]]
    seconds: float


PARTS = {
    part.jobs.__name__: part
    for part in (
        Part(environment, 10),
        Part(values, 140),
        Part(graphs, 60),
        Part(timings, 120),
        Part(model, 110),
        Part(host, 15),
        Part(memory, 20),
        Part(large, 40),
        Part(determinism, 30),
        Part(compilers, 150),
        Part(small_ops, 70),
        Part(tiles, 60),
        Part(sanitizer, 270),
    )
}
"""Name -> part, most valuable first."""
