"""Everything about the kernels that only a GPU can tell, in one command and one report.

``python -m npt_fast.benchmarks.gpu_day --budget 540`` does the most valuable first and ends in
time; whatever happens there is a report, which says of every part what was done and what was not.
See docs/gpu.md.

``TRITON_INTERPRET=1 python -m npt_fast.benchmarks.gpu_day --tiny`` runs all of it on small problems
where there is no GPU: to try the command, not to measure.
"""

from __future__ import annotations

import argparse
import inspect
import math
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from npt_fast.benchmarks.device import INTERPRETED, ON_GPU, device_state
from npt_fast.benchmarks.gpu_parts import PARTS, Day
from npt_fast.benchmarks.gpu_report import ALL_OF_IT, Report
from npt_fast.benchmarks.gpu_worker import Late, Worker
from npt_fast.benchmarks.harness import RESULTS, machine_facts
from npt_fast.benchmarks.kernel_cases import OPS, PROVIDERS
from npt_fast.benchmarks.rows import NOT_RUN, STOPPED, Row
from npt_fast.errors import BenchmarkError, suggestion

LEAST = 30.0
"""Seconds without which nothing can be done: Python, torch and a context on the device take 20."""
_END = 10.0
"""Seconds of the budget that are kept for the end: a job that does not answer, the report."""
_SHORTEST = 2.0
"""Seconds that must be left for a job to be begun."""
_LONGEST = 3600.0
"""Seconds after which a job counts as hung where there is no budget."""
_PATIENCE = 1.5
"""What a part may take of its time where there is a budget, since others wait behind it."""


def run(
    parts: Sequence[str], worker: Worker, end: float, report: Report, output: Path | None
) -> None:
    """Do what the report has not. It is written after every job, and when something stops all.

    Args:
        parts: of `PARTS`.
        worker: does the jobs.
        end: of `time.monotonic`; nothing is begun behind it.
        report: has the facts about this call.
        output: a folder; None: nothing is written.
    """
    left = list(parts)
    try:
        while left:
            print(left[0], flush=True)
            started = time.monotonic()
            try:
                _run_part(left[0], worker, end, report, output)
            finally:
                report.took(left.pop(0), time.monotonic() - started)
    finally:
        for name in left:
            report.add(name, ALL_OF_IT, {"what": ALL_OF_IT, "status": STOPPED})
        if output:
            report.write(output)


def _run_part(name: str, worker: Worker, end: float, report: Report, output: Path | None) -> None:
    now = time.monotonic()
    deadline = min(end, now + (_LONGEST if math.isinf(end) else _PATIENCE * PARTS[name].seconds))
    jobs, index = [ALL_OF_IT], 0
    try:
        if deadline - now > _SHORTEST:
            jobs = worker.jobs(name, deadline)
        for index, job in enumerate(jobs):
            if not report.has(name, job):
                _run_job(name, job, index, worker, deadline, report)
                if output:
                    report.write(output)
    except RuntimeError as error:  # of the list
        report.add(name, ALL_OF_IT, {"what": ALL_OF_IT, "status": "failed", "detail": str(error)})
    except BaseException:
        for job in jobs[index:]:
            report.add(name, job, {"what": job, "status": STOPPED})
        raise


def _run_job(
    part: str, job: str, index: int, worker: Worker, deadline: float, report: Report
) -> None:
    def add(row: Row) -> None:
        report.add(part, job, row)
        print(f"  {row['status']:15} {row['what']} {row.get('provider', '')}", flush=True)

    if deadline - time.monotonic() < _SHORTEST:
        add({"what": job, "status": NOT_RUN})
        return
    complete = True
    try:
        for row in worker.run(part, index, deadline):
            complete = complete and row["status"] != NOT_RUN
            add(row)
    except Late as error:
        complete = False
        add({"what": job, "status": NOT_RUN, "detail": f"begun, and then {error}"})
    except RuntimeError as error:
        add({"what": job, "status": "failed", "detail": str(error)})
    if complete:
        report.finish(part, job)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"Error: {message}\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="end within this time")
    parser.add_argument("--tiny", action="store_true", help="small problems, to try the command")
    parser.add_argument("--output", type=Path, metavar="DIR", help=f"{RESULTS}; none with --tiny")
    for name, known, what in (
        ("only", tuple(PARTS), "parts"),
        ("ops", OPS, "what is timed"),
        ("providers", PROVIDERS, "ways to compute it; baselines come along"),
    ):
        parser.add_argument(
            f"--{name}", default=known, metavar="A,B", type=lambda text: tuple(text.split(",")),
            help=f"{what}, of {', '.join(known)}",
        )  # fmt: skip
    parser.add_argument("--shapes", default="", metavar="REGEX", help="problems it is found in")
    parser.add_argument(
        "--merge", type=Path, nargs="*", metavar="FILE",
        help="take over reports of earlier calls, the one in --output if no FILE is named, and "
        "run only what they have not; without a GPU, and without --tiny, run nothing",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    for name, known in (("only", tuple(PARTS)), ("ops", OPS), ("providers", PROVIDERS)):
        for word in getattr(options, name):
            if word not in known:
                parser.error(
                    f"--{name}: there is no {word}{suggestion(word, known)} ({', '.join(known)})"
                )
    try:
        re.compile(options.shapes)
    except re.error as error:
        parser.error(f"--shapes: {error}")
    if options.budget is not None and not options.budget >= LEAST:
        parser.error(f"--budget {options.budget:g}: nothing can be done in less than {LEAST:g} s")
    options.runs = ON_GPU or (options.tiny and INTERPRETED)
    if not options.runs and not options.merge:
        parser.error("no GPU here; with TRITON_INTERPRET=1, --tiny runs in Triton's interpreter")
    options.output = options.output or (None if options.tiny else RESULTS)
    if options.merge == [] and options.output is None:
        parser.error("--merge: name files, or --output, whose report it then goes on with")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    begin = time.monotonic()
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    report = Report({name: inspect.getdoc(part.jobs) or "" for name, part in PARTS.items()})
    given = sys.argv[1:] if arguments is None else arguments
    day = Day(options.tiny, options.ops, options.providers, options.shapes)
    worker = Worker(day) if options.runs else None
    try:
        if worker:
            facts = machine_facts("torch", "triton", "transformers", "liger-kernel")
            facts |= worker.facts(begin + _LONGEST)
            if state := device_state():
                facts["nvidia-smi"] = "; ".join(state)
            if options.tiny:
                facts["problems"] = "tiny: times mean nothing"
            facts["command"] = f"`{' '.join(['python -m npt_fast.benchmarks.gpu_day', *given])}`"
            report.runs.append(facts)
        files = list(options.merge or ())
        if options.merge == []:
            files += [file for file in [report.file(options.output)] if file.exists()]
        for file in files:
            report.merge(file)
        if worker:
            end = begin + options.budget - _END if options.budget else math.inf
            run(options.only, worker, end, report, options.output)
    except (BenchmarkError, RuntimeError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    finally:
        if worker:
            worker.stop()
    if not worker:
        print("No GPU here: the reports were merged, and nothing was run")
    if options.output:
        print(f"Saved to {report.write(options.output)}")
    else:
        print(report.markdown())
    return int(report.bad)


if __name__ == "__main__":
    sys.exit(main())
