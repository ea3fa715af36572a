"""Hold one tensor against everything that is known of it: source, digest, CRC, finite values."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from npt_fast.checkpoint.numbers import count_non_finite
from npt_fast.checkpoint.recipe import Recipe
from npt_fast.checkpoint.source_file import NearbyReader
from npt_fast.checkpoint.tensor_entry import TensorEntry
from npt_fast.errors import CheckpointError, NPTError


@dataclass(frozen=True, slots=True)
class TensorCheck:
    """One output tensor and what it is held against.

    Attributes:
        file: name of its file.
        entry: where it is.
        recipe: how it comes about from its source; None where the source is unknown.
        recorded: its recorded digest, None where there is none.
        finite: whether NaN and infinity are a problem in it.
        fresh: whether the source has just been read, so that it must still be readable.
    """

    file: str
    entry: TensorEntry
    recipe: Recipe | None
    recorded: str | None
    finite: bool
    fresh: bool


@dataclass(slots=True)
class CheckOutcome:
    """What was found.

    Attributes:
        digest: ``"F32[576, 32] <sha256 of its bytes>"``.
        damage: one line for each proof that the tensor is not what it was.
        source_damage: likewise for its source.
        difference: how it differs from its source; "" if it does not.
        proven: whether a recorded digest or CRC says that the tensor is what was written.
        compared: whether it was compared with its source, and equals it.
        digest_matched: whether it equals its recorded digest.
        crcs_matched: recorded CRCs that match, its own and its source's.
    """

    digest: str = ""
    damage: list[str] = field(default_factory=list)
    source_damage: list[str] = field(default_factory=list)
    difference: str = ""
    proven: bool = False
    compared: bool = False
    digest_matched: bool = False
    crcs_matched: int = 0


def check_tensors(checks: Sequence[TensorCheck]) -> list[CheckOutcome]:
    """Read each tensor once, and its source once beside it."""
    own, source = NearbyReader(), NearbyReader()
    return [_check(check, own, source) for check in checks]


def _check(check: TensorCheck, own: NearbyReader, sources: NearbyReader) -> CheckOutcome:
    entry = check.entry
    where = f"{check.file}: {entry.name}"
    outcome = CheckOutcome()
    beside = _Source(check, sources)
    digest = hashlib.sha256()
    crc = bad = 0
    windows = Recipe.unchanged(entry).windows(own)
    try:
        for window in windows:
            data = bytes(window)
            digest.update(data)
            crc = zlib.crc32(data, crc)
            if check.finite:
                bad += count_non_finite(data, entry.dtype)
            beside.compare(data, crc)
    except CheckpointError as error:
        outcome.damage.append(str(error))
        return outcome
    outcome.difference = f"{where}: {beside.difference}" if beside.difference else ""
    outcome.compared = check.recipe is not None and not beside.difference
    outcome.digest = f"{entry.dtype.name}{list(entry.shape)} {digest.hexdigest()}"
    # bytes that equal their source's are to be blamed on the source
    origin = check.recipe.source if outcome.compared and check.recipe else None
    blamed = f"{origin.file.path}: {origin.name}" if origin else where
    if bad:
        values = "value is" if bad == 1 else "values are"
        outcome.damage.append(f"{blamed}: {bad} {values} NaN or infinite")
    if check.recorded is not None:
        outcome.digest_matched = check.recorded == outcome.digest
        if not outcome.digest_matched:
            outcome.damage.append(f"{where}: has changed: its recorded digest differs")
    if entry.crc32:
        if entry.crc32 == crc:
            outcome.crcs_matched += 1
        else:
            outcome.damage.append(f"{blamed}: damaged, its CRC-32 differs")
    # a CRC of 0 was not recorded
    outcome.proven = outcome.digest_matched or (check.recorded is None and entry.crc32 == crc != 0)
    copied = check.recipe.source if check.recipe is not None and check.recipe.is_copy else None
    if copied is not None and copied.crc32 and not beside.unread:
        if copied.crc32 == beside.crc:
            outcome.crcs_matched += 1
        elif not (outcome.compared and entry.crc32):  # else said already
            line = f"{copied.file.path}: {copied.name}: damaged, its CRC-32 differs"
            outcome.source_damage.append(line)
    return outcome


class _Source:
    """What a tensor should be, read beside what it is.

    Attributes:
        difference: how they differ, for people; "" as long as they do not.
        crc: CRC-32 of what the tensor should be.
        unread: whether the source could not be read to its end.
    """

    def __init__(self, check: TensorCheck, reader: NearbyReader) -> None:
        recipe, entry = check.recipe, check.entry
        self._fresh = check.fresh
        self.difference = ""
        self.crc = 0
        self.unread = recipe is None
        self._windows: Iterator[memoryview | bytes] = iter(())
        self._left = b""
        self._origin = ""
        if recipe is None:
            return
        source = recipe.source
        self._origin = f"{source.file.path}: {source.name}" if source else "its recomputation"
        if (recipe.dtype, recipe.shape) != (entry.dtype, entry.shape):
            self.difference = (
                f"is {entry.dtype.name}{list(entry.shape)}, "
                f"{recipe.dtype.name}{list(recipe.shape)} expected from {self._origin}"
            )
            self.unread = True
        else:
            self._windows = recipe.windows(reader)

    def compare(self, data: bytes, crc: int) -> None:
        """Hold the next bytes of the tensor, whose CRC-32 up to here is `crc`, against it."""
        if self.unread:
            return
        try:
            expected = self._take(len(data))
        except NPTError as error:
            if self._fresh:
                raise
            self.difference = f"cannot be compared: {error}"
            self.unread = True
            return
        if not self.difference and data == expected:
            self.crc = crc
        else:
            self.crc = zlib.crc32(expected, self.crc)
            self.difference = f"differs from {self._origin}"

    def _take(self, count: int) -> bytes:
        """The next bytes; fewer at the end."""
        while len(self._left) < count:
            more = next(self._windows, None)
            if more is None:
                break
            # the windows of both sides need not end at the same byte
            self._left = self._left + more if self._left else bytes(more)
        taken, self._left = self._left[:count], self._left[count:]
        return taken


def in_batches(checks: Iterator[TensorCheck]) -> Iterator[list[TensorCheck]]:
    """Checks in groups that are worth a thread's while: 256 tensors, or 8 MiB."""
    batch: list[TensorCheck] = []
    size = 0
    for check in checks:
        batch.append(check)
        size += check.entry.nbytes
        if len(batch) == 256 or size > 8 << 20:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
