"""Which process a temporary directory belongs to, and whether that process still runs.

Where locks work, they tell this. Some network file systems refuse locks, or grant them to several
processes at once, so the name of the directory identifies its owner as well.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

_OWNER = re.compile(r"(?P<place>[0-9a-f]{8})(?P<pid>[0-9a-f]{6})(?P<start>[0-9a-f]{10})")


def own_mark() -> str:
    """24 hexadecimal digits that identify this process until the machine restarts."""
    pid = os.getpid()
    # Linux has process numbers up to 2^22; 40 bits of 100 ticks a second are 348 years
    return f"{_place()}{pid & 0xFFFFFF:06x}{(_start(pid) or 0) & 0xFFFFFFFFFF:010x}"


def is_gone(mark: str) -> bool:
    """Whether the process with a mark has certainly ended; False if that cannot be known."""
    match = _OWNER.fullmatch(mark)
    if match is None or match["place"] != _place() or not Path("/proc/self/stat").exists():
        return False
    pid = int(match["pid"], 16)
    start = _start(pid)
    if start is None:
        return not _runs(pid)
    # with another start time, the number belongs to another process now
    return start & 0xFFFFFFFFFF != int(match["start"], 16)


def _place() -> str:
    """8 hexadecimal digits that identify this machine since its start and its PID namespace."""
    # two machines, two boots or two containers that share a folder count process numbers anew
    facts = [os.uname().nodename]
    for path in ("/proc/sys/kernel/random/boot_id", "/etc/machine-id"):
        try:
            facts.append(Path(path).read_text())
        except OSError:
            facts.append("")
    try:
        facts.append(os.readlink("/proc/self/ns/pid"))
    except OSError:
        facts.append("")
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:8]


def _runs(pid: int) -> bool:
    """Whether the process exists; this finds other users' processes, which ``/proc`` may hide."""
    try:
        # signal 0 is delivered to nobody: the call only says whether the process exists
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _start(pid: int) -> int | None:
    """Start time of a process in clock ticks since the machine started; None if it is not visible.

    0 for a process that has ended and whose parent has not read its exit code yet.
    """
    try:
        status = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    # from the last parenthesis on: the program's name before it may hold spaces and parentheses
    state, *fields = status.rpartition(b")")[2].split()
    return 0 if state in (b"Z", b"X") else int(fields[18])
