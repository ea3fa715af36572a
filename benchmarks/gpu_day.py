"""Measure everything about the kernels that needs a GPU, with one command and one report.

``python -m npt_fast.benchmarks.gpu_day --budget 540`` runs the most valuable parts first and ends
in time. Whatever happens, it writes a report that says for every part what ran and what did not.
See docs/gpu.md.

``TRITON_INTERPRET=1 python -m npt_fast.benchmarks.gpu_day --tiny`` runs all parts on small problems
without a GPU, to try the command and not to measure.
"""

from __future__ import annotations

import argparse
import inspect
import math
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from npt_fast.benchmarks.device import INTERPRETED, ON_GPU, device_state
from npt_fast.benchmarks.gpu_parts import PARTS, Day
from npt_fast.benchmarks.gpu_report import ALL_OF_IT, Report
from npt_fast.benchmarks.gpu_worker import Late, Worker
from npt_fast.benchmarks.harness import RESULTS, machine_facts
from npt_fast.benchmarks.kernel_cases import OPS, PROVIDERS
from npt_fast.benchmarks.rows import NOT_RUN, SKIPPED, STOPPED, Row
from npt_fast.errors import BenchmarkError, suggestion

LEAST = 30.0
"""Least budget in seconds: Python, torch and a context on the device take 20 of them."""
_END = 10.0
"""Seconds of the budget reserved for a job that does not answer, and for the report."""
_SHORTEST = 2.0
"""Least seconds that must be left for a job to start."""
_LONGEST = 3600.0
"""Seconds after which a job counts as hung if there is no budget."""
_PATIENCE = 1.2
"""Multiple of its estimate that a part may take if there is a budget, since others wait."""


@dataclass(frozen=True)
class Call:
    """One call of the command.

    Attributes:
        worker: process that does the jobs.
        report: report of this call.
        end: time of `time.monotonic` after which nothing starts.
        output: folder for the report, which is written after every job and when the run is
            stopped; None writes nothing.
        whole: whether jobs do everything. With some providers or ops left out, a later call must
            not take them for done.
    """

    worker: Worker
    report: Report
    end: float = math.inf
    output: Path | None = None
    whole: bool = True

    def run(self, parts: Sequence[str]) -> None:
        """Run the jobs of these parts that the report lacks."""
        left = list(parts)
        try:
            while left:
                print(left[0], flush=True)
                started = time.monotonic()
                try:
                    self._part(left[0])
                finally:
                    self.report.took(left.pop(0), time.monotonic() - started)
        finally:
            for name in left:
                self.report.add(name, ALL_OF_IT, {"what": ALL_OF_IT, "status": STOPPED})
            self._write()

    def _part(self, name: str) -> None:
        now = time.monotonic()
        share = _LONGEST if math.isinf(self.end) else _PATIENCE * PARTS[name].seconds
        deadline = min(self.end, now + share)
        jobs, index = [ALL_OF_IT], 0
        try:
            if deadline - now > _SHORTEST:
                jobs = self.worker.jobs(name, deadline)
            for index, job in enumerate(jobs):
                if not self.report.has(name, job):
                    self._job(name, job, index, deadline)
                    self._write()
        except Late:  # listing the jobs itself was late
            self.report.add(name, ALL_OF_IT, {"what": ALL_OF_IT, "status": NOT_RUN})
        except RuntimeError as error:
            failed = {"what": ALL_OF_IT, "status": "failed", "detail": str(error)}
            self.report.add(name, ALL_OF_IT, failed)
        except BaseException:
            for job in jobs[index:]:
                self.report.add(name, job, {"what": job, "status": STOPPED})
            raise

    def _job(self, part: str, job: str, index: int, deadline: float) -> None:
        def add(row: Row) -> None:
            self.report.add(part, job, row)
            print(f"  {row['status']:15} {row['what']} {row.get('provider', '')}", flush=True)

        if deadline - time.monotonic() < _SHORTEST:
            add({"what": job, "status": NOT_RUN})
            return
        complete = self.whole
        try:
            for row in self.worker.run(part, index, deadline):
                complete = complete and row["status"] not in (NOT_RUN, SKIPPED)
                add(row)
        except Late as error:
            complete = False
            add({"what": job, "status": NOT_RUN, "detail": f"begun, and then {error}"})
        except RuntimeError as error:
            add({"what": job, "status": "failed", "detail": str(error)})
        if complete:
            self.report.finish(part, job)

    def _write(self) -> None:
        if self.output:
            self.report.write(self.output)


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
                    f"--{name}: there is no {word!r}{suggestion(word, known)} ({', '.join(known)})"
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
    if options.output:
        try:
            options.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--output {options.output}: {error.strerror}")
        if not os.access(options.output, os.W_OK):
            parser.error(f"--output {options.output}: cannot be written to")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    begin = time.monotonic()
    options = parse(arguments)
    end = begin + options.budget - _END if options.budget else math.inf
    for stop in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stop, lambda number, frame: sys.exit(128 + number))
    report = Report({name: inspect.getdoc(part.jobs) or "" for name, part in PARTS.items()})
    given = sys.argv[1:] if arguments is None else arguments
    day = Day(options.tiny, options.ops, options.providers, options.shapes)
    worker = Worker(day) if options.runs else None
    try:
        if worker:
            facts = machine_facts("torch", "triton", "transformers", "liger-kernel")
            facts |= worker.facts(min(end, begin + _LONGEST))
            if state := device_state():
                facts["nvidia-smi"] = "; ".join(state)
            if options.tiny:
                facts["problems"] = "tiny: times mean nothing"
                if ON_GPU:  # keep these numbers out of reports of real runs
                    facts["device"] += ", tiny problems"
            facts["command"] = f"`{' '.join(['python -m npt_fast.benchmarks.gpu_day', *given])}`"
            report.runs.append(facts)
        files = list(options.merge or ())
        if options.merge == []:
            files += [file for file in [report.file(options.output)] if file.exists()]
        for file in files:
            report.merge(file)
        if worker:
            whole = (options.ops, options.providers) == (OPS, PROVIDERS)
            Call(worker, report, end, options.output, whole).run(options.only)
    except OSError as error:
        print(f"Error: the report cannot be written: {error}", file=sys.stderr)
        return 4
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
