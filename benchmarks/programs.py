"""Programs that a part runs, such as tests. All of them end at a deadline."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec

from npt_fast.benchmarks.harness import CHECKOUT, ROOT
from npt_fast.benchmarks.pytest_rows import MARK
from npt_fast.benchmarks.rows import NOT_RUN, Row

_EVERY = 2.0
"""Seconds between rows of a test file that is still running."""


class Program:
    """A program and its children, run in the root of the checkout.

    Attributes:
        code: exit status after the last line; None if it was ended at the deadline.
    """

    def __init__(
        self, command: Sequence[str], deadline: float, variables: Mapping[str, str] | None = None
    ) -> None:
        self._command, self._deadline, self._variables = command, deadline, variables
        self.code: int | None = None

    def lines(self) -> Iterator[str]:
        """Lines of stdout and stderr as they arrive; the program ends with the iterator."""
        late = threading.Event()
        with subprocess.Popen(
            self._command, cwd=ROOT, env=self._variables, text=True, errors="replace",
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its children end with it
        ) as process:  # fmt: skip

            def end() -> None:
                late.set()
                os.killpg(process.pid, signal.SIGKILL)

            left = max(0.0, self._deadline - time.monotonic())
            timer = threading.Timer(min(left, threading.TIMEOUT_MAX), end)
            timer.start()
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    yield line.rstrip("\n")
                process.wait()
            finally:
                timer.cancel()
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        self.code = None if late.is_set() else process.returncode


def run_tests(arguments: Sequence[str], deadline: float, *, processes: int = 10) -> Iterator[Row]:
    """Run tests of the checkout; yield a row for each file, again whenever it has new results.

    Args:
        arguments: arguments of pytest.
        deadline: time of `time.monotonic` at which the tests end.
        processes: most processes, if pytest-xdist is installed.
    """
    missing = "needs a checkout" if not CHECKOUT else None if find_spec("pytest") else "no pytest"
    if missing:
        yield {"what": " ".join(arguments), "status": "skipped", "detail": missing}
        return
    options = ["-p", "npt_fast.benchmarks.pytest_rows", "-p", "no:cacheprovider", "-q", "-s"]
    processes = min(processes, os.cpu_count() or 1)
    if processes > 1 and find_spec("xdist"):
        options += ["-n", str(processes)]
    program = Program([sys.executable, "-m", "pytest", *options, *arguments], deadline)
    files: dict[str, _File] = {}
    changed: set[str] = set()
    output: list[str] = []
    said = time.monotonic()
    for line in program.lines():
        output.append(line)
        _, found, text = line.partition(MARK)
        if found:
            report = json.loads(text)
            files.setdefault(report["file"], _File(report["file"])).add(report)
            changed.add(report["file"])
        if time.monotonic() > said + _EVERY:
            yield from (files[name].row for name in sorted(changed))
            changed, said = set(), time.monotonic()
    yield from (file.row for file in files.values())
    if program.code is None:
        yield {"what": "the other tests", "status": NOT_RUN, "detail": "the time was over"}
    elif program.code and not any(file.failed for file in files.values()):
        last = next((line for line in reversed(output) if line.strip()), "")
        detail = f"exit code {program.code}; {last}"
        yield {"what": "pytest", "status": "failed", "detail": detail, "output": output[-50:]}


class _File:
    """Results of a file's tests so far."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._passed = 0
        self.failed: list[str] = []
        self._skipped: list[str] = []

    def add(self, report: Mapping[str, str]) -> None:
        """Count a test."""
        if report["outcome"] == "passed":
            self._passed += 1
        elif report["outcome"] == "failed":
            self.failed.append(f"{report['test']}: {report['reason']}")
        else:
            self._skipped.append(report["reason"])

    @property
    def row(self) -> Row:
        """Counts, names of failed tests, and reasons of skipped ones."""
        status = "failed" if self.failed else "ok" if self._passed else "skipped"
        details = [*self.failed[:20], *sorted(set(self._skipped))]
        counts = {"passed": self._passed, "failed": len(self.failed)}
        more = {"skipped": len(self._skipped), "status": status, "detail": "; ".join(details)}
        return {"what": self._name, **counts, **more}
