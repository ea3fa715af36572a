"""Make a directory appear complete or not at all.

The directory is built under a hidden name beside its target and takes the target's name in one
rename; whatever happens before that, the target is untouched. A lock on the hidden directory tells
one that a killed process left behind, which the next run removes, from one that is being written.
Where locks do not work, the directory's name tells its owner, and it is removed only when that
process has certainly ended.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from npt_fast.checkpoint import linux
from npt_fast.checkpoint.owner import is_gone, own_mark
from npt_fast.checkpoint.source_file import filesystem_type
from npt_fast.errors import MergeError, NPTError, StorageError

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_LOCKS = {
    *(errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EINVAL),
    errno.EBADF,  # of file systems that lock only what is open for writing, as no directory is
}
# one machine alone writes to these, so that a lock reaches everybody
_LOCAL_FILESYSTEMS = {
    "bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs", "zfs",
}  # fmt: skip
_ASIDE = "-old"
_TOKEN = re.compile(r"(?P<owner>[0-9a-f]{24})?[0-9a-f]{6,12}")


class StagedDirectory:
    """Context manager: fill `path`, then call `publish`; left without that, nothing remains.

    Args:
        target: where the directory shall appear; a link is followed.
        replace: whether an existing target is replaced, whole.

    Attributes:
        left: hidden directories that were not removed: others may be writing the first ones, and
            what the target was may belong to somebody else.
    """

    def __init__(self, target: Path, *, replace: bool) -> None:
        self.target = Path(os.path.realpath(target))
        self.replace = replace
        self.path = Path()
        self.left: list[Path] = []
        self._lock = -1
        self._new_parents: list[Path] = []

    def __enter__(self) -> StagedDirectory:
        parent = self.target.parent
        try:
            missing = [folder for folder in (parent, *parent.parents) if not folder.exists()]
            for folder in reversed(missing):
                with contextlib.suppress(FileExistsError):
                    folder.mkdir()
                    self._new_parents.append(folder)
            while self._lock < 0:
                self.path = parent / (self._prefix + own_mark() + os.urandom(3).hex())
                self.path.mkdir()
                # another run may take it for abandoned before it is locked, and remove it
                with contextlib.suppress(FileNotFoundError, BlockingIOError):
                    self._lock = _lock(self.path)
            self._remove_abandoned()
        except BaseException:
            self._clean_up()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._clean_up()

    def _clean_up(self) -> None:
        signals = {signal.SIGINT, signal.SIGTERM}  # a second Ctrl-C must not stop this
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        try:
            if self.path.name.startswith(self._prefix):
                shutil.rmtree(self.path, ignore_errors=True)
            if self._lock >= 0:
                os.close(self._lock)
            for folder in reversed(self._new_parents):
                with contextlib.suppress(OSError):  # not empty: the target is in it
                    folder.rmdir()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def publish(self) -> None:
        """Give the directory its target's name; files must be synced already.

        Raises:
            MergeError: the target has appeared meanwhile and must not be replaced.
        """
        _sync(self._lock)
        if self.replace and self.target.exists():
            _exchange(self.path, self.target)
            _sync_directory(self.target.parent)
            self._remove(self.path)
            return
        try:
            _rename_new(self.path, self.target)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            raise MergeError(
                f"{self.target}: appeared while merging; nothing was replaced"
            ) from None
        _sync_directory(self.target.parent)

    @property
    def _prefix(self) -> str:
        # names are limited in bytes, not characters
        return f".{os.fsdecode(os.fsencode(self.target.name)[:200])}.npt-fast-"

    def _remove_abandoned(self) -> None:
        locks_work = _locks_work(self.path)
        for left in sorted(self.target.parent.iterdir(), reverse=True):  # `_ASIDE` comes first
            token = left.name.removeprefix(self._prefix)
            match = _TOKEN.fullmatch(token.removesuffix(_ASIDE))
            if token == left.name or match is None or left == self.path:
                continue
            aside = token.endswith(_ASIDE)
            try:
                fd = _lock(self._locked_with(left) if aside else left)
            except OSError:
                continue  # in use, or gone
            if not (locks_work or is_gone(match["owner"] or "")):
                self.left.append(left)
            elif aside and not self.target.exists():
                os.rename(left, self.target)  # killed in the middle of `_exchange`
            else:
                self._remove(left)
            os.close(fd)

    def _locked_with(self, aside: Path) -> Path:
        """What the process that put `aside` there has locked: the new directory, by either name."""
        new = aside.with_name(aside.name.removesuffix(_ASIDE))
        return next((path for path in (new, self.target) if path.exists()), aside)

    def _remove(self, left: Path) -> None:
        shutil.rmtree(left, ignore_errors=True)
        if left.exists():  # another user's
            self.left.append(left)


@contextmanager
def disk_errors(target: Path, kind: type[NPTError]) -> Iterator[None]:
    """Turn what the operating system refuses while `target` is written into one line.

    Raises:
        StorageError: no space.
        NPTError: of `kind`: anything else.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise StorageError(f"{target}: {error.strerror}; nothing was written") from None
        where = error.filename or target
        raise kind(f"{where}: {error.strerror or error}; nothing was written") from None


def lock(fd: int) -> None:
    """Lock what a descriptor has opened, for this process, where there are locks.

    Raises:
        OSError: it is locked by another process.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def _lock(directory: Path) -> int:
    """Open a directory and `lock` it.

    Raises:
        OSError: it is locked by another process, or gone.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        lock(fd)
        if not os.path.samestat(os.fstat(fd), os.stat(directory)):
            raise FileNotFoundError(directory)
    except OSError:
        os.close(fd)
        raise
    return fd


def _locks_work(locked: Path) -> bool:
    """Whether a lock keeps others out, seen by trying to lock what is locked already."""
    if filesystem_type(locked) not in _LOCAL_FILESYSTEMS:
        return False  # it may keep out the processes of this machine only
    try:
        os.close(_lock(locked))
    except OSError:
        return True
    return False


def _rename_new(old: Path, new: Path) -> None:
    try:
        linux.rename(old, new, linux.RENAME_NOREPLACE)
    except OSError as error:
        if error.errno not in linux.UNSUPPORTED:
            raise
        if new.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(new)) from None
        os.rename(old, new)


def _exchange(new: Path, old: Path) -> None:
    """Swap two directories: at once where the kernel can, else by way of a third name."""
    try:
        linux.rename(new, old, linux.RENAME_EXCHANGE)
    except OSError as error:
        if error.errno not in linux.UNSUPPORTED:
            raise
        aside = new.with_name(new.name + _ASIDE)
        os.rename(old, aside)
        try:
            os.rename(new, old)
        except OSError:
            os.rename(aside, old)
            raise
        os.rename(aside, new)


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _sync(fd)
    finally:
        os.close(fd)


def _sync(directory: int) -> None:
    """`os.fsync`, where the file system has it for directories."""
    try:
        os.fsync(directory)
    except OSError as error:
        if error.errno not in linux.UNSUPPORTED:
            raise
