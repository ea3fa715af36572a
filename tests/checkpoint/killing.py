"""Run a writer of a directory in processes that are killed anywhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

# Forks one process per run, so that a test need not wait for imports. A run may be told to kill
# itself at its n-th entry to, or return from, a function of the operating system; or it is killed
# after a time. Reading a file imports numpy, whose calls would be most of those in a fork.
_RUNNER = """
import ctypes, json, os, sys, time
import numpy

def run(order):
    seen = 0
    def watch(frame, event, function):
        nonlocal seen
        if event in ("c_call", "c_return") and function.__module__ in ("posix", "fcntl"):
            seen += 1
            if seen == order["at"]:
                os.kill(os.getpid(), 9)
    if order["at"] is not None:
        sys.setprofile(watch)
    write(order["inputs"], order["output"], **order["options"])
    sys.setprofile(None)
    return seen

for line in sys.stdin:
    order = json.loads(line)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, str(run(order)).encode())
            os._exit(0)
        except BaseException as error:
            os.write(writer, repr(error).encode())
            os._exit(1)
    os.close(writer)
    if order["after"] is not None:
        time.sleep(order["after"])
        os.kill(pid, 9)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(json.dumps([code, os.read(reader, 9999).decode()]), flush=True)
    os.close(reader)
"""


class Runner:
    """Runs each call in a process of its own.

    Args:
        imports: code that defines ``write(inputs, output, **options)``, and imports what it needs.
    """

    def __init__(self, imports: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"{imports}\n{_RUNNER}"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(
        self,
        inputs: list[Path],
        output: Path,
        *,
        at: int | None = None,
        after: float | None = None,
        **options: Any,
    ) -> tuple[int, str]:
        """Exit code of a call (negative for a signal) and what it printed.

        Args:
            inputs: paths that it gets.
            output: path that it gets.
            at: event at which it kills itself; 0 only counts them and prints their number.
            after: seconds after which it is killed.
            **options: its keywords.
        """
        order = {"inputs": list(map(str, inputs)), "output": str(output), "options": options}
        assert self._process.stdin is not None and self._process.stdout is not None
        line = json.dumps({**order, "at": at, "after": after})
        print(line, file=self._process.stdin, flush=True)
        code, said = json.loads(self._process.stdout.readline())
        return code, said

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
