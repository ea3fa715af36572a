"""Files that are read, and that must not change meanwhile.

Other programs may truncate, replace or rewrite a checkpoint at any moment, and access to a mapping
of a file that has shrunk kills the process. So every access opens the file anew, checks that it is
the file that was first seen (same device, inode, size and modification time), and maps at most one
window of it at a time.
"""

from __future__ import annotations

import mmap
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from npt_fast.errors import CheckpointError
from npt_fast.paths import path_errors

WINDOW = 1 << 20
"""Bytes that are mapped at once: enough for full reading speed, and little memory."""

_NEARBY = 1 << 16  # bytes per read of `NearbyReader`
_POPULATE = getattr(mmap, "MAP_POPULATE", 0)  # Linux: one call instead of 256 page faults
_HUB_BLOB = re.compile(r"(\.\./)+blobs/[0-9a-f]{40,64}")
_NETWORK_FILESYSTEMS = ("nfs", "cifs", "smb", "fuse", "9p", "lustre", "ceph", "gpfs", "beegfs")


_partial: dict[Path, Callable[[int, int], None]] = {}


@contextmanager
def partial_file(path: Path, complete: Callable[[int, int], None]) -> Iterator[None]:
    """Within the block, the file at `path` is completed where it is read.

    Args:
        path: path of a file that has its size already.
        complete: called with offset and length before these bytes are read. It writes them, and
            leaves the file's modification time as it is.
    """
    _partial[path] = complete
    try:
        yield
    finally:
        del _partial[path]


@dataclass(frozen=True, slots=True)
class _Identity:
    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> _Identity:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A regular file, with its identity when it was first opened; messages name its `path`."""

    path: Path
    identity: _Identity

    @classmethod
    def of(cls, path: Path, *, follow_links: bool = False) -> SourceFile:
        """Record the identity of the file at `path`.

        Links inside a checkpoint are not followed, since those of an untrusted checkpoint could
        lead anywhere. The exception are links to blobs, of which the Hugging Face cache is made.

        Args:
            path: path of the file.
            follow_links: whether `path` may be a link; for paths that the user gave.

        Raises:
            CheckpointError: the path is no regular file, is a link, or cannot be read.
        """
        with path_errors(path, CheckpointError):
            foreign_link = not follow_links and path.is_symlink() and not is_hub_blob(path)
        if foreign_link:
            raise CheckpointError(
                f"{path}: is a symbolic link; links inside a checkpoint are not followed, "
                "copy the file or name its target"
            )
        fd = _open(path)
        try:
            status = os.fstat(fd)
        finally:
            os.close(fd)
        if stat.S_ISDIR(status.st_mode):
            raise CheckpointError(f"{path}: is a directory; a file of this name is expected")
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path}: not a regular file")
        return cls(path, _Identity.of(status))

    @property
    def size(self) -> int:
        return self.identity.size

    @contextmanager
    def open(self) -> Iterator[int]:
        """A read-only file descriptor; the file's identity is checked at the beginning and the end.

        Raises:
            CheckpointError: the file was changed, truncated or replaced.
        """
        fd = _open(self.path)
        try:
            self.check(fd)
            yield fd
            self.check(fd)
        finally:
            os.close(fd)

    def check(self, fd: int) -> None:
        """Raise CheckpointError unless `fd` and the path still lead to the file first seen."""
        with path_errors(self.path, CheckpointError):
            try:
                # the path as well as the descriptor: a file that was renamed over it leaves ours
                # unchanged
                now = os.stat(self.path)
                same = _Identity.of(os.fstat(fd)) == self.identity == _Identity.of(now)
            except FileNotFoundError:
                same = False
        if not same:
            raise CheckpointError(
                f"{self.path}: changed while it was being read; wait until nothing writes it"
            )

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset` on; a shorter file raises CheckpointError."""
        with self.open() as fd:
            return self.read_at(fd, offset, length)

    def read_at(self, fd: int, offset: int, length: int) -> bytes:
        """Like `read`, through a descriptor from `open`: saves opening the file for every read."""
        self._complete(offset, length)
        with path_errors(self.path, CheckpointError):
            data = os.pread(fd, length, offset)
            while len(data) < length:  # short reads happen on network file systems
                more = os.pread(fd, length - len(data), offset + len(data))
                if not more:
                    raise CheckpointError(
                        f"{self.path}: ends at byte {offset + len(data)}, "
                        f"{offset + length} needed; the file is truncated"
                    )
                data += more
            return data

    def windows(self, offset: int, length: int, size: int = WINDOW) -> Iterator[memoryview | bytes]:
        """The bytes from `offset` on, in pieces of at most `size`; each is valid until the next.

        Local files are mapped, one window at a time. Files on network file systems, where mapping
        is slow and unsafe, are read.
        """
        mapped = not on_network_filesystem(self.path)
        with self.open() as fd:
            end = offset + length
            while offset < end:
                self.check(fd)  # a mapped file that has shrunk would kill us with SIGBUS
                step = min(size, end - offset)
                self._complete(offset, step)
                if mapped:
                    # mmap takes page-aligned offsets only
                    lead = offset % mmap.ALLOCATIONGRANULARITY
                    window = mmap.mmap(
                        fd, lead + step, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED | _POPULATE,
                        offset=offset - lead,
                    )  # fmt: skip
                    yield memoryview(window)[lead:]
                    del window  # unmapped once the consumer lets go of the view
                else:
                    yield self.read_at(fd, offset, step)
                offset += step

    def _complete(self, offset: int, length: int) -> None:
        if complete := _partial.get(self.path):
            with path_errors(self.path, CheckpointError):
                complete(offset, length)


def read_file(path: Path, limit: int, *, follow_links: bool = False) -> bytes:
    """The content of a small file.

    Args:
        path: path of the file.
        limit: maximum size in bytes.
        follow_links: whether `path` may be a link; for paths that the user gave.

    Raises:
        CheckpointError: the path is no regular file (but a pipe, a device or a folder), is a link,
            or cannot be read; or the file is larger than `limit`.
    """
    file = SourceFile.of(path, follow_links=follow_links)
    if file.size > limit:
        raise CheckpointError(f"{path}: {file.size:,} bytes; more than {limit:,} are refused")
    return file.read(0, file.size)


class NearbyReader:
    """Reads files in blocks of 64 KiB and keeps the last block; for use by one thread.

    A layer with num_ranks 128 has 1,152 tensors, each with three tensors of optimizer state. They
    may be small, and opening the file for each of them would take most of the time.
    """

    def __init__(self) -> None:
        self._file: SourceFile | None = None
        self._start = 0
        self._data = memoryview(b"")

    def windows(self, file: SourceFile, offset: int, length: int) -> Iterator[memoryview | bytes]:
        """Like `SourceFile.windows`."""
        if length > _NEARBY // 4:  # a block would hold few of these: read it alone
            yield from file.windows(offset, length)
            return
        known = file is self._file and offset >= self._start
        if not known or offset + length > self._start + len(self._data):
            data = file.read(offset, max(length, min(_NEARBY, file.size - offset)))
            self._file, self._start, self._data = file, offset, memoryview(data)
        yield self._data[offset - self._start :][:length]


def is_hub_blob(link: Path) -> bool:
    """Whether a link leads to a blob of the Hub's cache.

    Raises:
        OSError: `link` is no link, or cannot be read.
    """
    target = os.readlink(link)
    return bool(_HUB_BLOB.fullmatch(target)) and not (link.parent / target).is_symlink()


def _open(path: Path) -> int:
    # O_NONBLOCK: opening a named pipe must not hang
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened: {error.strerror}") from None


def on_network_filesystem(path: Path) -> bool:
    """Whether `path` lies on a network or FUSE mount; always False on systems other than Linux."""
    return filesystem_type(path).startswith(_NETWORK_FILESYSTEMS)


def filesystem_type(path: Path) -> str:
    """Type of the file system that holds `path`, such as "xfs"; "" if unknown."""
    real = os.path.realpath(path)
    device = os.stat(real).st_dev if os.path.exists(real) else -1
    best, kind = "", ""
    for point, point_kind in _mounts(device):
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        # the longest mount point is the innermost; of equal ones, the later covers the earlier
        if inside and len(point) >= len(best):
            best, kind = point, point_kind
    return kind


@cache
def _mounts(device: int) -> list[tuple[str, str]]:
    """All mount points and their types.

    The list is cached by device: a device that was not seen before may be a new mount, for which
    the list is read again.
    """
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
    except OSError:
        return []
    mounts = []
    for line in lines:
        fields, _, tail = line.partition(" - ")
        # the kernel writes a space in a path as \040
        point = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), fields.split()[4])
        mounts.append((point, tail.split()[0]))
    return mounts
