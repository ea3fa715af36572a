"""Copy byte ranges between files, if possible without reading them into this process.

Four ways are tried in this order. A way that fails for a source's file system is not tried again
for that file system:

1. ``reflink``: the file system shares the blocks (XFS, btrfs and others). It shares whole 4096-byte
   pages, and only if source and destination offsets are equal modulo 4096; the ends that do not
   fill a page are copied by the next way.
2. ``copy_file_range``: the kernel copies, or the file server on network file systems.
3. ``sendfile``: the kernel copies between different file systems.
4. ``mapped``: this process maps windows of the source and writes them.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections import Counter
from collections.abc import Callable

from npt_fast.checkpoint import linux
from npt_fast.checkpoint.source_file import SourceFile
from npt_fast.errors import CheckpointError

PAGE = 4096
WAYS = ("reflink", "copy_file_range", "sendfile", "mapped")
# _IOW(0x94, 13, struct file_clone_range) of linux/fs.h, which Python's fcntl does not have
_FICLONERANGE = 0x4020940D
_CHUNK = 8 << 20  # bytes after which the disk is told to write what was copied
# errors that refuse a way for this pair of files; others, as for a full disk, are raised
_NOT_HERE = {
    errno.EXDEV,
    errno.EINVAL,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.ENOTTY,
    errno.ENOTSOCK,
    errno.EPERM,
    errno.EBADF,
    errno.ETXTBSY,
}


class ByteMover:
    """Copies byte ranges and counts the bytes by the way in which they were copied.

    Args:
        progress: function that is called with the number of bytes of each copy.
        reserve: whether to allocate each destination beforehand. That is faster, but useless if
            blocks will be shared.

    Attributes:
        moved: number of bytes, by way.
    """

    def __init__(self, progress: Callable[[int], None], *, reserve: bool = False) -> None:
        self.moved: Counter[str] = Counter()
        self._progress = progress
        self._refused: set[tuple[int, str]] = set()
        self._reserve = reserve
        self._started = 0

    def start_file(self, fd: int, size: int) -> None:
        """Prepare a new destination of `size` bytes; its ranges must follow in ascending order."""
        os.ftruncate(fd, size)
        if self._reserve and size:
            linux.reserve(fd, 0, size)
        self._started = 0

    def move(
        self, source: SourceFile, source_fd: int, offset: int, length: int, fd: int, to: int
    ) -> None:
        """Copy a range of a source to a destination.

        Args:
            source: file to copy from.
            source_fd: descriptor of the source.
            offset: first byte of the range in the source.
            length: number of bytes.
            fd: descriptor of the destination.
            to: first byte of the range in the destination.

        Raises:
            CheckpointError: the source is shorter than expected.
            OSError: the destination cannot be written.
        """
        # the kernel clones whole pages only; the ends within a page are copied
        head = -to % PAGE
        body = (length - head) // PAGE * PAGE
        if offset % PAGE == to % PAGE and body > 0:
            if self._reflink(source, source_fd, offset + head, body, fd, to + head):
                # after the clone: if that is refused, everything is copied at once
                self._copy(source, source_fd, offset, head, fd, to)
                done = head + body
                self._copy(source, source_fd, offset + done, length - done, fd, to + done)
                return
        self._copy(source, source_fd, offset, length, fd, to)

    def _reflink(
        self, source: SourceFile, source_fd: int, offset: int, length: int, fd: int, to: int
    ) -> bool:
        if (source.identity.device, "reflink") in self._refused:
            return False
        try:
            request = struct.pack("qQQQ", source_fd, offset, length, to)
            fcntl.ioctl(fd, _FICLONERANGE, request)
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
            self._refused.add((source.identity.device, "reflink"))
            return False
        self._count("reflink", length)
        return True

    def _copy(
        self, source: SourceFile, source_fd: int, offset: int, length: int, fd: int, to: int
    ) -> None:
        # kept from one way to the next: bytes copied before a way failed are not copied again
        done = 0
        for way, step in (("copy_file_range", _copy_file_range), ("sendfile", _sendfile)):
            if (source.identity.device, way) in self._refused:
                continue
            try:
                while done < length:
                    chunk = min(_CHUNK, length - done)
                    count = step(source_fd, offset + done, chunk, fd, to + done)
                    if not count:
                        raise CheckpointError(f"{source.path}: ended early; it was truncated")
                    self._count(way, count)
                    done += count
                    if to + done - self._started >= _CHUNK:
                        linux.start_writeback(fd, self._started, to + done - self._started)
                        self._started = to + done
                return
            # AttributeError: os.copy_file_range exists on Linux only
            except (OSError, AttributeError) as error:
                if isinstance(error, OSError) and error.errno not in _NOT_HERE:
                    raise
                self._refused.add((source.identity.device, way))
        for window in source.windows(offset + done, length - done):
            write_all(fd, window, to + done)
            done += len(window)
            self._count("mapped", len(window))

    def _count(self, way: str, count: int) -> None:
        self.moved[way] += count
        self._progress(count)


def _copy_file_range(source_fd: int, offset: int, length: int, fd: int, to: int) -> int:
    return os.copy_file_range(source_fd, fd, length, offset, to)


def _sendfile(source_fd: int, offset: int, length: int, fd: int, to: int) -> int:
    # sendfile takes an offset for its source only, and writes at the destination's file position
    os.lseek(fd, to, os.SEEK_SET)
    return os.sendfile(fd, source_fd, offset, length)


def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at `offset`; one call of pwrite may write less."""
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, offset)
        view = view[count:]
        offset += count


def cloneable_bytes(offset: int, to: int, length: int) -> int:
    """How many of `length` bytes a reflink from `offset` to `to` can share."""
    if offset % PAGE != to % PAGE:
        return 0
    # the whole pages from the first page boundary at or after `to` to the last before the end
    return max(0, (length + to) // PAGE * PAGE - -(-to // PAGE) * PAGE)
