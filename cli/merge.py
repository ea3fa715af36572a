"""``npt-fast merge``"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from cyclopts import Parameter, Token

import npt_fast as npt
from npt_fast.checkpoint.checkpoint import open_checkpoint
from npt_fast.checkpoint.merge_report import MergeReport
from npt_fast.cli.arguments import CheckpointTexts, HubRepo, PathText
from npt_fast.cli.output import print_json, print_verification, progress_bar, say, size, warn
from npt_fast.cli.push import check_push, push_written
from npt_fast.config import (
    BadStatePolicy,  # noqa: F401  cyclopts resolves the hints of `MergeOptions` in this module
    ConflictPolicy,  # noqa: F401
    FileFormat,  # noqa: F401
    MergeOptions,
    WeightDType,  # noqa: F401
    parse_size,
)
from npt_fast.errors import MergeError
from npt_fast.pictures import figure
from npt_fast.pictures.provenance import draw_provenance


def _bytes(kind: object, tokens: Sequence[Token]) -> int:
    if size := parse_size(tokens[0].value):
        return size
    raise ValueError(f"{tokens[0].value!r} is not a size such as 5GB or 500MB")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Options(MergeOptions):
    """`MergeOptions`, with a size and a path as a command line has them."""

    max_shard_size: Annotated[
        int, Parameter(converter=_bytes, accepts_keys=False, show_default=lambda _: "5GB")
    ] = MergeOptions().max_shard_size
    copy_multi_layer_state: PathText | None = None


_DEFAULT = Options()


def merge(
    checkpoints: Annotated[CheckpointTexts, Parameter(name=("--checkpoints", "--checkpoint"))],
    *,
    output: PathText,
    options: Options = _DEFAULT,
    verify: bool = False,
    force: bool = False,
    dry_run: bool = False,
    json: bool = False,
    plot: PathText | None = None,
    push_to_hub: HubRepo | None = None,
) -> None:
    """Merge NPT checkpoints into one that can be used, verified and trained further.

    npt-fast merge --checkpoints layer11/checkpoint-800 layer13/checkpoint-600
    --output merged_11_13 --verify

    Parameters
    ----------
    checkpoints
        Checkpoint directories, weight files, or ORG/REPO on the Hub. PATH:11,13 or PATH:11-13
        takes only those layers.
    output
        Directory to write. It appears complete or not at all.
    verify
        Compare every tensor with its source before the output appears; record digests.
    force
        Replace an existing checkpoint as a whole. A directory that holds anything else is never
        replaced.
    dry_run
        Show the plan; write nothing, and download no weights.
    json
        Print the report as JSON.
    plot
        Picture to write, .png, .svg or .pdf: which checkpoints the layers come from, through
        earlier merges.
    push_to_hub
        Repository on the Hub to push the merged checkpoint to, as push does.
    """
    if push_to_hub is not None and dry_run:
        raise MergeError("--push_to_hub pushes what was merged; leave out one of them")
    check_push(push_to_hub)
    if plot is not None:
        if dry_run:
            raise MergeError("--plot draws what was merged; leave out --dry_run or --plot")
        figure.check(plot)
    with progress_bar() as progress:
        report = npt.merge(
            checkpoints,
            output,
            verify=verify,
            force=force,
            dry_run=dry_run,
            options=options,
            progress=progress,
        )
    for warning in report.warnings:
        warn(warning)
    if json:
        print_json(report.to_dict())
    else:
        for note in report.notes:
            say(note)
        _print_report(report)
    push_written(report.output, push_to_hub)
    if plot is not None:  # last: a tree may be too wide for a picture, and the merge is done
        figure.save(draw_provenance(open_checkpoint(report.output)), plot)


def _print_report(report: MergeReport) -> None:
    layers = [info.layer for info in report.layers]
    if report.verification is not None:
        print_verification(report.verification)
        say()
    say(f"{'Would merge' if report.dry_run else 'Merged'} layers: {layers}")
    say(f"Total NPT parameters: {report.total_parameters:,}")
    say("Layer sources:")
    for info in report.layers:
        step = "" if info.step is None else f", step {info.step}"
        changed = f", {info.changed} tensors changed" if info.changed else ""
        say(f"  Layer {info.layer}: {info.source}")
        say(f"    {info.architecture}{step}, optimizer {info.optimizer}{changed}")
    if report.global_step is not None:
        say(f"Training continues from step {report.global_step}")
    total = sum(report.files.values())
    ways = ", ".join(f"{way} {size(count)}" for way, count in report.ways.items())
    if report.dry_run:
        say(f"Files ({size(total)}):")
        for name, count in report.files.items():
            say(f"  {name}: {count:,} bytes")
        say(f"Expected ways: {ways}")
        enough = "enough" if report.needed_bytes <= report.free_bytes else "NOT ENOUGH"
        say(f"Disk needed: {size(report.needed_bytes)}, free: {size(report.free_bytes)} ({enough})")
        say("Nothing was written.")
        return
    say(f"Bytes: {ways} in {report.seconds:.2f} s")
    say(f"Output saved to: {report.output}")
    say(f"✓ Successfully merged {len(layers)} NPT layers!")
