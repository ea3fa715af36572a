"""One file that is replaced in one step; `publish.py` does that with folders."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path for a new file, which takes the place of the file `path` when the block ends.

    Yields:
        A path beside it that nobody can foresee, so that nothing lies there already. After an error
        no file is there, and `path` is as before.
    """
    temporary = path.with_name(f".{token_hex(16)}.npt-fast")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink()
