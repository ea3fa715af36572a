"""Carry out a merge: copy or compute all tensors, verify them, publish the output."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npt_fast import paths
from npt_fast.arguments import check_arguments, check_names
from npt_fast.checkpoint import strict_json
from npt_fast.checkpoint.byte_mover import ByteMover, write_all
from npt_fast.checkpoint.checkpoint import Checkpoint, open_checkpoint
from npt_fast.checkpoint.digests import DigestWriter
from npt_fast.checkpoint.hub_headers import HubHeaders
from npt_fast.checkpoint.layout import BytesFile, OutputFile, Piece, runs
from npt_fast.checkpoint.merge_report import MergeReport, report_of, summary_of
from npt_fast.checkpoint.merge_summary import MERGE_SUMMARY
from npt_fast.checkpoint.own_files import is_checkpoint_file
from npt_fast.checkpoint.plan import MergePlan, plan_merge
from npt_fast.checkpoint.publish import StagedDirectory, disk_errors
from npt_fast.checkpoint.read_back import read_back, read_back_records
from npt_fast.checkpoint.source_file import filesystem_type
from npt_fast.checkpoint.tensor_source import WEIGHTS
from npt_fast.config import MergeOptions, Progress
from npt_fast.errors import MergeError, StorageError, VerificationError
from npt_fast.paths import path_errors, path_list, user_path

if TYPE_CHECKING:
    from npt_fast.checkpoint.examination import VerifyReport

# for estimates only: while it copies, a merge tries a reflink on every file system
_REFLINK_FILESYSTEMS = ("xfs", "btrfs", "bcachefs", "ocfs2")
_SLACK = 1 << 20  # bytes for directory blocks and the summary


@check_arguments
def merge(
    checkpoints: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    verify: bool = False,
    force: bool = False,
    dry_run: bool = False,
    options: MergeOptions | None = None,
    progress: Progress | None = None,
    **fields: Any,
) -> MergeReport:
    """Merge NPT checkpoints into one.

    Args:
        checkpoints: checkpoint directories, weights files or names on the Hub, or a single one;
            ``"A:11,13"`` takes only these layers of A.
        output: directory to write; it appears complete or not at all.
        verify: whether to compare every tensor with its source before the output appears, and to
            record digests.
        force: whether to replace an existing checkpoint as a whole. A directory that is no
            checkpoint, or holds other files too, is never replaced.
        dry_run: whether to plan and check everything, but write nothing, and download no weights.
        options: how to merge; default options if not given.
        progress: called with the name of the activity, bytes done and bytes in all.
        fields: fields of `MergeOptions`, such as ``on_conflict="mean"``, which win over `options`.

    Returns:
        The report of what was done, or would be done.

    Raises:
        CheckpointError: an input cannot be read or changes while it is read; or the output could
            not be read back and was not published.
        MergeError: the inputs do not fit together, or something is in the place of the output.
        OptionError: an argument has a value that is not allowed, or an unknown name.
        PathError: the output or an input is not a valid path.
        StorageError: the disk is full or would become full.
        VerificationError: the output differs from its sources and was not published.
    """
    started = time.monotonic()
    own = ("verify", "force", "dry_run", "options", "progress")
    check_names(fields, [*MergeOptions.__dataclass_fields__, *own], "merge")
    options = replace(options or MergeOptions(), **fields)
    target = user_path(output)
    inputs = path_list(checkpoints)

    def planned(
        open: Callable[[str], Checkpoint],
    ) -> tuple[MergePlan, dict[str, int], int, int]:
        plan = plan_merge(inputs, options, open)
        with path_errors(target, MergeError):
            check_target(target, [item.checkpoint for item in plan.inputs], force=force)
            return plan, *space(plan, target)

    with HubHeaders() as hub:  # what cannot be merged is not downloaded
        plan, expected, free, needed = planned(hub.open)
        if dry_run:
            return report_of(plan, target, expected, free, needed, started, dry_run=True)
    if hub.names:
        plan, _, free, needed = planned(open_checkpoint)
    require_space(target, needed, free)
    report_progress = progress or (lambda activity, done, total: None)
    with disk_errors(target, MergeError), StagedDirectory(target, replace=force) as staged:
        mover = write_files(plan, staged, report_progress)
        written = read_back(staged.path, target)
        digests, proof = prove(plan, written, staged, target, report_progress, verify=verify)
        summary = strict_json.dump(summary_of(plan, target, digests).to_dict())
        write_file(BytesFile(MERGE_SUMMARY, summary), staged, mover, lambda count: None)
        read_back_records(staged.path, target)
        # checked again: during a long merge, other files may have been put there
        if force and paths.exists(target):
            check_replaced(target)
        staged.publish()
        if proof is not None:
            proof.path = str(target)
    report = report_of(plan, target, mover.moved, free, needed, started, proof=proof)
    report.warnings.extend(
        f"{left}: was not removed: it belongs to another merge that may be running or to another "
        "user, or nothing proves that a merge left it there"
        for left in staged.left
    )
    return report


def prove(
    plan: MergePlan,
    written: Checkpoint,
    staged: StagedDirectory,
    target: Path,
    progress: Progress,
    *,
    verify: bool,
) -> tuple[DigestWriter, VerifyReport | None]:
    """Compare what was written with its sources if `verify`, and record the digests that are known.

    Raises:
        VerificationError: the output differs from its sources.
    """
    proof: VerifyReport | None = None
    with DigestWriter(staged.open) as digests:
        if verify:
            # imported here, so that a merge without verification starts faster
            from npt_fast.checkpoint.verify import verify_plan

            proof = verify_plan(plan, written, digests, progress)
            if not proof.passed:
                raise VerificationError(f"{target}: not written", proof.problems)
        else:
            for digest in plan.known_digests():
                digests.add(*digest)
    return digests, proof


def check_target(target: Path, inputs: Sequence[Checkpoint], *, force: bool) -> None:
    """Raise MergeError if the output must not be written to `target`."""
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
    above = next(folder for folder in real.parents if folder.exists())
    if not above.is_dir():
        raise MergeError(f"{target}: {above} is not a directory; nothing was written")
    if paths.exists(target):
        if not force:
            raise MergeError(f"Output path already exists: {target}. Use --force to overwrite.")
        check_replaced(target)


def check_replaced(target: Path) -> None:
    """Raise MergeError unless `target` is an empty directory or holds nothing but a checkpoint."""
    if not paths.is_directory(target):
        raise MergeError(f"{target}: is not a directory; --force replaces checkpoints only")
    names = sorted(os.listdir(target))
    foreign = [n for n in names if not is_checkpoint_file(n) or paths.is_directory(target / n)]
    if names and not set(WEIGHTS) & set(names):
        holds = f", but {_listed(foreign)}" if foreign else ""
        raise MergeError(
            f"{target}: holds no NPT weights{holds}, so it is no checkpoint; "
            "--force replaces checkpoints only: choose another --output"
        )
    if foreign:
        raise MergeError(
            f"{target}: holds {_listed(foreign)} beside the checkpoint, which --force would "
            "delete: move that away, or choose another --output"
        )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _same_file(a: Path, b: Path) -> bool:
    return any(p.exists() and a.exists() and p.samefile(a) for p in (b, *b.parents))


def space(plan: MergePlan, target: Path) -> tuple[dict[str, int], int, int]:
    """Expected bytes by way, and free and needed bytes on the target's file system."""
    parent = next(p for p in Path(os.path.realpath(target)).parents if p.exists())
    kinds = plan.bytes_by_kind()
    cloned = kinds["cloneable"] if _can_clone(plan, parent) else 0
    expected = {
        "reflink": cloned,
        "copy_file_range": kinds["cloneable"] + kinds["copied"] - cloned,
        "computed": kinds["computed"],
        "headers": plan.total_bytes - sum(kinds.values()),
    }
    status = os.statvfs(parent)
    return expected, status.f_bavail * status.f_frsize, plan.total_bytes - cloned + _SLACK


def require_space(target: Path, needed: int, free: int) -> None:
    """Raise StorageError unless the bytes that `target` needs are free."""
    if needed > free:
        raise StorageError(f"{target}: {needed:,} bytes needed, {free:,} free on its file system")


def _can_clone(plan: MergePlan, directory: Path) -> bool:
    """Whether files in `directory` can probably share blocks with the inputs."""
    device = directory.stat().st_dev
    return filesystem_type(directory) in _REFLINK_FILESYSTEMS and all(
        file.identity.device == device
        for item in plan.inputs
        for file in item.checkpoint.weights.files
    )


def write_files(plan: MergePlan, staged: StagedDirectory, progress: Progress) -> ByteMover:
    """Write and sync the files of a plan; the result has counted their bytes."""
    total = plan.total_bytes
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress("merging", done, total)

    mover = ByteMover(advance, reserve=not _can_clone(plan, staged.path))
    advance(0)
    for file in plan.files:
        write_file(file, staged, mover, advance)
    return mover


def write_file(
    file: OutputFile, staged: StagedDirectory, mover: ByteMover, advance: Callable[[int], None]
) -> None:
    """Write and sync one file."""
    fd = staged.open(file.name)
    try:
        mover.start_file(fd, file.size)
        crcs = _write_pieces(file.pieces, fd, mover, advance)
        # last, since the headers of a zip hold the CRCs of tensors that were computed just now
        for offset, data in file.frame(crcs):
            write_all(fd, data, offset)
            mover.moved["headers"] += len(data)
            advance(len(data))
        # before the rename that publishes it, or a crash could leave a name without the data
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_pieces(
    pieces: Iterable[Piece], fd: int, mover: ByteMover, advance: Callable[[int], None]
) -> dict[str, int]:
    """Write all tensor data of a file; returns the CRC-32 of each computed tensor."""
    crcs: dict[str, int] = {}
    for run in runs(pieces):
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
