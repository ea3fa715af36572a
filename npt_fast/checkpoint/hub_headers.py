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
from npt_fast.checkpoint.hub import (
    HubName,
    Listing,
    Place,
    UnreachableError,
    hub_errors,
    hub_name,
    list_files,
)
from npt_fast.checkpoint.source_file import partial_file
from npt_fast.checkpoint.strict_json import MAX_SMALL
from npt_fast.errors import CheckpointError, HubError, NPTError
from npt_fast.paths import expand, path_errors

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
        given = expand(given)
        with path_errors(given, CheckpointError):
            name = hub_name(given)
        if name is None:
            return open_checkpoint(given)
        try:
            listing = list_files(name)
        except UnreachableError:
            return open_checkpoint(given)
        if _is_cached(listing):
            return open_checkpoint(given)
        return open_checkpoint(self._sparse(listing))

    def _sparse(self, listing: Listing) -> Place:
        from tempfile import TemporaryDirectory

        from huggingface_hub import hf_hub_url

        name, commit, sizes = listing
        folder = self._stack.enter_context(TemporaryDirectory(prefix="npt_fast-"))
        self.names[folder] = name.at(commit)
        for file, size in sizes.items():
            path = Path(folder, file)
            path.touch()
            os.truncate(path, size)
            url = hf_hub_url(name.repo, file, revision=commit)
            self._stack.enter_context(partial_file(path, _Ranges(name, url, path, size).fetch))
        note = f"{name.at(commit)}: only headers were read of {sum(sizes.values()):,} bytes"
        return Place(name.at(commit), Path(folder), note)


def _is_cached(listing: Listing) -> bool:
    from huggingface_hub import try_to_load_from_cache

    name, commit, sizes = listing
    return all(
        isinstance(try_to_load_from_cache(name.repo, file, revision=commit), str) for file in sizes
    )


class _Ranges:
    """Fetches bytes of a file on the Hub into a sparse file, each block once."""

    def __init__(self, name: HubName, url: str, path: Path, size: int) -> None:
        self._name, self._url, self._path, self._size = name, url, path, size
        self._there: set[int] = set()

    def fetch(self, offset: int, length: int) -> None:
        stop = min(offset + length, self._size)
        blocks = range(offset // _BLOCK, -(-stop // _BLOCK))
        missing = [block for block in blocks if block not in self._there]
        if not missing:
            return
        begin, end = missing[0] * _BLOCK, min((missing[-1] + 1) * _BLOCK, self._size)
        data, begin = self._get(begin, end)
        before = self._path.stat()
        with self._path.open("r+b") as file:
            file.seek(begin)
            file.write(data)
        # readers take another time for a change
        os.utime(self._path, ns=(before.st_atime_ns, before.st_mtime_ns))
        self._there.update(range(missing[0], missing[-1] + 1))

    def _get(self, begin: int, end: int) -> tuple[bytes, int]:
        """Bytes of the file, and the place of the first of them."""
        from huggingface_hub import constants
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            hf_raise_for_status,
            http_stream_backoff,
        )

        file = f"{self._name.given}: {self._path.name}"
        headers = {
            **build_hf_headers(),
            "Range": f"bytes={begin}-{end - 1}",
            "Accept-Encoding": "identity",
        }
        with (
            hub_errors(self._name),
            http_stream_backoff(
                "GET",
                self._url,
                headers=headers,
                timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
                max_retries=2,
                retry_on_exceptions=(),
            ) as response,
        ):
            hf_raise_for_status(response)
            if response.status_code != 206:  # the whole file
                if self._size > MAX_SMALL:
                    raise HubError(
                        f"{file}: its server sends whole files only, so that headers cannot be "
                        "read alone; fetch it first (hf download)"
                    )
                begin, end = 0, self._size
            data = b""
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) > end - begin:
                    break
        if len(data) != end - begin:
            raise HubError(f"{file}: {end - begin} bytes were asked for, {len(data)} came")
        return data, begin
