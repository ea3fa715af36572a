"""The process's streams, made safe: output errors do not stop the work, and only we read stdin.

stdout and stderr keep working when the disk that holds them is full, and in a daemon that has none.
A library that asks a question on stdin would take the lines of a script for its answer.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import TextIO

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class PatientStream(io.TextIOWrapper):
    """A stream that discards output after its first error, and remembers the error.

    A broken pipe of stdout still raises: nobody wants the rest of ``npt-fast ... | head``.
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
        # also discards what the buffers hold; Python would fail to flush it at exit
        silence(self.fileno())
        if isinstance(error, BrokenPipeError) and self is sys.stdout:
            raise error
        self.error = self.error or error


def silence(descriptor: int) -> None:
    """Point a descriptor at ``/dev/null``."""
    # dup2, not close: a free number would be given to the next file that is opened
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != descriptor:
        os.dup2(nowhere, descriptor)
        os.close(nowhere)


_kept: TextIO | None = None


def stdin() -> TextIO:
    """The stdin that the process was started with, or what has replaced `sys.stdin` since.

    After `install`, `sys.stdin` and descriptor 0 are empty for libraries, `input` and child
    processes.
    """
    return _kept if _kept is not None and sys.stdin is sys.__stdin__ else sys.stdin


def _keep_stdin() -> None:
    global _kept
    if _kept is None:
        # child processes do not inherit a descriptor that `os.dup` makes
        _kept = open(os.dup(0), encoding="utf-8", errors="replace")
        silence(0)


def install() -> None:
    """Replace the process's own streams; streams that were already replaced stay."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next opened file would take its number and get our output
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


@contextmanager
def quiet() -> Iterator[None]:
    """Discard what is printed on stderr, also by child processes, and show no progress."""
    kept = os.dup(2)
    silence(2)
    try:
        with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stderr(nowhere):
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def failure(stream: TextIO) -> OSError | None:
    """The error that kept some output from arriving; None if all of it arrived."""
    stream.flush()
    return getattr(stream, "error", None)
