"""Verify a checkpoint: compare every tensor with its source, its recorded digest and its CRC-32.

`verify_plan` checks what a merge has just written, before it is published; `verify` checks a merged
checkpoint at any later time. Both run an `Examination`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from npt_fast.arguments import check_arguments
from npt_fast.checkpoint.checkpoint import Checkpoint, open_checkpoint
from npt_fast.checkpoint.digests import DIGESTS, DigestWriter
from npt_fast.checkpoint.examination import Examination, VerifyReport, file_sha256
from npt_fast.checkpoint.merge_summary import MERGE_SUMMARY, MergeSummary
from npt_fast.checkpoint.place import cached, locate, on_disk
from npt_fast.checkpoint.plan import MergePlan, plan_merge
from npt_fast.config import MergeOptions, Progress
from npt_fast.errors import CheckpointError, NPTError, OptionError
from npt_fast.hub import is_hub_name
from npt_fast.paths import path_errors


def verify_plan(
    plan: MergePlan, written: Checkpoint, digests: DigestWriter, progress: Progress
) -> VerifyReport:
    """Read what a merge wrote back from the disk, and compare it with the plan.

    Args:
        plan: plan of the merge.
        written: the written checkpoint.
        digests: writer that gets the digest of every tensor.
        progress: called as in `verify`.

    Raises:
        CheckpointError: the written checkpoint cannot be read, or a source changed.
    """
    for path in written.path.iterdir():
        # otherwise verification would read the pages that the merge left in memory, not the disk
        _forget_cached(path)
    expected = [merged.layer for merged in plan.layers]
    examination = Examination(written, expected, plan, plan.known_digests(), fresh=True)
    examination.run(progress, digests)
    examination.check_files(plan.small_digests())
    return examination.report


@check_arguments
def verify(path: str | Path, *, progress: Progress | None = None) -> VerifyReport:
    """Verify a merged checkpoint, which may have been moved since the merge.

    Args:
        path: checkpoint directory, or its name on the Hub.
        progress: called with the name of the activity, bytes done and bytes in all.

    Returns:
        The report. A checkpoint that cannot be read or is incomplete gives one that did not pass.

    Raises:
        CheckpointError: there is no checkpoint.
    """
    place = locate(path)
    try:
        checkpoint = open_checkpoint(place)
    except CheckpointError as error:
        return VerifyReport(str(place.path), [], [], 0, problems=[str(error)])
    summary = checkpoint.summary
    notes = list(checkpoint.notes)
    problems: list[str] = []
    for name, line in checkpoint.unread.items():  # without the summary nothing can be proven
        (problems if name == MERGE_SUMMARY else notes).append(line)
    plan = None
    if summary is not None:
        try:
            plan = _plan_again(checkpoint, summary)
        except (NPTError, ValueError) as error:
            notes.append(f"not compared with its sources: {error}")
    elif not problems:
        notes.append(f"no {MERGE_SUMMARY}: not written by a merge")
    problems += _dangling_links(checkpoint)
    expected = list(checkpoint.modules)
    if summary is not None and summary.merged_layers is not None:
        expected = list(summary.merged_layers)
    files = summary.files if summary else {}
    # a damaged list of digests proves nothing against the tensors
    sound = DIGESTS not in files or file_sha256(checkpoint, DIGESTS) == files[DIGESTS]
    digests = checkpoint.digests() if sound else ()
    examination = Examination(checkpoint, expected, plan, digests, fresh=False)
    report = examination.report
    examination.run(progress or (lambda activity, done, total: None))
    if not sound:
        notes.append(f"the tensors were not compared with {DIGESTS}, which has changed")
    elif summary is not None and not examination.digests_recorded:
        notes.append("no digests recorded: the merge was not made with --verify")
    examination.check_files(files)
    for name, value in (
        ("total_parameters", sum(module.numel for module in checkpoint.modules.values())),
        ("checkpoint_keys", len(checkpoint.weights.tensors)),
    ):
        if getattr(summary, name, None) not in (None, value):
            report.problems.append(f"{MERGE_SUMMARY}: {name} is not {value}")
    report.notes[:0] = notes
    report.problems[:0] = problems
    return report


def _dangling_links(checkpoint: Checkpoint) -> Iterator[str]:
    directory = checkpoint.directory
    with path_errors(checkpoint.path, CheckpointError):
        for path in sorted(directory.iterdir()) if directory else ():
            try:
                path.stat()
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                    yield f"{path}: is a broken link"


def _plan_again(checkpoint: Checkpoint, summary: MergeSummary) -> MergePlan:
    """The plan of the merge that wrote a summary, from its sources as they are now."""
    if summary.inputs is None or summary.options is None:
        raise ValueError(f"{MERGE_SUMMARY} does not record how it was made")
    base = ""
    if summary.working_directory is not None and checkpoint.directory is not None:
        place = os.path.realpath(checkpoint.directory)
        base = os.path.normpath(os.path.join(place, summary.working_directory))
    specs = []
    for path, layers in summary.inputs:
        selection = "" if layers is None else ":" + ",".join(map(str, layers))
        # relative to the current directory of the merge, not to today's
        source = cached(path) if is_hub_name(path) else os.path.join(base, path)
        specs.append(f"{source}{selection}")
    try:
        known = MergeOptions(**summary.options)
    except OptionError as error:
        raise ValueError(f"{MERGE_SUMMARY} has options of another version: {error}") from None
    # the recorded SHA-256 of headers and small files proves those; the plan is for tensors only
    plan = plan_merge(specs, replace(known, copy_multi_layer_state=None), _open_on_disk)
    if tuple(merged.layer for merged in plan.layers) != summary.merged_layers:
        raise ValueError("they hold other layers than when they were merged")
    return plan


def _open_on_disk(path: str) -> Checkpoint:
    # a file that names a repository gets no download
    return open_checkpoint(on_disk(path))


def _forget_cached(path: Path) -> None:
    """Drop a synced file from the page cache, so that it is next read from the disk."""
    if hasattr(os, "posix_fadvise"):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            # only pages that are on the disk are dropped: the files have been synced
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
