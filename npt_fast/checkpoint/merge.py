"""Carry out a merge: copy ranges, build the rest, prove it, publish it in one step."""

from __future__ import annotations

import errno
import os
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from npt_fast.checkpoint import strict_json
from npt_fast.checkpoint.byte_mover import ByteMover, write_all
from npt_fast.checkpoint.checkpoint import MERGE_SUMMARY, Checkpoint
from npt_fast.checkpoint.layout import OutputFile, Piece
from npt_fast.checkpoint.plan import MergedLayer, MergePlan, plan_merge
from npt_fast.checkpoint.publish import StagedDirectory
from npt_fast.checkpoint.source_file import filesystem_type
from npt_fast.checkpoint.verify import VerifyReport, layer_digest, verify_plan
from npt_fast.config import MergeOptions
from npt_fast.errors import MergeError, StorageError, VerificationError

_REFLINK_FILESYSTEMS = ("xfs", "btrfs", "bcachefs", "ocfs2")
_SLACK = 1 << 20  # for directory blocks and the summary
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One layer of a merged checkpoint.

    Attributes:
        layer: index.
        source: input it came from; several joined by `` + ``.
        step: optimizer steps it was trained for, where known.
        modulation: ``"single"``, ``"dual"`` or ``"triple"``.
        num_ranks: components per projection.
        rank: bottleneck of each.
        parameters: number of weights.
        changed: tensors that are not plain copies.
        optimizer: ``"kept"``, ``"fresh"``, ``"partly fresh"``, or ``"left out"``.
    """

    layer: int
    source: str
    step: int | None
    modulation: str
    num_ranks: int
    rank: int
    parameters: int
    changed: int
    optimizer: str


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What a merge did, or, for a dry run, would do.

    Attributes:
        output: the merged checkpoint.
        layers: its layers.
        total_parameters: number of weights.
        checkpoint_keys: number of weight tensors.
        global_step: step that training continues from; None without training state.
        files: bytes of each written file.
        ways: bytes by the way they took (`byte_mover.WAYS`, ``computed``, ``headers``); for a dry
            run by the way they are expected to take.
        free_bytes: space on the target's file system before the merge.
        needed_bytes: space the output takes there; cloned blocks take none.
        seconds: wall time.
        warnings: lines for the user.
        notes: lines for the user that need no attention.
        dry_run: whether nothing was written.
        verification: the proof, if one was asked for.
    """

    output: str
    layers: list[LayerReport]
    total_parameters: int
    checkpoint_keys: int
    global_step: int | None
    files: dict[str, int]
    ways: dict[str, int]
    free_bytes: int
    needed_bytes: int
    seconds: float
    warnings: list[str]
    notes: list[str]
    dry_run: bool = False
    verification: VerifyReport | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def merge(
    checkpoints: Sequence[str | Path],
    output: str | Path,
    *,
    verify: bool = False,
    force: bool = False,
    dry_run: bool = False,
    options: MergeOptions | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> MergeReport:
    """Merge NPT checkpoints into one.

    Args:
        checkpoints: checkpoint directories or weight files; ``"A:11,13"`` takes those layers of A.
        output: directory to write; it appears complete or not at all.
        verify: compare every tensor with its source before the output appears, and record digests.
        force: replace an existing output directory, whole.
        dry_run: decide and check everything, write nothing.
        options: how to merge; the guide's rules when not given.
        progress: called with what is being done, bytes done and bytes in all.

    Raises:
        CheckpointError: an input cannot be read, or changes while it is read.
        MergeError: the inputs do not fit together, or the output is in the way.
        StorageError: the disk is full, or would be.
        VerificationError: the output would not equal its sources; nothing was published.
    """
    started = time.monotonic()
    options = options or MergeOptions()
    target = Path(output)
    plan = plan_merge([str(path) for path in checkpoints], options)
    check_target(target, [item.checkpoint for item in plan.inputs], force=force)
    expected, free, needed = _space(plan, target)
    if dry_run:
        return _report(plan, target, expected, free, needed, started, dry_run=True)
    if needed > free:
        raise StorageError(
            f"{target}: {needed:,} bytes needed, {free:,} free on its file system"
        )
    report_progress = progress or (lambda activity, done, total: None)
    with _disk_errors(target), StagedDirectory(target, replace=force) as staged:
        ways = _write_files(plan, staged.path, report_progress)
        proof = None
        if verify:
            proof = verify_plan(plan, staged.path, report_progress)
            if not proof.passed:
                raise VerificationError(
                    f"{target}: not written, since it would differ from its sources", proof.problems
                )
        summary = strict_json.dump(_summary(plan, proof))
        _write_bytes(staged.path / MERGE_SUMMARY, summary)
        strict_json.read_object(staged.path / MERGE_SUMMARY)
        ways["headers"] += len(summary)
        staged.publish()
        if proof is not None:
            proof.path = str(target)
    return _report(plan, target, ways, free, needed, started, proof=proof)


def check_target(target: Path, inputs: Sequence[Checkpoint], *, force: bool) -> None:
    """Raise MergeError if the output may not be put at `target`."""
    real = Path(os.path.realpath(target))
    for checkpoint in inputs:
        source = Path(os.path.realpath(checkpoint.path))
        files = [Path(os.path.realpath(file.path)) for file in checkpoint.weights.files]
        if source == real or source in real.parents or _same_file(source, real):
            raise MergeError(
                f"{target}: is, or lies in, the input {checkpoint.given}; choose another --output"
            )
        if any(real == path or real in path.parents for path in [source, *files]):
            raise MergeError(
                f"{target}: contains the input {checkpoint.given}; choose another --output"
            )
    if not os.path.lexists(target):
        return
    if not force:
        raise MergeError(f"Output path already exists: {target}. Use --force to overwrite.")
    if not target.is_dir():
        raise MergeError(f"{target}: is not a directory; --force replaces checkpoints only")
    folder = next((entry for entry in target.iterdir() if entry.is_dir()), None)
    if folder is not None:
        raise MergeError(
            f"{target}: holds the folder {folder.name}, so it is no checkpoint; "
            "--force replaces checkpoints only"
        )


def _same_file(a: Path, b: Path) -> bool:
    return any(p.exists() and a.exists() and p.samefile(a) for p in (b, *b.parents))


def _space(plan: MergePlan, target: Path) -> tuple[dict[str, int], int, int]:
    """Expected ways, free bytes and needed bytes on the target's file system."""
    parent = next(p for p in Path(os.path.realpath(target)).parents if p.exists())
    device = parent.stat().st_dev
    can_clone = filesystem_type(parent) in _REFLINK_FILESYSTEMS and all(
        file.identity.device == device
        for item in plan.inputs
        for file in item.checkpoint.weights.files
    )
    kinds = plan.bytes_by_kind()
    cloned = kinds["cloneable"] if can_clone else 0
    expected = {
        "reflink": cloned,
        "copy_file_range": kinds["cloneable"] + kinds["copied"] - cloned,
        "computed": kinds["computed"],
        "headers": plan.total_bytes - sum(kinds.values()),
    }
    status = os.statvfs(parent)
    return expected, status.f_bavail * status.f_frsize, plan.total_bytes - cloned + _SLACK


@contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise StorageError(f"{target}: {error.strerror}; nothing was written") from None
        where = error.filename or target
        raise MergeError(f"{where}: {error.strerror or error}; nothing was written") from None


def _write_files(
    plan: MergePlan, directory: Path, progress: Callable[[str, int, int], None]
) -> Counter[str]:
    total = plan.total_bytes
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress("merging", done, total)

    mover = ByteMover(advance)
    advance(0)
    for file in plan.files:
        fd = os.open(directory / file.name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            os.ftruncate(fd, file.size)
            crcs = _write_pieces(file.pieces, fd, mover, advance)
            for offset, data in file.frame(crcs):
                write_all(fd, data, offset)
                mover.moved["headers"] += len(data)
                advance(len(data))
            os.fsync(fd)
        finally:
            os.close(fd)
    return mover.moved


def _write_pieces(
    pieces: Sequence[Piece], fd: int, mover: ByteMover, advance: Callable[[int], None]
) -> dict[str, int]:
    """Write all tensor data of a file; CRC-32s of what passed through memory."""
    crcs: dict[str, int] = {}
    for run in _runs(pieces):
        recipe = run[0].recipe
        if recipe.is_copy and recipe.source is not None:
            file, start = recipe.source.file, recipe.source.offset
            length = run[-1].offset + run[-1].recipe.nbytes - run[0].offset
            with file.open() as source_fd:
                mover.move(file, source_fd, start, length, fd, run[0].offset)
            continue
        offset, crc = run[0].offset, 0
        for window in recipe.windows():
            write_all(fd, window, offset)
            offset += len(window)
            crc = zlib.crc32(window, crc)
            mover.moved["computed"] += len(window)
            advance(len(window))
        crcs[recipe.name] = crc
    return crcs


def _runs(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Pieces grouped so that each group is one range in one source and in the output."""
    run: list[Piece] = []
    for piece in pieces:
        if run and not _continues(run[-1], piece):
            yield run
            run = []
        run.append(piece)
    if run:
        yield run


def _continues(last: Piece, piece: Piece) -> bool:
    a, b = last.recipe.source, piece.recipe.source
    return (
        a is not None
        and b is not None
        and last.recipe.is_copy
        and piece.recipe.is_copy
        and a.file == b.file
        and a.offset + a.nbytes == b.offset
        and last.offset + a.nbytes == piece.offset
    )


def _write_bytes(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        write_all(fd, data, 0)
        os.fsync(fd)
    finally:
        os.close(fd)


def _summary(plan: MergePlan, proof: VerifyReport | None) -> dict[str, Any]:
    """The content of ``merge_summary.json``: the original's keys first, then ours (SPEC 2.6)."""
    digests: dict[str, dict[str, str]] = proof.digests if proof else plan.known_digests()
    weight_digests = {
        name: digest
        for file, tensors in digests.items()
        if file.startswith("npt_weights")
        for name, digest in tensors.items()
    }
    return {
        "merged_layers": [merged.layer for merged in plan.layers],
        "layer_sources": {str(merged.layer): merged.source for merged in plan.layers},
        "total_parameters": sum(recipe.numel for recipe in plan.weights),
        "checkpoint_keys": len(plan.weights),
        "layers": {
            str(merged.layer): _provenance(merged, weight_digests) for merged in plan.layers
        },
        "inputs": [
            {
                "path": item.checkpoint.given,
                "layers": list(item.layers) if item.selected else None,
            }
            for item in plan.inputs
        ],
        "options": {
            name: str(value) if isinstance(value, Path) else value
            for name, value in asdict(plan.options).items()
        },
        "tensors": digests,
        "files": proof.files if proof else {},
    }


def _provenance(merged: MergedLayer, digests: dict[str, str]) -> dict[str, Any]:
    def chain(index: int) -> list[str]:
        record = merged.parts[index].origin.checkpoint.record(merged.layer)
        return [record.source, *record.chain] if record.source else []

    facts: dict[str, Any] = {
        "step": merged.step,
        "source": merged.source,
        "chain": chain(0),
        "digest": layer_digest(merged.architecture.names(merged.layer), digests),
    }
    if len(merged.parts) > 1:
        facts["parts"] = [
            {
                "source": part.origin.checkpoint.given,
                "step": part.origin.step(merged.layer),
                "chain": chain(index),
                "num_ranks": part.module.architecture.num_ranks,
                "divisor": merged.divisor,
            }
            for index, part in enumerate(merged.parts)
        ]
    return facts


def _report(
    plan: MergePlan,
    target: Path,
    ways: dict[str, int],
    free: int,
    needed: int,
    started: float,
    *,
    dry_run: bool = False,
    proof: VerifyReport | None = None,
) -> MergeReport:
    layers = []
    for merged in plan.layers:
        names = set(merged.architecture.names(merged.layer))
        recipes = [recipe for recipe in plan.weights if recipe.name in names]
        layers.append(
            LayerReport(
                layer=merged.layer,
                source=merged.source,
                step=merged.step,
                modulation=merged.architecture.modulation,
                num_ranks=merged.architecture.num_ranks,
                rank=merged.architecture.rank,
                parameters=sum(recipe.numel for recipe in recipes),
                changed=sum(not recipe.is_copy for recipe in recipes),
                optimizer="left out" if plan.base is None else merged.optimizer(),
            )
        )
    return MergeReport(
        output=str(target),
        layers=layers,
        total_parameters=sum(recipe.numel for recipe in plan.weights),
        checkpoint_keys=len(plan.weights),
        global_step=plan.base.global_step if plan.base else None,
        files={file.name: file.size for file in plan.files},
        ways={way: count for way, count in ways.items() if count},
        free_bytes=free,
        needed_bytes=needed,
        seconds=round(time.monotonic() - started, 3),
        warnings=list(plan.warnings),
        notes=list(plan.notes),
        dry_run=dry_run,
        verification=proof,
    )
