"""Prove a checkpoint: every tensor against its source, its recorded digest and its CRC.

`verify_plan` checks what a merge has just written, before anyone can see it. `verify` checks a
checkpoint anywhere later: against the digests that its ``merge_summary.json`` records and, where
the sources still exist, against these.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from npt_fast.checkpoint.checkpoint import (
    CONFIG,
    MERGE_SUMMARY,
    NPT_CONFIG,
    Checkpoint,
    open_checkpoint,
)
from npt_fast.checkpoint.layout import TorchZipLayout
from npt_fast.checkpoint.plan import MergePlan, plan_merge
from npt_fast.checkpoint.recipe import Recipe
from npt_fast.checkpoint.source_file import SourceFile
from npt_fast.checkpoint.tensor_check import TensorCheck, check_tensor
from npt_fast.checkpoint.tensor_entry import Record, TensorEntry
from npt_fast.checkpoint.tensor_source import (
    PT_WEIGHTS,
    SAFETENSORS_INDEX,
    locate_checkpoint,
)
from npt_fast.checkpoint.torch_zip import read_torch_zip
from npt_fast.checkpoint.training_state import (
    MULTI_LAYER_STATE,
    TRAINING_STATE,
    read_training_state,
)
from npt_fast.config import MergeOptions, Progress
from npt_fast.errors import CheckpointError, NPTError


@dataclass(slots=True)
class VerifyReport:
    """The outcome of a verification.

    Attributes:
        path: the checkpoint.
        expected_layers: layers that the merge was to produce.
        found_layers: complete layers found.
        checkpoint_keys: weight tensors found.
        problems: one line for each difference; empty when it passed.
        notes: what could not be checked, and why.
        tensors: tensors read back, optimizer moments included.
        compared: how many of them were compared with their source, bit for bit.
        digests_matched: how many equal a recorded digest.
        crcs_matched: how many records equal the CRC-32 that their file recorded.
        bytes_read: bytes of tensors read back.
        digests: file -> tensor -> ``"F32[576,32] <sha256 of its bytes>"``.
        files: SHA-256 of each small file; of a ``.pt`` with tensors, of the pickle in it.
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
    digests: dict[str, dict[str, str]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; without the digests, which ``merge_summary.json`` keeps."""
        plain = asdict(self)
        del plain["digests"], plain["files"]
        return {"passed": self.passed, **plain}


def verify_plan(plan: MergePlan, directory: Path, progress: Progress) -> VerifyReport:
    """Check what a merge wrote into `directory`, re-read from the disk, against its plan.

    Raises:
        CheckpointError: what was written cannot be read, or a source changed.
    """
    for path in directory.iterdir():
        _forget_cached(path)
    checkpoint = open_checkpoint(str(directory))
    return _examine(
        checkpoint,
        [merged.layer for merged in plan.layers],
        plan,
        plan.known_digests(),
        _planned_files(plan),
        progress,
    )


def verify(path: str | Path, *, progress: Progress | None = None) -> VerifyReport:
    """Check a merged checkpoint wherever it is now.

    Args:
        path: checkpoint directory.
        progress: called with what is being done, bytes done and bytes in all.

    Raises:
        CheckpointError: there is no checkpoint. One that is there but cannot be read, or is
            incomplete, gives a report that did not pass.
    """
    located, _ = locate_checkpoint(path)
    try:
        checkpoint = open_checkpoint(path)
    except CheckpointError as error:
        return VerifyReport(str(located), [], [], 0, problems=[str(error)])
    report_progress = progress or (lambda activity, done, total: None)
    summary = checkpoint.summary or {}
    notes = list(checkpoint.notes)
    problems: list[str] = []
    for name, line in checkpoint.unread.items():  # the summary is what there is to prove it by
        (problems if name == MERGE_SUMMARY else notes).append(line)
    plan = None
    if checkpoint.summary is not None:
        try:
            plan = _plan_again(summary)
        except (NPTError, ValueError) as error:
            notes.append(f"not compared with its sources: {error}")
    elif not problems:
        notes.append(f"no {MERGE_SUMMARY}: only structure, CRCs and values were checked")
    recorded = summary.get("tensors")
    digests = recorded if isinstance(recorded, dict) else {}
    if checkpoint.summary is not None and not digests:
        notes.append("no digests recorded: the merge was not made with --verify")
    merged_layers = summary.get("merged_layers")
    expected = list(checkpoint.modules)
    if isinstance(merged_layers, list):
        expected = [layer for layer in merged_layers if type(layer) is int]
    recorded_files = summary.get("files")
    files = _planned_files(plan) if plan else {}
    if isinstance(recorded_files, dict):
        files.update(recorded_files)
    report = _examine(
        checkpoint,
        expected,
        plan,
        {f: t for f, t in digests.items() if isinstance(t, dict)},
        files,
        report_progress,
    )
    for name, value in (
        ("total_parameters", sum(module.numel for module in checkpoint.modules.values())),
        ("checkpoint_keys", len(checkpoint.weights.tensors)),
    ):
        if name in summary and summary[name] != value:
            report.problems.append(f"{MERGE_SUMMARY}: {name} is not {value}")
    report.notes[:0] = notes
    report.problems[:0] = problems
    return report


def _plan_again(summary: Mapping[str, Any]) -> MergePlan:
    """The plan of the merge that wrote a summary, from its sources as they are now."""
    inputs = summary.get("inputs")
    options = summary.get("options")
    if not isinstance(inputs, list) or not isinstance(options, dict):
        raise ValueError("merge_summary.json does not record how it was made")
    specs = []
    for item in inputs:
        if not isinstance(item, dict) or not isinstance(item.get("path"), str):
            raise ValueError("merge_summary.json does not record how it was made")
        layers = item.get("layers")
        specs.append(item["path"] + (":" + ",".join(map(str, layers)) if layers else ""))
    try:
        known = MergeOptions(**options)
    except TypeError as error:
        raise ValueError(f"merge_summary.json has options of another version: {error}") from None
    plan = plan_merge(specs, known)
    if [merged.layer for merged in plan.layers] != summary.get("merged_layers"):
        raise ValueError("they hold other layers than when they were merged")
    return plan


def _examine(
    checkpoint: Checkpoint,
    expected: Sequence[int],
    plan: MergePlan | None,
    digests: Mapping[str, Mapping[str, str]],
    files: Mapping[str, str],
    progress: Progress,
) -> VerifyReport:
    report = VerifyReport(
        str(checkpoint.path),
        sorted(expected),
        list(checkpoint.modules),
        len(checkpoint.weights.tensors),
    )
    if missing := sorted(set(expected) - set(checkpoint.modules)):
        report.problems.append(f"Missing layers: {missing}")
    if extra := sorted(set(checkpoint.modules) - set(expected)):
        report.problems.append(f"Unexpected layers: {extra}")
    report.problems.extend(_check_npt_config(checkpoint))
    found = _tensors_by_file(checkpoint, report)
    wanted = _recipes_by_name(plan) if plan else {}
    checks = []
    for file, entries in found.items():
        for entry in entries:
            kind = TRAINING_STATE if file == TRAINING_STATE else "weights"
            recipe = wanted.pop((kind, entry.name), None)
            if plan is not None and recipe is None:
                report.problems.append(f"{file}: {entry.name} comes from no source")
            checks.append(TensorCheck(file, entry, recipe, digests.get(file, {}).get(entry.name)))
    missing_tensors = {name: kind for kind, name in wanted}
    for file, recorded in digests.items():
        present = {entry.name for entry in found.get(file, ())}
        missing_tensors.update({name: file for name in recorded if name not in present})
    lost_files = {f for f in missing_tensors.values() if f not in found and f != "weights"}
    report.problems.extend(f"{file} is missing" for file in sorted(lost_files))
    report.problems.extend(
        f"{name} is missing" for name, file in missing_tensors.items() if file not in lost_files
    )
    _run_checks(checks, report, progress)
    _check_shared_records(plan, report)
    _check_small_files(checkpoint, files, report)
    return report


def _run_checks(checks: Sequence[TensorCheck], report: VerifyReport, progress: Progress) -> None:
    total = sum(check.entry.nbytes for check in checks)
    progress("verifying", 0, total)
    # hashing and comparing release the interpreter lock, so threads do help
    pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1))
    try:
        for check, outcome in zip(checks, pool.map(check_tensor, checks), strict=True):
            report.problems.extend(outcome.problems)
            report.digests.setdefault(check.file, {})[check.entry.name] = outcome.digest
            report.tensors += 1
            report.bytes_read += check.entry.nbytes
            report.compared += check.recipe is not None
            report.digests_matched += check.recorded == outcome.digest
            report.crcs_matched += outcome.crcs_matched
            progress("verifying", report.bytes_read, total)
    finally:
        pool.shutdown(cancel_futures=True)


def _check_shared_records(plan: MergePlan | None, report: VerifyReport) -> None:
    """CRCs of source records that a tensor covers only in part, or in another order."""
    records: dict[Record, str] = {}
    for recipe in _recipes_by_name(plan).values() if plan else ():
        source = recipe.source
        if source is None or (recipe.is_copy and source.crc32):
            continue  # compared with its source, and its CRC with that
        whole = Record(source.file, source.offset, source.nbytes, source.crc32)
        record = source.record or whole
        if record.crc32:
            records[record] = source.name
    for record, name in records.items():
        crc = 0
        for window in record.file.windows(record.offset, record.nbytes):
            crc = zlib.crc32(window, crc)
        if crc == record.crc32:
            report.crcs_matched += 1
        else:
            report.problems.append(f"{record.file.path}: {name}: damaged, its CRC-32 differs")


def _planned_files(plan: MergePlan) -> dict[str, str]:
    """SHA-256 of each small file; of the training state, of the pickle that has its scalars."""
    found = {}
    for file in plan.files:
        holds_tensors = any(True for _ in file.pieces)
        if isinstance(file, TorchZipLayout) and holds_tensors:
            data = file.pickled
        elif not holds_tensors:
            data = b"".join(part for _, part in sorted(file.frame({})))
        else:
            continue
        found[file.name] = hashlib.sha256(data).hexdigest()
    return found


def _check_small_files(
    checkpoint: Checkpoint, expected: Mapping[str, str], report: VerifyReport
) -> None:
    """Hash what `_planned_files` hashes, as it is on the disk."""
    if checkpoint.directory is None:
        return
    for name in (SAFETENSORS_INDEX, MULTI_LAYER_STATE, CONFIG, NPT_CONFIG):
        path = checkpoint.directory / name
        if os.path.lexists(path):
            try:
                file = SourceFile.of(path)
                report.files[name] = hashlib.sha256(file.read(0, file.size)).hexdigest()
            except CheckpointError:  # reported where it was opened
                report.files[name] = "unreadable"
    for name in (PT_WEIGHTS, TRAINING_STATE):
        path = checkpoint.directory / name
        if os.path.lexists(path):
            try:
                pickled = read_torch_zip(SourceFile.of(path)).pickled
            except CheckpointError:  # reported where its content was needed
                report.files[name] = "unreadable"
                continue
            data = pickled.file.read(pickled.offset, pickled.nbytes)
            report.files[name] = hashlib.sha256(data).hexdigest()
    for name, digest in expected.items():
        if report.files.get(name) != digest:
            lost = name not in report.files
            report.problems.append(f"{name} {'is missing' if lost else 'has changed'}")


def _check_npt_config(checkpoint: Checkpoint) -> Iterator[str]:
    """Lines for layers whose ``npt_config.json`` contradicts the tensors."""
    described = (checkpoint.npt_config or {}).get("layers")
    if not isinstance(described, dict):
        return
    for layer, module in checkpoint.modules.items():
        facts = described.get(str(layer))
        for name in ("modulation", "num_ranks", "rank"):
            value = getattr(module.architecture, name)
            if not isinstance(facts, dict) or facts.get(name) != value:
                yield f"{NPT_CONFIG}: layer {layer}: {name} is not {value}, as the tensors say"


def _tensors_by_file(checkpoint: Checkpoint, report: VerifyReport) -> dict[str, list[TensorEntry]]:
    found: dict[str, list[TensorEntry]] = {}
    for entry in checkpoint.weights.tensors.values():
        found.setdefault(entry.file.path.name, []).append(entry)
    if checkpoint.directory is not None:
        try:
            state = read_training_state(checkpoint.directory / TRAINING_STATE, checkpoint.modules)
            if state is not None:
                found[TRAINING_STATE] = state.tensors()
        except CheckpointError as error:
            report.problems.append(str(error))
    return found


def _recipes_by_name(plan: MergePlan) -> dict[tuple[str, str], Recipe]:
    """All planned tensors: by kind of file, since shards may be named otherwise, and name."""
    return {
        (TRAINING_STATE if file.name == TRAINING_STATE else "weights", p.recipe.name): p.recipe
        for file in plan.files
        for p in file.pieces
    }


def _forget_cached(path: Path) -> None:
    """Drop a synced file's pages, so that what is read next comes from the disk."""
    if hasattr(os, "posix_fadvise"):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
