"""Paths as users give them, and what the file system refuses to say about them.

Every path that a user gives passes `user_path` (or `expand`, where the text is needed), once, where
it enters the library. What is at a path is asked here too: `os.path` and, depending on its version,
pathlib answer "nothing" where the truth is "permission denied".
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
        PathError: it is empty, holds a NUL byte, or names a user that does not exist.
    """
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
    """A path that a user gives, with ``~`` replaced by the home directory.

    What it returns may pass here again: ``./~``, of which pathlib makes ``~``, becomes absolute.

    Raises:
        PathError: as `expand`.
    """
    path = Path(expand(given))
    return path.absolute() if str(path).startswith("~") else path


def path_list(given: str | Path | Sequence[str | Path]) -> list[str]:
    """Paths as text; a path that is given by itself is a list of one, not of its letters."""
    # a text is a sequence, too
    if isinstance(given, (str, os.PathLike)):
        return [str(given)]
    return [str(path) for path in given]


@contextmanager
def path_errors(path: str | Path, kind: type[NPTError]) -> Iterator[None]:
    """Turn what the file system refuses while `path` is looked at into one line.

    Raises:
        NPTError: of `kind`: permission denied, a name that is too long, links in a circle, ...
    """
    try:
        yield
    except OSError as error:
        raise kind(f"{error.filename or path}: {error.strerror or error}") from None


def exists(path: Path) -> bool:
    """Whether anything is at `path`, if only a broken link.

    Raises:
        OSError: the system refuses to say.
    """
    return _mode(path, follow_links=False) is not None


def is_file(path: Path) -> bool:
    """Whether a regular file, or a link to one, is at `path`; raises OSError as `exists`."""
    mode = _mode(path, follow_links=True)
    return mode is not None and stat.S_ISREG(mode)


def is_directory(path: Path) -> bool:
    """Whether a directory, or a link to one, is at `path`; raises OSError as `exists`."""
    mode = _mode(path, follow_links=True)
    return mode is not None and stat.S_ISDIR(mode)


def _mode(path: Path, *, follow_links: bool) -> int | None:
    try:
        return os.stat(path, follow_symlinks=follow_links).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
