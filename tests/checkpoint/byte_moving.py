"""Moves of ranges, with system calls that are refused, short, or real."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from npt_fast.checkpoint.byte_mover import PAGE, WAYS, ByteMover
from npt_fast.checkpoint.source_file import SourceFile

CONTENT = random.Random(1).randbytes(20 * PAGE + 77)


def refusing(number: int) -> Callable[..., int]:
    def refuse(*args: object) -> int:
        raise OSError(number, os.strerror(number))

    return refuse


@dataclass
class Fake:
    """A replacement of a system call, which uses pread and pwrite and records its calls."""

    most: int = 1 << 40
    calls: list[int] = field(default_factory=list)

    def copy_file_range(self, source: int, fd: int, count: int, offset: int, to: int) -> int:
        self.calls.append(count)
        return os.pwrite(fd, os.pread(source, min(count, self.most), offset), to)

    def sendfile(self, fd: int, source: int, offset: int, count: int) -> int:
        self.calls.append(count)
        return os.write(fd, os.pread(source, min(count, self.most), offset))

    def ioctl(self, fd: int, request: int, argument: bytes) -> int:
        """FICLONERANGE, which accepts whole pages only, like the kernel."""
        source, offset, length, to = struct.unpack("qQQQ", argument)
        assert request == 0x4020940D
        if offset % PAGE or to % PAGE or length % PAGE or not length:
            raise OSError(errno.EINVAL, "not aligned")
        self.calls.append(length)
        if os.pwrite(fd, os.pread(source, length, offset), to) != length:
            raise OSError(errno.EINVAL, "beyond the end")
        return 0


@dataclass
class Ladder:
    """Replaces system calls as a test needs them: refused, short, or real."""

    monkeypatch: pytest.MonkeyPatch

    def refuse(self, way: str, number: int = errno.EOPNOTSUPP) -> None:
        self.set(way, refusing(number))

    def set(self, way: str, call: Callable[..., int]) -> None:
        owner = fcntl if way == "reflink" else os
        self.monkeypatch.setattr(owner, {"reflink": "ioctl"}.get(way, way), call)

    def only(self, way: str, number: int = errno.EOPNOTSUPP) -> Fake:
        """Refuse the ways before `way`, and replace `way`, which this disk may not support."""
        for above in WAYS[: WAYS.index(way)]:
            self.refuse(above, number)
        fake = Fake()
        if way != "mapped":
            self.set(way, getattr(fake, "ioctl" if way == "reflink" else way))
        return fake


@dataclass
class Moved:
    """The destination of a move, and what the mover reported."""

    path: Path
    mover: ByteMover
    progress: list[int]


def move(source: SourceFile, ranges: list[tuple[int, int, int]], folder: Path, size: int) -> Moved:
    """Move ranges (offset, length, to) into a new file of `size` bytes."""
    progress: list[int] = []
    mover = ByteMover(progress.append)
    path = folder / "destination"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        mover.start_file(fd, size)
        with source.open() as source_fd:
            for offset, length, to in ranges:
                mover.move(source, source_fd, offset, length, fd, to)
    finally:
        os.close(fd)
    return Moved(path, mover, progress)


def expected(ranges: list[tuple[int, int, int]], size: int) -> bytes:
    content = bytearray(size)
    for offset, length, to in ranges:
        content[to : to + length] = CONTENT[offset : offset + length]
    return bytes(content)
