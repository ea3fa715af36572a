"""``merge_digests.txt``: one line for each tensor of a merged checkpoint, with its SHA-256.

A merge of 80 layers with num_ranks 128 and their optimizer has 370,000 tensors, too many to hold
them in memory as JSON. The lines have the order of the tensors in their files, so that they can be
written and compared while the tensors are read.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Hashable, Iterable, Iterator
from pathlib import Path
from typing import Generic, TypeVar

from npt_fast.checkpoint.byte_mover import write_all
from npt_fast.checkpoint.source_file import WINDOW, SourceFile
from npt_fast.errors import CheckpointError

DIGESTS = "merge_digests.txt"
_MAX_LINE = 8192  # a tensor name has 4096 bytes at most

_WAY_ON = "copy the file again, or remove it to go on without digests"

TensorDigest = tuple[str, str, str]
"""Name of a file, name of a tensor in it, and ``"F32[576, 32] <SHA-256 of the bytes>"``."""


class DigestWriter:
    """Context manager that writes the file; no file is written if there is no digest.

    Args:
        create: function that creates a file of the given name in the checkpoint's directory and
            returns its descriptor.

    Attributes:
        weights: digests of weights, by tensor name; other tensors are left out.
        sha256: SHA-256 of the file after it was closed; "" if there is no file.
    """

    def __init__(self, create: Callable[[str], int]) -> None:
        self._create = create
        self._lines = bytearray()
        self._written = 0
        self._hash = hashlib.sha256()
        self._fd = -1
        self.weights: dict[str, str] = {}
        self.sha256 = ""

    def __enter__(self) -> DigestWriter:
        return self

    def __exit__(self, *error: object) -> None:
        if self._fd >= 0:
            try:
                self._flush()
                os.fsync(self._fd)
            finally:
                os.close(self._fd)
            self.sha256 = self._hash.hexdigest()

    def add(self, file: str, name: str, digest: str) -> None:
        self._lines += f"{file}\t{name}\t{digest}\n".encode()
        if file.startswith("npt_weights"):
            self.weights[name] = digest
        if len(self._lines) > WINDOW or self._fd < 0:
            self._flush()

    def _flush(self) -> None:
        if self._fd < 0:
            self._fd = self._create(DIGESTS)
        write_all(self._fd, memoryview(self._lines), self._written)
        self._written += len(self._lines)
        self._hash.update(self._lines)
        self._lines.clear()


K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class InOrder(Generic[K, V]):
    """Finds values by key in an iterator, with little memory if the order of the keys is the same.

    Args:
        items: pairs of key and value.
    """

    def __init__(self, items: Iterable[tuple[K, V]]) -> None:
        self._items = iter(items)
        self._passed: dict[K, V] = {}

    def take(self, key: K) -> V | None:
        """The value of a key; None if there is none or it was taken before."""
        if key in self._passed:
            return self._passed.pop(key)
        for other, value in self._items:
            if other == key:
                return value
            # memory grows only by what is asked for out of order
            self._passed[other] = value
        return None

    def rest(self) -> Iterator[K]:
        """All keys whose values were not taken."""
        yield from self._passed
        for key, _ in self._items:
            yield key


def read_digests(directory: Path) -> Iterator[TensorDigest]:
    """The digests that a checkpoint's file records, in its order; none if there is no file.

    Raises:
        CheckpointError: the file cannot be read or is malformed.
    """
    path = directory / DIGESTS
    if not os.path.lexists(path):
        return
    file = SourceFile.of(path)
    number, rest = 0, b""
    for window in file.windows(0, file.size):
        *lines, rest = (rest + bytes(window)).split(b"\n")
        for line in lines:
            number += 1
            yield _parse(line, path, number)
        # a file without line breaks must not be gathered in memory
        if len(rest) > _MAX_LINE:
            break
    if rest:
        raise CheckpointError(f"{path}: line {number + 1} is cut off, or too long; {_WAY_ON}")


def _parse(line: bytes, path: Path, number: int) -> TensorDigest:
    try:
        file, name, digest = line.decode().split("\t")
    except ValueError:
        problem = f"{path}: line {number} is not a file, a tensor and its digest; {_WAY_ON}"
        raise CheckpointError(problem) from None
    return file, name, digest
