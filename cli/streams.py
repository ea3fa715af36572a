"""The process's streams: what stops neither the work nor what we are asked to read.

stdout and stderr go on after a disk full of logs, or in a daemon without streams. stdin is nobody's
but ours: a library that asks a question would swallow the lines of a script, and take them for an
answer.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import TextIO

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class PatientStream(io.TextIOWrapper):
    """A stream that goes on to nowhere after its first error, and remembers the error.

    A broken pipe of stdout is not such an error: nobody wants the rest of ``npt-fast ... | head``.
    """

    error: OSError | None = None

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._give_up(error)
            super().flush()

    def _give_up(self, error: OSError) -> None:
        # what the buffers still hold goes to nowhere too, else Python stumbles over it at its exit
        silence(self.fileno())
        if isinstance(error, BrokenPipeError) and self is sys.stdout:
            raise error
        self.error = self.error or error


def silence(descriptor: int) -> None:
    """Let a descriptor lead to nowhere."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != descriptor:
        os.dup2(nowhere, descriptor)
        os.close(nowhere)


_kept: TextIO | None = None


def stdin() -> TextIO:
    """What the process was started with, or what somebody has put in its place since.

    `sys.stdin` and descriptor 0 are at their end once `install` was called: for libraries, for
    `input` and for child processes.
    """
    return _kept if _kept is not None and sys.stdin is sys.__stdin__ else sys.stdin


def _keep_stdin() -> None:
    global _kept
    if _kept is None:
        # not inherited: a descriptor that `os.dup` makes is closed in child processes
        _kept = open(os.dup(0), encoding="utf-8", errors="replace")
        silence(0)


def install() -> None:
    """Replace the process's own streams; those that somebody has replaced already stay."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # closed, so that the next file opened would get what is printed
            silence(descriptor)
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")
    elif sys.stdin is sys.__stdin__:
        _keep_stdin()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w", encoding="utf-8")
        elif stream is getattr(sys, f"__{name}__"):
            stream.flush()
            stream = PatientStream(
                stream.buffer,
                encoding=stream.encoding,
                errors="replace",  # the check mark, on a terminal without UTF-8
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
        setattr(sys, name, stream)


def failure(stream: TextIO) -> OSError | None:
    """Why not all that was printed has arrived; None if it has."""
    stream.flush()
    return getattr(stream, "error", None)
