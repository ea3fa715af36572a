"""Pieces of code in new processes, for what depends on what is imported, and in which order."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping


def run_python(
    code: str, *arguments: str, environment: Mapping[str, str] = os.environ
) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new process, which ends without taking down its modules.

    That, and searching for garbage while all is imported, takes 2 of the 5 s of a process that
    imports transformers.
    """
    program = f"import gc, os, sys\ngc.disable()\n{code}\nsys.stdout.flush()\nos._exit(0)"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
