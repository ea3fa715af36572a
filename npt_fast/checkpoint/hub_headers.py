"""Checkpoints on the Hub, opened by their headers: what is not read is not downloaded.

Each file becomes a sparse one of the same size, into which range requests put the bytes that our
readers ask for. So the readers, with all their checks, are those of files on the disk.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from npt_fast.checkpoint.checkpoint import Checkpoint, open_checkpoint
from npt_fast.checkpoint.place import Place, hub_name, list_own_files
from npt_fast.checkpoint.source_file import partial_file
from npt_fast.errors import CheckpointError, NPTError
from npt_fast.hub import HubName, UnreachableError, all_in_cache, read_part
from npt_fast.paths import path_errors

_BLOCK = 1024
"""Bytes that are fetched at once: a zip describes each tensor in the hundred bytes before it."""


class HubHeaders:
    """Context manager that opens checkpoints, on the disk and on the Hub, for their headers.

    Tensors of those in `names` must not be read, or they are fetched piece by piece. Nothing of
    them remains after the block. A checkpoint that is in the Hub's cache, or that the Hub cannot be
    asked for, is opened from there.

    Attributes:
        names: name of each checkpoint whose headers were fetched, by its temporary folder.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()
        self.names: dict[str, str] = {}

    def __enter__(self) -> HubHeaders:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()
        if isinstance(error, NPTError):  # a temporary folder says nothing to a user
            message = str(error)
            for folder, name in self.names.items():
                message = message.replace(folder, name)
            error.args = (message,)

    def open(self, given: str | Path) -> Checkpoint:
        """Open a checkpoint.

        Raises:
            CheckpointError: as `npt_fast.checkpoint.checkpoint.open_checkpoint`.
            PathError: `given` is not a valid path.
        """
        name = hub_name(given)
        if name is None:
            return open_checkpoint(given)
        try:
            commit, sizes = list_own_files(name)
        except UnreachableError:
            return open_checkpoint(given)
        if all_in_cache(name, commit, sizes):
            return open_checkpoint(given)
        from tempfile import TemporaryDirectory

        folder = Path(self._stack.enter_context(TemporaryDirectory(prefix="npt_fast-")))
        self.names[str(folder)] = name.at(commit)
        for file, size in sizes.items():
            path = folder / file
            with path_errors(path, CheckpointError):
                path.touch()
                os.truncate(path, size)
            parts = _Parts(name, commit, path, size)
            self._stack.enter_context(partial_file(path, parts.fetch))
        note = f"{name.at(commit)}: only headers were read of {sum(sizes.values()):,} bytes"
        return open_checkpoint(Place(name.at(commit), folder, note))


class _Parts:
    """Fetches bytes of a file on the Hub into a sparse file of the same name, each block once."""

    def __init__(self, name: HubName, commit: str, path: Path, size: int) -> None:
        self._name, self._commit, self._path, self._size = name, commit, path, size
        self._there: set[int] = set()

    def fetch(self, offset: int, length: int) -> None:
        stop = min(offset + length, self._size)
        blocks = range(offset // _BLOCK, -(-stop // _BLOCK))
        missing = [block for block in blocks if block not in self._there]
        if not missing:
            return
        begin, data = read_part(
            self._name, self._commit, self._path.name, self._size,
            missing[0] * _BLOCK, min((missing[-1] + 1) * _BLOCK, self._size),
        )  # fmt: skip
        before = self._path.stat()
        with self._path.open("r+b") as file:
            file.seek(begin)
            file.write(data)
        # readers take another time for a change
        os.utime(self._path, ns=(before.st_atime_ns, before.st_mtime_ns))
        self._there.update(range(missing[0], missing[-1] + 1))
