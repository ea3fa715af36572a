"""Watch a reader: whether it runs code, takes too long, or fills memory."""

from __future__ import annotations

import signal
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

MAX_SECONDS = 20
"""Of CPU time, for one input, as in tests/test_doors.py."""
MAX_MEMORY = 256 << 20
"""Bytes of resident memory above those at the start."""

_INSTALLED = ("<frozen ", str(Path(__file__).parents[2]), *sysconfig.get_paths().values())
_COMPILERS = ("/collections/__init__.py", "/dataclasses.py", "/typing.py")  # of source code
_FORBIDDEN = (
    "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.startfile", "os.system",
    "pickle.find_class", "pty.spawn", "socket.connect", "subprocess.Popen", "urllib.Request",
)  # fmt: skip


class _TooLongError(BaseException):
    """This is not an `Exception`, so that no reader can take it for a broken file."""


_watching = False
_seen: list[str] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching:
        return
    if event in _FORBIDDEN:
        _seen.append(f"{event}{arguments!r:.200}")
    elif event == "exec":
        file = arguments[0].co_filename
        # a module is imported when it is first needed
        expected = file.startswith(_INSTALLED) or (
            file == "<string>" and sys._getframe(1).f_code.co_filename.endswith(_COMPILERS)
        )
        if not expected:
            _seen.append(f"exec of {file!r:.200}")


sys.addaudithook(_audit)


@contextmanager
def watched() -> Iterator[None]:
    """Context that fails if its block runs code from a file, or takes too much time or memory.

    Raises:
        AssertionError: the block did so.
    """
    global _watching
    _seen.clear()
    begun, resident = time.process_time(), _highest()
    before = signal.signal(signal.SIGPROF, _stop)
    signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
    _watching = True
    try:
        yield
    except _TooLongError as error:
        raise AssertionError(f"takes more than {MAX_SECONDS} s") from error
    finally:
        _watching = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        assert not _seen, f"runs code: {_seen[0]}"
        taken = time.process_time() - begun
        assert taken < MAX_SECONDS, f"takes {taken:.1f} s"
        grown = _highest(reset=False) - resident
        assert grown < MAX_MEMORY, f"takes {grown >> 20} MB of memory"


def _stop(number: int, frame: FrameType | None) -> None:
    raise _TooLongError


def _highest(*, reset: bool = True) -> int:
    """Peak of resident memory in bytes since the last reset."""
    if reset:
        with suppress(OSError):  # a sandbox without it: from the highest so far
            Path("/proc/self/clear_refs").write_text("5")
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10
