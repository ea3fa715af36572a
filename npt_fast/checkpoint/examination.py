"""Compare a checkpoint with its sources and with the records of its merge.

Directly after the merge, the sources say what is right. Later the checkpoint's own records do:
digests, CRCs, and the SHA-256 of headers and small files. Its sources may have been moved or
trained further since. They are compared too, but a difference is a problem of the checkpoint only
if none of its own records proves the tensor.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

from npt_fast.checkpoint.checkpoint import Checkpoint
from npt_fast.checkpoint.digests import DIGESTS, DigestWriter, InOrder, TensorDigest
from npt_fast.checkpoint.layout import TorchZipLayout
from npt_fast.checkpoint.npt_config import NPT_CONFIG
from npt_fast.checkpoint.own_files import CONFIG
from npt_fast.checkpoint.plan import MergePlan
from npt_fast.checkpoint.recipe import Recipe
from npt_fast.checkpoint.source_file import SourceFile
from npt_fast.checkpoint.tensor_check import (
    CheckOutcome,
    TensorCheck,
    check_tensors,
    in_batches,
)
from npt_fast.checkpoint.tensor_entry import Record, TensorEntry
from npt_fast.checkpoint.tensor_source import SAFETENSORS_INDEX
from npt_fast.checkpoint.training_state import (
    MULTI_LAYER_STATE,
    TRAINING_STATE,
    is_moment,
    read_multi_layer_state,
    read_training_state,
)
from npt_fast.config import Progress
from npt_fast.errors import CheckpointError
from npt_fast.tables import Report

_UNREADABLE = "unreadable"
"""Stands for the SHA-256 of a file that exists but cannot be read."""
_MAX_WHOLE_FILE = 1 << 30  # bytes; enough for the digests of six million tensors
_WHOLE_FILES = (SAFETENSORS_INDEX, MULTI_LAYER_STATE, CONFIG, NPT_CONFIG, DIGESTS)


@dataclass(slots=True, repr=False)
class VerifyReport(Report):
    """The outcome of a verification.

    Attributes:
        path: path of the checkpoint.
        expected_layers: layers that the merge should have written.
        found_layers: complete layers that were found.
        checkpoint_keys: number of weight tensors found.
        problems: one line for each difference; empty if the verification passed.
        notes: one line for each thing that could not be checked, with the reason.
        tensors: number of tensors read, optimizer moments included.
        compared: number of tensors that equal their source bit for bit.
        digests_matched: number of tensors that equal their recorded digest.
        crcs_matched: number of records that equal the CRC-32 recorded in their file.
        bytes_read: bytes of the tensors read.
    """

    path: str
    expected_layers: list[int]
    found_layers: list[int]
    checkpoint_keys: int
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tensors: int = 0
    compared: int = 0
    digests_matched: int = 0
    crcs_matched: int = 0
    bytes_read: int = 0

    @property
    def passed(self) -> bool:
        """Whether there are no problems."""
        return not self.problems

    @property
    def facts(self) -> dict[str, object]:
        """The outcome, in short."""
        return {
            "path": self.path,
            "passed": "yes" if self.passed else f"no: {self.problems[0]}",
            "layers": ", ".join(map(str, self.found_layers)),
            "tensors": f"{self.tensors} read, {self.compared} compared with their source",
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"passed": self.passed, **asdict(self)}


class Examination:
    """The verification of one checkpoint.

    Args:
        checkpoint: the checkpoint.
        expected: layers that it should hold.
        plan: plan with the recipes of its tensors; None if its sources are unknown.
        digests: recorded digests of its tensors.
        fresh: whether the merge of `plan` has just written the checkpoint, so that every difference
            is a problem of the checkpoint.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        expected: Sequence[int],
        plan: MergePlan | None,
        digests: Iterable[TensorDigest],
        *,
        fresh: bool,
    ) -> None:
        self.checkpoint = checkpoint
        self.plan = plan
        self.fresh = fresh
        self.report = VerifyReport(
            str(checkpoint.path),
            sorted(expected),
            list(checkpoint.modules),
            len(checkpoint.weights.tensors),
        )
        self.digests_recorded = 0
        self._digests = InOrder(self._counted(digests))
        self._recipes = InOrder(_recipes(plan))
        self._changed: Counter[str] = Counter()  # number of tensors that differ, by source
        self._unmatched: Counter[str] = Counter()  # number found in one place only, by file
        self._unproven: dict[str, None] = {}  # files with tensors that nothing can prove
        self._headers = {h.file.path.name: _sha256(h) for h in checkpoint.weights.headers}

    def _counted(self, digests: Iterable[TensorDigest]) -> Iterator[tuple[tuple[str, str], str]]:
        try:
            for file, name, digest in digests:
                self.digests_recorded += 1
                yield (file, name), digest
        except CheckpointError as error:
            self.report.problems.append(str(error))

    def run(self, progress: Progress, digests: DigestWriter | None = None) -> None:
        """Check every tensor."""
        report, checkpoint = self.report, self.checkpoint
        if missing := sorted(set(report.expected_layers) - set(checkpoint.modules)):
            report.problems.append(f"Missing layers: {missing}")
        if extra := sorted(set(checkpoint.modules) - set(report.expected_layers)):
            report.problems.append(f"Unexpected layers: {extra}")
        if checkpoint.description is not None:
            report.problems.extend(checkpoint.description.contradictions(checkpoint.modules))
        total = sum(file.size for file in checkpoint.weights.files) + self._state_size()
        progress("verifying", 0, total)
        for check, outcome in _in_parallel(in_batches(self._checks())):
            self._take(check, outcome)
            if digests is not None:
                digests.add(check.file, check.entry.name, outcome.digest)
            progress("verifying", min(report.bytes_read, total), total)
        progress("verifying", total, total)
        self._report_missing()
        self._check_shared_records()
        for source, count in self._changed.items():
            tensors = "1 tensor differs" if count == 1 else f"{count} tensors differ"
            report.notes.append(
                f"{source} has changed since the merge, or is another file ({tensors}); "
                "the output equals its own records"
            )
        for file, count in self._unmatched.items():
            report.notes.append(
                f"{file}: the sources have changed since the merge: {count} tensors are only in "
                "this file, or only in the sources"
            )

    def check_files(self, expected: Mapping[str, str]) -> None:
        """Compare headers and small files with their recorded SHA-256.

        Args:
            expected: recorded SHA-256 by file name.
        """
        self._check_curriculum()
        for name, digest in expected.items():
            found = self._headers.get(name) or file_sha256(self.checkpoint, name)
            if found != digest:
                line = f"{name} {'has changed' if found else 'is missing'}"
                if line not in self.report.problems:
                    self.report.problems.append(line)
        small = [name for name in _WHOLE_FILES if self._is_there(name) and name not in expected]
        if unproven := [*self._unproven, *small]:
            self.report.notes.append(
                f"nothing to compare with for {', '.join(unproven)}: no source and no digest is "
                "known; structure, CRCs and values were checked"
            )

    def _is_there(self, name: str) -> bool:
        directory = self.checkpoint.directory
        return directory is not None and os.path.lexists(directory / name)

    def _check_curriculum(self) -> None:
        if self.checkpoint.directory is None:
            return
        try:
            read_multi_layer_state(self.checkpoint.directory / MULTI_LAYER_STATE)
        except CheckpointError as error:
            self.report.problems.append(str(error))

    def _state_size(self) -> int:
        directory = self.checkpoint.directory
        try:
            return os.stat(directory / TRAINING_STATE).st_size if directory else 0
        except OSError:  # reported when the file is read
            return 0

    def _checks(self) -> Iterator[TensorCheck]:
        by_file: dict[str, list[TensorEntry]] = {}
        for entry in self.checkpoint.weights.tensors.values():
            by_file.setdefault(entry.file.path.name, []).append(entry)
        for file, entries in by_file.items():
            for entry in entries:
                yield self._check_of(file, "weights", entry, finite=True)
        for entry in self._state_entries():
            # other tensors may be infinite, such as the initial `best` of ReduceLROnPlateau
            finite = is_moment(entry.name)
            yield self._check_of(TRAINING_STATE, TRAINING_STATE, entry, finite=finite)

    def _check_of(self, file: str, kind: str, entry: TensorEntry, *, finite: bool) -> TensorCheck:
        recipe = self._recipes.take((kind, entry.name))
        if recipe is None and self.fresh:
            self.report.problems.append(f"{file}: {entry.name} comes from no source")
        elif recipe is None and self.plan is not None:
            self._unmatched[file] += 1
        recorded = self._digests.take((file, entry.name))
        if recipe is None and recorded is None:
            self._unproven.setdefault(file)
        return TensorCheck(file, entry, recipe, recorded, finite, self.fresh)

    def _state_entries(self) -> Iterator[TensorEntry]:
        """The tensors of the training state; a problem with the file goes into the report."""
        report, directory = self.report, self.checkpoint.directory
        if directory is None or not os.path.lexists(directory / TRAINING_STATE):
            return
        path = directory / TRAINING_STATE
        try:
            planned = self._planned_state()
            found = planned.find(SourceFile.of(path)) if planned else None
            if planned is not None and found is not None:
                self._headers[TRAINING_STATE] = hashlib.sha256(planned.header).hexdigest()
                yield from found
                return
            state = read_training_state(path, self.checkpoint.modules)
            if state is not None:
                self._headers[TRAINING_STATE] = _sha256(state.header)
                yield from state.tensors()
        except CheckpointError as error:
            self._headers[TRAINING_STATE] = _UNREADABLE
            report.problems.append(str(error))

    def _planned_state(self) -> TorchZipLayout | None:
        for file in self.plan.files if self.plan else ():
            if file.name == TRAINING_STATE and isinstance(file, TorchZipLayout):
                return file
        return None

    def _take(self, check: TensorCheck, outcome: CheckOutcome) -> None:
        report = self.report
        report.tensors += 1
        report.bytes_read += check.entry.nbytes
        report.compared += outcome.compared
        report.digests_matched += outcome.digest_matched
        report.crcs_matched += outcome.crcs_matched
        report.problems += outcome.damage
        # damage or a change of a source after the merge is not a problem of the output
        source_damaged = bool(outcome.difference and outcome.source_damage and not outcome.damage)
        blameless = not self.fresh and (outcome.proven or source_damaged)
        (report.notes if blameless else report.problems).extend(outcome.source_damage)
        if not outcome.difference:
            return
        source = check.recipe.source if check.recipe else None
        if blameless and outcome.proven:
            self._changed[str(source.file.path) if source else "its recomputation"] += 1
        elif blameless:
            report.notes.append(
                f"{check.file}: {check.entry.name}: neither its source nor a record proves it"
            )
        elif self.fresh or outcome.damage:
            report.problems.append(outcome.difference)
        else:
            report.problems.append(
                f"{outcome.difference}; nothing recorded tells which of the two has changed"
            )

    def _report_missing(self) -> None:
        """Report tensors that are recorded or planned, but missing."""
        present = {file.path.name for file in self.checkpoint.weights.files}
        present |= self._headers.keys()
        missing: dict[str, str] = {}
        # a file that is missing or cannot be read gets one line, not one for each tensor
        state = self._headers.get(TRAINING_STATE, "")
        for file, name in self._digests.rest():
            if file not in present:
                missing[file] = ""
            elif file != TRAINING_STATE or state != _UNREADABLE:
                missing[f"{file}: {name}"] = ""
        for kind, name in self._recipes.rest():
            if self.fresh:
                missing[f"{kind}: {name}"] = ""
            elif kind != TRAINING_STATE or state not in ("", _UNREADABLE):
                self._unmatched[kind] += 1
        self.report.problems.extend(f"{what} is missing" for what in missing)

    def _check_shared_records(self) -> None:
        """Check CRCs of source records that were not read as a whole, in order, by a tensor."""
        records: dict[Record, str] = {}
        for _, recipe in _recipes(self.plan):
            source = recipe.source
            if source is None or (recipe.is_copy and source.crc32):
                continue  # `check_tensors` has checked this CRC
            whole = Record(source.file, source.offset, source.nbytes, source.crc32)
            record = source.record or whole
            if record.crc32:
                records[record] = source.name
        for record, name in records.items():
            crc = 0
            for window in record.file.windows(record.offset, record.nbytes):
                crc = zlib.crc32(window, crc)
            if crc == record.crc32:
                self.report.crcs_matched += 1
            else:
                lines = self.report.problems if self.fresh else self.report.notes
                lines.append(f"{record.file.path}: {name}: damaged, its CRC-32 differs")


def _recipes(plan: MergePlan | None) -> Iterator[tuple[tuple[str, str], Recipe]]:
    """Kind of file, name and recipe of all planned tensors; file names of shards may differ."""
    for file in plan.files if plan else ():
        kind = TRAINING_STATE if file.name == TRAINING_STATE else "weights"
        for piece in file.pieces:
            yield (kind, piece.recipe.name), piece.recipe


def _in_parallel(
    batches: Iterator[list[TensorCheck]],
) -> Iterator[tuple[TensorCheck, CheckOutcome]]:
    """Every check with its outcome, in order; few batches are in memory at a time."""
    # hashing releases the interpreter lock, so threads run in parallel
    workers = min(4, os.cpu_count() or 1)
    pool = ThreadPoolExecutor(workers)
    running: deque[tuple[list[TensorCheck], Future[list[CheckOutcome]]]] = deque()
    try:
        for batch in chain(batches, [None] * 2 * workers):
            if batch is not None:
                running.append((batch, pool.submit(check_tensors, batch)))
            if running and (batch is None or len(running) > 2 * workers):
                done, future = running.popleft()
                yield from zip(done, future.result(), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def _sha256(record: Record) -> str:
    digest = hashlib.sha256()
    for window in record.file.windows(record.offset, record.nbytes):
        digest.update(window)
    return digest.hexdigest()


def file_sha256(checkpoint: Checkpoint, name: str) -> str:
    """SHA-256 of a file without tensors; "" if there is no such file."""
    directory = checkpoint.directory
    if name not in _WHOLE_FILES or directory is None or not os.path.lexists(directory / name):
        return ""
    try:
        file = SourceFile.of(directory / name)
        if file.size > _MAX_WHOLE_FILE:
            return _UNREADABLE
        return _sha256(Record(file, 0, file.size))
    except CheckpointError:  # the reader of this file reports it
        return _UNREADABLE
