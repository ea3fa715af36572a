"""Publish a directory: it appears complete or not at all.

The directory is built under a hidden name beside its target and takes the target's name by one
rename; until then the target is untouched. The hidden directory is locked while it is written. One
without a lock was left behind by a killed process and is removed by the next run. Where locks do
not work, the name of the directory identifies its owner, and the directory is removed only if that
process has certainly ended.

Other users may be able to write to the target's folder. So this folder and the hidden directory are
opened once, and all work is done through their descriptors: links that others create are not
followed, and directories of other users are left alone. If others can also rename our files (they
can write to the folder, and it has no sticky bit or belongs to them), they can still remove or
replace the hidden directory, which stops the run, and the target. They can also rename a directory
of ours so that the next run takes it for an abandoned one and removes it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import signal
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from npt_fast.checkpoint import linux
from npt_fast.checkpoint.owner import is_gone, own_mark
from npt_fast.checkpoint.source_file import filesystem_type
from npt_fast.errors import MergeError, NPTError, StorageError

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_LOCKS = {
    *(errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EINVAL),
    errno.EBADF,  # some file systems lock only files open for writing, and a directory never is
}
# only one machine writes to these, so a lock keeps out every other process
_LOCAL_FILESYSTEMS = {
    "bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs", "zfs",
}  # fmt: skip
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# O_EXCL: opening fails if another process has already put a file or link there
_NEW_FILE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_ASIDE = "-old"
# names without an owner are those of earlier versions, which relied on locks
_TOKEN = re.compile(r"(?P<owner>[0-9a-f]{24})?[0-9a-f]{6,32}")


class StagedDirectory:
    """Context manager for a hidden directory: write its files, then call `publish`.

    If the block ends without a call of `publish`, the directory is removed.

    Args:
        target: path that the directory gets when it is published; a link is followed.
        replace: whether to replace an existing target as a whole.

    Attributes:
        fd: descriptor of the directory.
        path: path of the directory, for reading; write with `open` and `file`.
        left: hidden directories that were not removed: other processes may be writing them, or the
            replaced target belongs to another user.
    """

    def __init__(self, target: Path, *, replace: bool) -> None:
        self.target = Path(os.path.realpath(target))
        self.replace = replace
        self.path = self.target
        self.fd = -1
        self.left: list[Path] = []
        self._parent = -1
        self._as_made: os.stat_result  # owner and mode that a new directory gets here
        self._removable: list[os.stat_result] = []  # removed at the end if they have `path`'s name
        self._undo = ExitStack()

    def __enter__(self) -> StagedDirectory:
        try:
            self._open_parent()
            self._make()
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
        try:
            if isinstance(error, NPTError):  # a failed check may have read a replaced directory
                self._check_place()
        finally:
            self._clean_up()

    def open(self, name: str) -> int:
        """Create a file in the directory; its descriptor reads and writes."""
        with _naming(self.path / name):
            return os.open(name, _NEW_FILE, 0o666, dir_fd=self.fd)

    @contextmanager
    def file(self, name: str) -> Iterator[BinaryIO]:
        """Create a file in the directory; it is synced to the disk when the block ends."""
        with open(self.open(name), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    def publish(self) -> None:
        """Rename the directory to its target; its files must be synced already.

        Raises:
            MergeError: the target has appeared meanwhile and must not be replaced.
            OSError: the directory cannot be renamed, or another process has replaced it.
        """
        # until now only its owner could read it; from now on it has the mode that mkdir gives here
        if os.fstat(self.fd).st_mode != self._as_made.st_mode:  # a fixed mode may refuse fchmod
            os.fchmod(self.fd, stat.S_IMODE(self._as_made.st_mode))
        _sync(self.fd)
        self._check_place()
        name = self.path.name
        old = None
        try:
            with _naming(self.target), _uninterrupted():
                if self.replace and _look(self._parent, self.target.name) is not None:
                    _exchange(self._parent, name, self.target.name)
                    old = _look(self._parent, name)  # after the exchange: other runs replace too
                    if old is not None:
                        self._removable.append(old)
                else:
                    _rename_new(self._parent, name, self.target.name)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            raise MergeError(
                f"{self.target}: appeared while merging; nothing was replaced"
            ) from None
        # otherwise a power failure could undo the rename
        _sync(self._parent)
        if old is not None:
            self._remove(name, old)

    def _open_parent(self) -> None:
        """Open the target's folder; create it and its parents if they are missing."""
        above = next(folder for folder in self.target.parents if folder.exists())
        with _naming(self.target.parent):
            self._parent = self._hold(os.open(above, _DIRECTORY))
            for name in self.target.parent.relative_to(above).parts:
                with suppress(FileExistsError):
                    self._make_in_parent(name, 0o777)
                self._parent = self._hold(os.open(name, _DIRECTORY, dir_fd=self._parent))

    def _make(self) -> None:
        """Create the directory, open it and lock it."""
        with _uninterrupted():
            while self.fd < 0:
                # not the module secrets, which imports hmac and random at start-up
                name = self._prefix + own_mark() + os.urandom(16).hex()
                self.path = self.target.parent / name
                with _naming(self.target.parent):
                    # 0700: nobody else puts files into it while it is written
                    self._make_in_parent(name, 0o700)
                # before it is locked, another run may take it for abandoned and remove it
                with _naming(self.path), suppress(FileNotFoundError, BlockingIOError):
                    self.fd = self._hold(_lock(self._parent, name))
            with _naming(self.path):
                # a file server may map our user to another; only mkdir shows this, and the effect
                # of umask and access lists
                os.mkdir("probe", dir_fd=self.fd)
                self._as_made = os.stat("probe", dir_fd=self.fd, follow_symlinks=False)
                os.rmdir("probe", dir_fd=self.fd)
        status = os.fstat(self.fd)
        if status.st_uid != self._as_made.st_uid or os.listdir(self.fd):
            raise self._displaced()
        self._removable.append(status)

    def _make_in_parent(self, name: str, mode: int) -> None:
        os.mkdir(name, mode, dir_fd=self._parent)
        self._undo.callback(_remove_empty, self._parent, name)

    def _hold(self, fd: int) -> int:
        self._undo.callback(os.close, fd)
        return fd

    def _clean_up(self) -> None:
        with _uninterrupted():  # a second Ctrl-C must not stop this
            for status in self._removable:
                _remove(self._parent, self.path.name, status)
            self._undo.close()

    def _check_place(self) -> None:
        """Raise OSError unless the directory's name and path both lead to the open directory."""
        for path, folder in ((self.path.name, self._parent), (str(self.path), None)):
            try:
                found = os.stat(path, dir_fd=folder, follow_symlinks=False)
            except OSError:
                raise self._displaced() from None
            if not os.path.samestat(found, os.fstat(self.fd)):
                raise self._displaced()

    def _displaced(self) -> OSError:
        problem = (
            "somebody has moved or replaced this directory while it was being written; "
            "choose a folder that nobody else can write to"
        )
        return OSError(errno.ESTALE, problem, str(self.path))

    @property
    def _prefix(self) -> str:
        # file systems limit names to 255 bytes; the longest here has 1 + 180 + 10 + 24 + 32 + 4
        return f".{os.fsdecode(os.fsencode(self.target.name)[:180])}.npt-fast-"

    def _remove_abandoned(self) -> None:
        locks_work = _locks_work(self.fd, self.path)
        for name in sorted(os.listdir(self._parent), reverse=True):  # `_ASIDE` comes first
            token = name.removeprefix(self._prefix)
            match = _TOKEN.fullmatch(token.removesuffix(_ASIDE))
            status = _look(self._parent, name)
            if token == name or match is None or status is None or name == self.path.name:
                continue
            left = self.target.parent / name
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != self._as_made.st_uid:
                self.left.append(left)
                continue
            aside = token.endswith(_ASIDE)
            try:
                fd = _lock(self._parent, self._locked_with(name) if aside else name)
            except (BlockingIOError, FileNotFoundError):
                continue  # in use, or gone
            except OSError:
                self.left.append(left)
                continue
            if not (locks_work or is_gone(match["owner"] or "")):
                self.left.append(left)
            elif not aside or _look(self._parent, self.target.name) is not None:
                self._remove(name, status)
            elif self._put_here_by_us(status):
                # the other run was killed within `_exchange`: restore the target
                _rename_new(self._parent, name, self.target.name)
            else:
                self.left.append(left)
            os.close(fd)

    def _locked_with(self, aside: str) -> str:
        """Name of the directory that the process locked which renamed the old target to `aside`.

        It locked the new directory, which has its hidden name or already the target's.
        """
        names = (aside.removesuffix(_ASIDE), self.target.name)
        return next((name for name in names if _look(self._parent, name) is not None), aside)

    def _put_here_by_us(self, directory: os.stat_result) -> bool:
        """Whether only we can have given our directory its name in the target's folder.

        In a folder with the sticky bit others cannot rename our directory. They could still move
        it there from a folder without sticky bit, but only if they can write to the directory too.
        """
        parent = os.fstat(self._parent)
        others = stat.S_IWGRP | stat.S_IWOTH
        sticky = parent.st_mode & stat.S_ISVTX and not directory.st_mode & others
        private = not parent.st_mode & others
        return parent.st_uid in (0, self._as_made.st_uid) and bool(private or sticky)

    def _remove(self, name: str, status: os.stat_result) -> None:
        _remove(self._parent, name, status)
        now = _look(self._parent, name)
        if now is not None and os.path.samestat(now, status):  # it belongs to another user
            self.left.append(self.target.parent / name)


@contextmanager
def disk_errors(target: Path, kind: type[NPTError]) -> Iterator[None]:
    """Turn an OSError that occurs while `target` is written into an error of one line.

    Args:
        target: path that is written, for messages.
        kind: class of the error.

    Raises:
        StorageError: the disk is full.
        NPTError: anything else failed; its class is `kind`.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise StorageError(f"{target}: {error.strerror}; nothing was written") from None
        where = error.filename or target
        raise kind(f"{where}: {error.strerror or error}; nothing was written") from None


def lock(fd: int) -> None:
    """Lock an open file or directory for this process, if its file system has locks.

    Raises:
        OSError: another process has locked it.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def _lock(folder: int, name: str) -> int:
    """Open a directory in an open folder, `lock` it, and return its descriptor.

    Raises:
        OSError: another process has locked it, it is gone, or it is no directory.
    """
    fd = os.open(name, _DIRECTORY, dir_fd=folder)
    try:
        lock(fd)
        # between opening and locking it may have been removed, or another have got its name
        now = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if not os.path.samestat(os.fstat(fd), now):
            raise FileNotFoundError(name)
    except OSError:
        os.close(fd)
        raise
    return fd


def _locks_work(locked: int, path: Path) -> bool:
    """Whether locks keep other processes out; tested by locking a locked directory again."""
    if filesystem_type(path) not in _LOCAL_FILESYSTEMS:
        return False  # a lock may keep out processes of this machine only
    try:
        # a lock belongs to the opened file, so that a second opening by this process is kept out
        # too
        os.close(_lock(locked, "."))
    except OSError:
        return True
    return False


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Make an OSError name the whole path; calls through a descriptor know its last part only."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


@contextmanager
def _uninterrupted() -> Iterator[None]:
    # blocked, not ignored: a signal that comes meanwhile is answered afterwards
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _look(folder: int, name: str) -> os.stat_result | None:
    """Status of the entry `name` of a folder, without following links; None if there is none."""
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _remove(folder: int, name: str, status: os.stat_result) -> None:
    """Remove the directory `name`, as far as possible, if `status` is its status."""
    with suppress(OSError):
        fd = os.open(name, _DIRECTORY, dir_fd=folder)
        try:
            if os.path.samestat(os.fstat(fd), status):
                # through the descriptor, so that another directory under this name is not emptied;
                # this leaves "." itself
                shutil.rmtree(".", ignore_errors=True, dir_fd=fd)
                _remove_empty(folder, name)
        finally:
            os.close(fd)


def _remove_empty(folder: int, name: str) -> None:
    with suppress(OSError):  # a directory that is not empty is in use
        os.rmdir(name, dir_fd=folder)


def _rename_new(folder: int, old: str, new: str) -> None:
    try:
        linux.rename(folder, old, new, linux.RENAME_NOREPLACE)
    except OSError as error:
        if error.errno not in linux.UNSUPPORTED:
            raise
        if _look(folder, new) is not None:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
        os.rename(old, new, src_dir_fd=folder, dst_dir_fd=folder)


def _exchange(folder: int, new: str, old: str) -> None:
    """Swap two directories: atomically if the kernel can, else with three renames."""
    try:
        linux.rename(folder, new, old, linux.RENAME_EXCHANGE)
    except OSError as error:
        if error.errno not in linux.UNSUPPORTED:
            raise
        # two renames: killed in between, the next run finds `aside` and puts it back
        aside = new + _ASIDE
        os.rename(old, aside, src_dir_fd=folder, dst_dir_fd=folder)
        try:
            os.rename(new, old, src_dir_fd=folder, dst_dir_fd=folder)
        except OSError:
            os.rename(aside, old, src_dir_fd=folder, dst_dir_fd=folder)
            raise
        os.rename(aside, new, src_dir_fd=folder, dst_dir_fd=folder)


def _sync(directory: int) -> None:
    """Sync a directory, unless its file system cannot sync directories."""
    try:
        os.fsync(directory)
    except OSError as error:
        if error.errno not in linux.UNSUPPORTED:
            raise
