"""Hold one tensor against everything that is known of it: source, digest, CRC, finite values."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from npt_fast.checkpoint.numbers import count_non_finite
from npt_fast.checkpoint.recipe import Recipe
from npt_fast.checkpoint.tensor_entry import TensorEntry


@dataclass(frozen=True, slots=True)
class TensorCheck:
    """One output tensor and what it is held against.

    Attributes:
        file: name of its file.
        entry: where it is.
        recipe: how it comes about from its source; None where the source is unknown.
        recorded: its recorded digest, None where there is none.
    """

    file: str
    entry: TensorEntry
    recipe: Recipe | None
    recorded: str | None


@dataclass(slots=True)
class CheckOutcome:
    """What was found.

    Attributes:
        digest: ``"F32[576, 32] <sha256 of its bytes>"``.
        problems: one line per difference.
        crcs_matched: recorded CRCs that match, its own and its source's.
    """

    digest: str
    problems: list[str]
    crcs_matched: int = 0


def check_tensor(check: TensorCheck) -> CheckOutcome:
    """Read a tensor once, and its source once beside it."""
    entry, recipe = check.entry, check.recipe
    own = Recipe.unchanged(entry)
    where = f"{check.file}: {entry.name}"
    outcome = CheckOutcome("", [])
    if recipe is not None and (recipe.dtype, recipe.shape) != (entry.dtype, entry.shape):
        outcome.problems.append(
            f"{where}: is {entry.dtype.name}{list(entry.shape)}, "
            f"{recipe.dtype.name}{list(recipe.shape)} expected"
        )
        recipe = None
    digest = hashlib.sha256()
    crc = source_crc = bad = 0
    equal = True
    beside = _Rechunked(recipe.windows()) if recipe is not None else None
    for window in own.windows():
        data = bytes(window)
        digest.update(data)
        crc = zlib.crc32(data, crc)
        bad += count_non_finite(data, entry.dtype)
        if beside is not None:
            expected = beside.take(len(data))
            same = equal and data == expected
            source_crc = crc if same else zlib.crc32(expected, source_crc)
            equal = same
    if not equal:
        source = recipe.source if recipe else None
        origin = f"{source.file.path}: {source.name}" if source else "its recomputation"
        outcome.problems.append(f"{where}: differs from {origin}")
    if bad:
        outcome.problems.append(f"{where}: {bad} values are NaN or infinite")
    outcome.digest = f"{entry.dtype.name}{list(entry.shape)} {digest.hexdigest()}"
    if check.recorded is not None and check.recorded != outcome.digest:
        outcome.problems.append(f"{where}: differs from its recorded digest")
    outcome.crcs_matched += _check_crc(entry, crc, outcome.problems)
    if recipe is not None and recipe.is_copy and recipe.source is not None:
        outcome.crcs_matched += _check_crc(recipe.source, source_crc, outcome.problems)
    return outcome


class _Rechunked:
    """Take any number of bytes at a time from windows of other sizes."""

    def __init__(self, windows: Iterator[memoryview | bytes]) -> None:
        self._windows = windows
        self._left = b""

    def take(self, count: int) -> bytes:
        while len(self._left) < count:
            more = next(self._windows, None)
            if more is None:
                break
            self._left = self._left + more if self._left else bytes(more)
        taken, self._left = self._left[:count], self._left[count:]
        return taken


def _check_crc(entry: TensorEntry, crc: int, problems: list[str]) -> bool:
    """Whether a recorded CRC matches; a problem when it does not, nothing when there is none."""
    if not entry.crc32:
        return False
    if entry.crc32 == crc:
        return True
    problems.append(f"{entry.file.path}: {entry.name}: damaged, its CRC-32 differs")
    return False
