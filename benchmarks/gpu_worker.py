"""A separate process for jobs, because a device that failed or hangs is lost for the process that
used it."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from npt_fast.benchmarks.rows import Row

_GRACE = 5.0
"""Seconds that a job may exceed its deadline, which it checks only now and then."""


class Late(RuntimeError):
    """A job exceeded its deadline, and its process was killed."""


class Worker:
    """Lists and runs jobs in a process, which is restarted whenever it has ended.

    Args:
        day: selection, a `gpu_parts.Day`.
    """

    def __init__(self, day: Any) -> None:
        self._day = day
        self._process: Any = None
        self._connection: Any = None
        self._start()  # it loads torch while the parent goes on

    def facts(self, deadline: float) -> dict[str, str]:
        """Facts about the device.

        Raises:
            RuntimeError: the process ended.
            Late: there is no answer shortly after the deadline of `time.monotonic`.
        """
        return dict(self._ask(("facts",), deadline))

    def jobs(self, part: str, deadline: float) -> list[str]:
        """Names of the jobs of a part; raises as `facts` does."""
        return list(self._ask(("list", part), deadline))

    def run(self, part: str, index: int, deadline: float) -> Iterator[Row]:
        """Rows of a job as they arrive; raises as `facts` does."""
        return self._ask(("run", part, index, deadline), deadline)

    def _start(self) -> None:
        if self._process is not None and self._process.is_alive():
            return
        # CUDA does not work in a forked process
        context = get_context("spawn")
        self._connection, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, self._day), daemon=True)
        self._process.start()
        # the parent's copy, or the end of the child would never show as end of file
        there.close()

    def _ask(self, request: tuple[Any, ...], deadline: float) -> Iterator[Any]:
        self._start()
        try:
            self._connection.send(request)
            while True:
                wait = max(0.0, deadline + _GRACE - time.monotonic())
                # poll refuses an infinite time, and 1e7 seconds too
                if not self._connection.poll(min(wait, 1e6)):
                    self.stop()
                    raise Late("no answer; its process was ended")
                kind, value = self._connection.recv()
                if kind == "end":
                    return
                if kind == "error":
                    raise RuntimeError(value)
                yield value
        except (EOFError, ConnectionError):
            self._process.join()
            code = self._process.exitcode
            self.stop()
            name = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            raise RuntimeError(f"its process ended with {name}") from None

    def stop(self) -> None:
        """End the process and its children."""
        if self._process is None:
            return
        self._process.terminate()  # its handler ends its programs
        self._process.join(2)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._connection.close()
        self._process = self._connection = None


def _serve(connection: Connection, day: Any) -> None:
    """Main function of the process: answer requests until the connection closes."""
    os.setpgrp()  # so that signals to the parent's group do not reach it
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    from npt_fast.benchmarks.device import device_error, device_facts
    from npt_fast.benchmarks.gpu_parts import PARTS, free_memory, prepare_process

    prepare_process()
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("npt_fast.benchmarks").setLevel(logging.DEBUG)  # shows errors with tracebacks
    listed: dict[str, Any] = {}

    def answer(what: str, part: str = "", index: int = 0, deadline: float = 0.0) -> Iterator[Any]:
        if what == "facts":
            yield from device_facts().items()
            return
        if part not in listed:
            free_memory()
            listed[part] = PARTS[part].jobs(day)
        if what == "list":
            yield from (job.what for job in listed[part])
        else:
            yield from listed[part][index].run(deadline)

    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        outcome: tuple[str, Any] = ("end", None)
        try:
            for value in answer(*request):
                connection.send(("value", value))
        except Exception as error:  # a job's error must not stop the others
            outcome = ("error", f"{type(error).__name__}: {error}")
        if lost := device_error():  # before the answer, so that this job is the one that fails
            print(f"The device failed: {lost}", file=sys.stderr, flush=True)
            sys.exit(1)
        connection.send(outcome)
