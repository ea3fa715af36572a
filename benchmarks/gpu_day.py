"""Everything about the kernels that only a GPU can tell, in one command and one report.

``python -m benchmarks.gpu_day`` runs the sections one after another and writes a JSON file and its
tables after each of them. What fails is recorded, does not stop the rest, and makes the exit code
1; if all of it is killed, the rows of the section at hand stay in a folder beside the tables. See
docs/gpu.md.

``TRITON_INTERPRET=1 python -m benchmarks.gpu_day --tiny`` runs all of it on a small problem where
there is no GPU: to try the command, not to measure.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from typing import Any, get_args
from xml.etree import ElementTree

import torch
from torch import Tensor

from npt_fast.benchmarks.bench_modulation import FORMS, formula_bytes, kept_bytes
from npt_fast.benchmarks.device import DEVICE, DTYPE, ON_GPU, device_facts, device_state, peak_bytes
from npt_fast.benchmarks.harness import MB, RESULTS, ROOT, machine_facts, save
from npt_fast.benchmarks.kernel_cases import (
    OPS,
    REAL,
    TINY,
    Case,
    Shapes,
    cases,
    tensors,
)
from npt_fast.benchmarks.kernel_timing import (
    Ceilings,
    Timing,
    attempt,
    measure_ceilings,
    prepare,
    time_case,
)
from npt_fast.cli.output import markdown_table
from npt_fast.kernels import coefficients, modulated_linear, probe, roofline, swiglu
from npt_fast.kernels import modulated_mlp as mlp
from npt_fast.kernels._launch import INTERPRETED
from npt_fast.kernels._tuning import enable_autotuning

Row = dict[str, Any]
"""What was looked at, a status, details; numbers. Lists go to the JSON file only."""

BAD = ("failed", "wrong", "differs")
PATHS = get_args(mlp.Path)
ROOFLINES = {f"triton {path}": path for path in PATHS} | {"reference": roofline.EAGER_VECTORS}
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
GPU_TESTS = "tests/kernels/test_gpu_only.py"


@dataclass(frozen=True, slots=True)
class Day:
    """One run.

    Attributes:
        tiny: small problems.
        ops: what is timed.
        tiles: file of measured tiles, for timings with those; None: the rules' defaults.
    """

    tiny: bool
    ops: Sequence[str]
    tiles: Path | None = None

    @property
    def shapes(self) -> Shapes:
        return TINY if self.tiny else REAL


def row(what: str, function: Callable[[], Row | None], **more: Any) -> Row:
    """What a function says, or how it failed."""
    result, status, detail = attempt(function)
    return {"what": what, **more, "status": status, "detail": detail, **(result or {})}


def values(day: Day) -> Iterator[Row]:
    """Every kernel in every dtype of the device against its definition: the tests."""
    if day.tiny:  # they run elsewhere, and take minutes
        command = [*PYTEST, "tests/kernels", "--collect-only", "-q"]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        *_, last = found.stdout.strip().splitlines() or [found.stderr]
        status = "failed" if found.returncode else "ok"
        yield {"what": "tests/kernels", "status": status, "detail": f"{last}; tiny: not run"}
    else:
        yield from tests("tests/kernels", f"--ignore={GPU_TESTS}")


def graphs(day: Day) -> Iterator[Row]:
    """CUDA graphs and second devices: tests that nothing but a GPU can run."""
    yield from tests(GPU_TESTS)


def tests(*arguments: str) -> Iterator[Row]:
    """One row for each file of tests; names of those that failed, reasons of those skipped."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [*PYTEST, "-q", f"--junitxml={report}", *arguments]
        code = subprocess.run(command, cwd=ROOT, check=False, stdout=sys.stderr).returncode
        found = ElementTree.parse(report).iter("testcase") if report.exists() else iter(())
        by_file = groupby(found, lambda case: case.get("classname", "").partition(".Test")[0])
        rows = [_file_row(name, list(group)) for name, group in by_file]
    if code and not any(r["status"] == "failed" for r in rows):
        rows.append({"what": "pytest", "status": "failed", "detail": f"exit code {code}"})
    yield from rows


def _file_row(name: str, found: Sequence[ElementTree.Element]) -> Row:
    failed = [case for case in found if {child.tag for child in case} & {"failure", "error"}]
    skipped = [child for case in found for child in case if child.tag == "skipped"]
    details = [case.get("name", "") for case in failed[:20]]
    details += sorted({child.get("message", "") for child in skipped})
    status = "failed" if failed else "skipped" if len(skipped) == len(found) else "ok"
    counts = {"passed": len(found) - len(failed) - len(skipped), "failed": len(failed)}
    more = {"status": status, "detail": "; ".join(details)}
    return {"what": name, **counts, "skipped": len(skipped), **more}


def determinism(day: Day) -> Iterator[Row]:
    """Bits of two runs, values and gradients; and of a token decoded alone and among others."""
    for case in (case for op in ("decode", "modulated_mlp") for case in cases(op, day.shapes)):
        for name in case.providers:
            if name.startswith("triton"):
                yield row(f"{case}, {name}", partial(_twice, case, name))
        if case.op == "decode":
            yield row(f"{case}, first token alone", partial(_alone, case))


def _twice(case: Case, name: str) -> Row:
    run = partial(case.providers[name].run, *prepare(case).inputs)
    pairs = zip(tensors(run()), tensors(run()), strict=True)
    same = all(torch.equal(first, second) for first, second in pairs)
    return {"status": "ok" if same else "differs", "detail": "" if same else "of another run"}


def _alone(case: Case) -> Row:
    """Reported, and no failure: tiles of more tokens may add up in another order."""
    x, h, base, m = prepare(case).inputs
    alone = mlp.modulated_mlp(x[:1], h[:1], base, m, path="decode")
    among = mlp.modulated_mlp(x, h, base, m, path="decode")[:1]
    if torch.equal(alone, among):
        return {"detail": f"the same bits as among {len(x)}"}
    error = (alone - among).norm() / among.norm()
    return {"detail": f"relative difference {error.item():.1e} from that among {len(x)}"}


def large(day: Day) -> Iterator[Row]:
    """Tensors of more than 2^31 elements, by comparing some rows with calls for these rows alone.

    Rows are the first, the last, and those around element 2^31.
    """
    width, rank = (64, 16) if day.tiny else (4096, 64)
    tokens = 300 if day.tiny else 2**31 // width + 193
    k = width // rank
    narrow = 32
    out = torch.randn(narrow, width, device=DEVICE, dtype=DTYPE)
    back = torch.randn(width, narrow, device=DEVICE, dtype=DTYPE) / width**0.5

    def coefficients_bwd(dz: Tensor, u: Tensor, p: Tensor, s: Tensor) -> Sequence[Tensor]:
        du = torch.empty_like(u)
        one = (t.unsqueeze(0) for t in (dz, u, p, s.float(), du))
        dp, z = coefficients.coefficients_bwd(*one)
        return dp, z[0], du

    def coefficients_fwd(u: Tensor, p: Tensor) -> Sequence[Tensor]:
        s, z = coefficients.coefficients_fwd(u.unsqueeze(0), p.unsqueeze(0), k)
        return s[0], z[0]

    def probe_fwd(a: Tensor, u: Tensor) -> Sequence[Tensor]:
        s, z, p = probe.probe(a, back, u.unsqueeze(0), k, True)
        return s[0], z[0], p

    def to_wide(a: Tensor) -> Sequence[Tensor]:
        return [modulated_linear.modulated_linear([a, a], [out, out], None)]

    def from_wide(a: Tensor) -> Sequence[Tensor]:
        return [modulated_linear.modulated_linear([a, a], [back, back], None)]

    def gate_up(h: Tensor) -> Sequence[Tensor]:
        z = h.unsqueeze(0)
        arguments = (back, back, z, out, None, None, None, True)
        return modulated_linear.modulated_gate_up(h, *arguments)

    for what, widths, written, run in (
        ("coefficients, forward", (width, width), width + 2 * k, coefficients_fwd),
        ("coefficients, backward", (width, width, width, k), 3 * width, coefficients_bwd),
        ("swiglu, forward", (width, width), width, lambda *a: [swiglu.swiglu_fwd(*a)]),
        ("swiglu, backward", (width, width, width), 3 * width, swiglu.swiglu_bwd),
        ("modulated_linear, wide result", (narrow,), width, to_wide),
        ("modulated_linear, wide operand", (width,), narrow, from_wide),
        ("modulated_linear, gate and up", (narrow,), 3 * width, gate_up),
        ("probe", (narrow, width), 2 * width + 2 * k, probe_fwd),
    ):
        need = tokens * (sum(widths) + written) * DTYPE.itemsize
        more = {"elements": tokens * width, "GB": need / 1e9}
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0] if ON_GPU else math.inf
        if 1.05 * need > free:
            detail = f"the device has {free / 1e9:.1f} GB free"
            yield {"what": what, **more, "status": "skipped", "detail": detail}
        else:
            yield row(what, partial(_sampled, run, tokens, widths, width), **more)


def _sampled(
    run: Callable[..., Sequence[Tensor]], tokens: int, widths: Sequence[int], width: int
) -> None:
    inputs = [torch.randn(tokens, n, device=DEVICE, dtype=DTYPE) for n in widths]
    results = run(*inputs)
    middle = min(2**31 // width, tokens - 128)
    for begin in (0, middle - 64, tokens - 128):
        some = slice(begin, begin + 128)
        for found, expected in zip(results, run(*(t[some] for t in inputs)), strict=True):
            torch.testing.assert_close(found[some], expected, rtol=0.02, atol=0.02)


def memory(day: Day) -> Iterator[Row]:
    """A training step's bytes: kept between forward and backward, by formula too; at the peak."""
    factored, again, reference = FORMS
    forms = {
        "eager": factored,
        "triton gemm": factored,
        "triton fused": factored,
        "triton gemm, probes again": again,
        "reference": reference,
    }
    for case in cases("modulated_mlp", day.shapes):
        if case.what != "forward":
            problem = day.shapes.training[case.shape]
            for name, form in forms.items():
                expected = formula_bytes(problem, form, DTYPE)
                yield row(f"{case.shape}, {name}", partial(_memory_row, case, name, expected))


def _memory_row(case: Case, name: str, expected: int) -> Row:
    inputs = prepare(case).inputs
    run = partial(case.providers[name].run, *inputs)
    kept = kept_bytes(inputs[:4], run)  # a step's backward keeps nothing more
    found: Row = {"kept MB": kept / MB, "formula MB": expected / MB}
    found["kept / formula"] = kept / expected
    if ON_GPU:
        found["peak MB"] = peak_bytes(run) / MB
    return found | {"status": "ok" if abs(kept / expected - 1) <= 0.02 else "differs"}


def sanitizer(day: Day) -> Iterator[Row]:
    """Accesses out of bounds and races, as NVIDIA's compute-sanitizer sees them."""
    tool = shutil.which("compute-sanitizer") if ON_GPU else None
    if tool:
        # room between allocations, of which torch must make one for every tensor
        yield row("memcheck", partial(_script, tool, "--tool=memcheck", "--padding=4096"))
        yield row("racecheck", partial(_script, tool, "--tool=racecheck"))
    else:
        reason = "not on PATH" if ON_GPU else "needs a GPU"
        yield {"what": "compute-sanitizer", "status": "skipped", "detail": reason}
        yield row("its script, without it", partial(_script, ops=("swiglu",)))


def _script(*tool: str, ops: Sequence[str] = OPS) -> Row:
    options = ["--error-exitcode=1"] if tool else []
    command = [*tool, *options, sys.executable, "-m", "benchmarks.kernel_cases", *ops]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    output = (done.stdout + done.stderr).strip().splitlines()
    status = "failed" if done.returncode else "ok"
    return {"status": status, "detail": output[-1] if output else "", "output": output[-200:]}


def timings(day: Day) -> Iterator[Row]:
    """Medians, interleaved; what gives wrong values is refused, and not timed.

    Ratios are to the time of eager: smaller is faster. GB/s counts inputs and outputs once. The
    ceiling is what a plain copy of these bytes or the vendor's product of as many FLOPs takes on
    this device, whichever is longer; the roofline, the same launch by launch, as
    kernels/roofline.py counts a path's bytes.
    """
    if day.tiles:
        enable_autotuning(day.tiles)
    ceilings = measure_ceilings() if ON_GPU and not day.tiny else None
    if ceilings:
        yield {
            "op": "ceilings", "what": "copy, and product of 8192 x 8192", "status": "ok",
            "GB/s": ceilings.bytes_per_second / 1e9, "TFLOP/s": ceilings.flops_per_second / 1e12,
        }  # fmt: skip
    timed: list[Timing] = []
    for case in (case for op in day.ops for case in cases(op, day.shapes)):
        found, status, detail = attempt(partial(list, time_case(case)))
        if found is None:
            yield {"op": case.op, "what": str(case), "status": status, "detail": detail}
            continue
        timed += found
        yield from (_timing_row(timing, ceilings, day.shapes) for timing in found)
    with_paths = [timing for timing in timed if timing.case.chosen]
    for (case, launch), group in groupby(with_paths, lambda t: (t.case, t.launch)):
        if launch:
            yield _path_row(f"{case}, {launch}", case.chosen, list(group))


def _timing_row(timing: Timing, ceilings: Ceilings | None, shapes: Shapes) -> Row:
    case, ms = timing.case, timing.milliseconds
    found: Row = {
        "op": case.op, "what": f"{case.what}, {case.shape}", "provider": timing.provider,
        "launch": timing.launch, "status": timing.status, "detail": timing.detail,
    }  # fmt: skip
    if ms and not ON_GPU:
        return found | {"interpreter ms": ms[0]}
    if ms:
        low, *_, high = statistics.quantiles(ms, n=5, method="inclusive")
        median = statistics.median(ms)
        found |= {"ms": median, "p20": low, "p80": high}
        if timing.ratios:
            found["ratio"] = statistics.median(timing.ratios)
        found |= {"GB/s": timing.bytes / median / 1e6, "TFLOP/s": timing.flops / median / 1e9}
        if ceilings:
            found["of ceiling"] = ceilings.share(timing)
            found["of roofline"] = _roofline_ms(timing, ceilings, shapes) / median or None
        found |= {"peak MB": timing.peak / MB, "milliseconds": ms, "ratios": timing.ratios}
    return found


def _roofline_ms(timing: Timing, ceilings: Ceilings, shapes: Shapes) -> float:
    """The least time of a path of the MLP; 0 for all else."""
    form, case = ROOFLINES.get(timing.provider), timing.case
    if case.chosen is None or form is None:
        return 0.0
    p = (shapes.training | shapes.decode)[case.shape]
    shape = roofline.Shape(p.hidden, p.intermediate, p.num_ranks, p.rank)
    gpu = roofline.GPU(ceilings.flops_per_second / 1e12, ceilings.bytes_per_second / 1e12)
    phases = ("decode",) if form == "decode" else tuple(case.what.split(" + "))
    costs = roofline.costs(shape, p.tokens)
    return sum(c.in_turn_ms(gpu) for c in costs if c.form == form and c.phase in phases)


def _path_row(what: str, chosen: str | None, group: Sequence[Timing]) -> Row:
    """What `choose_path` takes, and the fastest of the paths."""
    times = {
        timing.provider.removeprefix("triton "): statistics.median(timing.milliseconds)
        for timing in group
        if timing.milliseconds and timing.provider in ("triton " + path for path in PATHS)
    }
    found: Row = {"op": "paths", "what": what, "status": "ok", "chosen": chosen}
    if ON_GPU and chosen in times:
        fastest = min(times, key=lambda path: times[path])
        found |= {"fastest": fastest, "chosen / fastest": times[chosen] / times[fastest]}
    return found


SECTIONS = {
    section.__name__: section
    for section in (values, determinism, large, memory, graphs, sanitizer, timings)
}
PROGRAMS = ("values", "graphs", "sanitizer")
"""Sections that run programs, and do nothing else."""


def write_rows(name: str, day: Day, log: Path) -> None:
    """Run a section; every row is a line of the log as soon as there is one."""
    with log.open("w") as file:
        for found in SECTIONS[name](day):
            file.write(json.dumps(found) + "\n")
            file.flush()
            print(f"  {found['status']:8}{found['what']} {found.get('provider', '')}", flush=True)


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call it in a new process: a device that failed, or no longer answers, is lost for all later
    work of the process that used it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def run_section(name: str, day: Day, output: Path | None, *, alone: bool) -> dict[str, Any]:
    """All rows of a section, even if it breaks off; seconds; devices' states before and after.

    Args:
        name: one of `SECTIONS`.
        day: what to run it on.
        output: where rows stay if all of it is killed.
        alone: whether it may run in this process, which it then may end.
    """
    state, begin = device_state(), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=output) as folder:
        log = Path(folder) / "rows"
        run = partial(write_rows, name, day, log)
        _, status, detail = attempt(run if alone else partial(apart, run))
        rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    if status != "ok":
        rows.append({"what": "the section itself", "status": "failed", "detail": detail})
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "states": [state, device_state()], "rows": rows}


def markdown(sections: dict[str, Any]) -> str:
    """A table of sections, and each section's tables."""
    heads = ("section", "seconds", "result")
    summary = [(name, f"{s['seconds']:.0f}", _counts(s["rows"])) for name, s in sections.items()]
    parts = [markdown_table(heads, summary)]
    for name, section in sections.items():
        parts.append(f"## {name}\n\n{inspect.getdoc(SECTIONS[name])}")
        for op, group in groupby(section["rows"], lambda found: found.get("op", "")):
            parts += [f"### {op}"] if op else []
            parts.append(_table([{k: v for k, v in r.items() if k != "op"} for r in group]))
    return "\n\n".join(parts)


def _counts(rows: Sequence[Row]) -> str:
    counts = Counter(found["status"] for found in rows)
    return ", ".join(f"{count} {status}" for status, count in counts.items())


def _table(rows: Sequence[Row]) -> str:
    """Columns are what any of the rows has something for."""
    heads = dict.fromkeys(key for r in rows for key, value in r.items() if _cell(value) != "-")
    return markdown_table(list(heads), [[_cell(r.get(head)) for head in heads] for r in rows])


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if value < 1e4 else f"{value:.0f}"
    if value is None or value == "" or isinstance(value, list):
        return "-"
    text = " ".join(str(value).replace("|", "/").split())
    return text if len(text) <= 200 else f"{text[:200]}..."


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a small problem, to try the command")
    parser.add_argument("--output", type=Path, metavar="DIR", help=f"{RESULTS}; none with --tiny")
    for name, known in (("--only", tuple(SECTIONS)), ("--ops", OPS)):
        parser.add_argument(
            name, default=known, type=lambda text: tuple(text.split(",")), help=",".join(known)
        )
    parser.add_argument("--tiles", type=Path, metavar="FILE", help="measure tiles, and keep them")
    options = parser.parse_args(arguments)
    for name, known in (("only", tuple(SECTIONS)), ("ops", OPS)):
        if unknown := set(getattr(options, name)) - set(known):
            parser.error(f"--{name}: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if not ON_GPU and not (options.tiny and INTERPRETED):
        parser.error("no GPU here; with TRITON_INTERPRET=1, --tiny runs in Triton's interpreter")
    if options.tiles and not ON_GPU:
        parser.error("--tiles measures, which needs a GPU")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if not ON_GPU:  # on a busy machine, small operations wait for the slowest thread
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
    facts = machine_facts("npt_fast", "torch", "triton", "liger-kernel") | apart(device_facts)
    if state := device_state():
        facts["nvidia-smi"] = "; ".join(state)
    if options.tiny:
        facts["problems"] = "tiny: times mean nothing"
    given = sys.argv[1:] if arguments is None else arguments
    facts["command"] = f"`{' '.join(['python -m benchmarks.gpu_day', *given])}`"
    day, sections = Day(options.tiny, options.ops, options.tiles), dict[str, Any]()
    output = options.output or (None if options.tiny else RESULTS)
    alone = options.only if len(options.only) == 1 else PROGRAMS
    if output:
        output.mkdir(parents=True, exist_ok=True)
    for name in (name for name in SECTIONS if name in options.only):
        print(name, flush=True)
        sections[name] = run_section(name, day, output, alone=name in alone)
        document, text = {"machine": facts, "sections": sections}, markdown(sections)
        if output:
            path = save(
                "gpu-day", "GPU day", facts, text, document, machine="device", directory=output
            )
    print(f"Saved to {path}" if output else text)
    return int(any(r["status"] in BAD for s in sections.values() for r in s["rows"]))


if __name__ == "__main__":
    sys.exit(main())
