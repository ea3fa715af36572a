"""Paths from users, and questions to the file system about them.

Every path from a user passes `user_path` (or `expand`, which returns text) once, where it enters
the library. Whether something exists is asked here too: `os.path`, and some versions of pathlib,
answer "no" if permission is denied.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from npt_fast.errors import NPTError, PathError


def expand(given: str | Path) -> str:
    """A path as text, with ``~`` and ``~user`` replaced by the home directory.

    Raises:
        PathError: it is no path, is empty, has a NUL byte, or names a user without a home
            directory.
    """
    if not isinstance(given, (str, os.PathLike)):
        raise PathError(f"a path must be a text or a path, not of type {type(given).__name__}")
    text = os.fspath(given)
    if not text.strip():
        raise PathError("the path is empty; to name the current directory, write .")
    if "\0" in text:
        raise PathError(f"{text!r}: a path cannot hold a NUL byte")
    expanded = os.path.expanduser(text)
    # expanduser returns the name of an unknown user as it is
    if text.startswith("~") and expanded == text:
        user = text.partition("/")[0]
        raise PathError(f"{text}: {user} has no home directory; a file of this name is ./{text}")
    return expanded


def user_path(given: str | Path) -> Path:
    """A path from a user, with ``~`` replaced by the home directory.

    The result can be passed to this function again: ``./~``, which pathlib shortens to ``~``,
    becomes absolute.

    Raises:
        PathError: as in `expand`.
    """
    path = Path(expand(given))
    return path.absolute() if str(path).startswith("~") else path


def path_list(given: str | Path | Sequence[str | Path]) -> list[str]:
    """A path or a sequence of paths as a list of text."""
    # a text is a sequence, too
    if isinstance(given, (str, os.PathLike)):
        return [os.fspath(given)]
    return [os.fspath(path) for path in given]


@contextmanager
def path_errors(path: str | Path, kind: type[NPTError]) -> Iterator[None]:
    """Turn an OSError that occurs while `path` is examined into an error of one line.

    Args:
        path: path for the message, if the OSError names none.
        kind: class of the error.

    Raises:
        NPTError: of class `kind`: permission is denied, a name is too long, links form a circle.
    """
    try:
        yield
    except OSError as error:
        raise kind(f"{error.filename or path}: {error.strerror or error}") from None


def exists(path: Path) -> bool:
    """Whether anything is at `path`; a broken link counts.

    Raises:
        OSError: the system cannot tell, for example because permission is denied.
    """
    return _mode(path, follow_links=False) is not None


def is_file(path: Path) -> bool:
    """Whether a regular file, or a link to one, is at `path`; raises OSError like `exists`."""
    mode = _mode(path, follow_links=True)
    return mode is not None and stat.S_ISREG(mode)


def is_directory(path: Path) -> bool:
    """Whether a directory, or a link to one, is at `path`; raises OSError like `exists`."""
    mode = _mode(path, follow_links=True)
    return mode is not None and stat.S_ISDIR(mode)


def _mode(path: Path, *, follow_links: bool) -> int | None:
    try:
        return os.stat(path, follow_symlinks=follow_links).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
