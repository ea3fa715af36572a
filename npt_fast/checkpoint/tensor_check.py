"""Check one tensor: against its source, its recorded digest and CRC, and for NaN and infinity."""

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
    """An output tensor and the facts to check it against.

    Attributes:
        file: name of the tensor's file.
        entry: the tensor.
        recipe: recipe that makes the tensor from its source; None if the source is unknown.
        recorded: recorded digest of the tensor; None if there is none.
        finite: whether NaN and infinity are problems.
        fresh: whether the merge has just read the source, so that it must still be readable.
    """

    file: str
    entry: TensorEntry
    recipe: Recipe | None
    recorded: str | None
    finite: bool
    fresh: bool


@dataclass(slots=True)
class CheckOutcome:
    """The outcome of a `TensorCheck`.

    Attributes:
        digest: digest of the tensor, like ``"F32[576, 32] <SHA-256 of the bytes>"``.
        damage: one line for each proof that the tensor is damaged.
        source_damage: one line for each proof that its source is damaged.
        difference: description of the difference from the source; "" if there is none.
        proven: whether a recorded digest or CRC proves that the tensor is as it was written.
        compared: whether the tensor was compared with its source and is equal.
        digest_matched: whether the tensor equals its recorded digest.
        crcs_matched: number of recorded CRCs that match, those of the source included.
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
    """Run checks; each tensor and its source are read once, side by side."""
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
    # if the bytes equal their source's, messages name the source
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
        elif not (outcome.compared and entry.crc32):  # otherwise reported above
            line = f"{copied.file.path}: {copied.name}: damaged, its CRC-32 differs"
            outcome.source_damage.append(line)
    return outcome


class _Source:
    """The expected bytes of a tensor, read side by side with the tensor.

    Attributes:
        difference: description of the difference; "" as long as there is none.
        crc: CRC-32 of the expected bytes.
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
        """Compare the next bytes of the tensor, whose CRC-32 up to here is `crc`."""
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
        """The next `count` expected bytes, or fewer at the end."""
        while len(self._left) < count:
            more = next(self._windows, None)
            if more is None:
                break
            # the windows of both sides need not end at the same byte
            self._left = self._left + more if self._left else bytes(more)
        taken, self._left = self._left[:count], self._left[count:]
        return taken


def in_batches(checks: Iterator[TensorCheck]) -> Iterator[list[TensorCheck]]:
    """Checks in groups of 256 tensors or 8 MiB: smaller ones are not worth passing to a thread."""
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
