"""``npt-fast merge``"""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

import npt_fast as npt
from npt_fast.checkpoint.merge_report import MergeReport
from npt_fast.cli.arguments import PathText
from npt_fast.cli.output import print_json, print_verification, progress_bar, say, size, warn
from npt_fast.config import (
    BadStatePolicy,
    ConflictPolicy,
    FileFormat,
    MergeOptions,
    WeightDType,
    parse_size,
)


def _check_size(kind: object, text: str) -> None:
    if not parse_size(text):
        raise ValueError(f"{text!r} is not a size such as 5GB or 500MB")


def merge(
    *,
    checkpoints: Annotated[list[PathText], Parameter(consume_multiple=(1, None))],
    output: PathText,
    verify: bool = False,
    force: bool = False,
    on_conflict: ConflictPolicy = "first",
    uniform: bool = False,
    dtype: WeightDType | None = None,
    format: FileFormat | None = None,
    max_shard_size: Annotated[str, Parameter(validator=_check_size)] = "5GB",
    weights_only: bool = False,
    copy_multi_layer_state: PathText | None = None,
    allow_different_base: bool = False,
    on_bad_state: BadStatePolicy = "error",
    dry_run: bool = False,
    json: bool = False,
) -> None:
    """Merge NPT checkpoints into one that can be used, verified and trained further.

    npt-fast merge --checkpoints layer11/checkpoint-800 layer13/checkpoint-600
    --output merged_11_13 --verify

    Parameters
    ----------
    checkpoints
        Checkpoint directories or weight files. PATH:11,13 or PATH:11-13 takes only those
        layers.
    output
        Directory to write. It appears complete or not at all.
    verify
        Compare every tensor with its source before the output appears; record digests.
    force
        Replace an existing checkpoint as a whole. A directory that holds anything else is never
        replaced.
    on_conflict
        When two inputs hold the same layer: take the first or the last, refuse (error), accept
        only identical ones, or join them so that their weight changes add up (concat) or
        average (mean).
    uniform
        Pad all layers, exactly, to one modulation type, num_ranks and rank, which the original
        program needs.
    dtype
        Type to convert all weights to.
    format
        Format of the weights; that of the first input if not given.
    max_shard_size
        Largest size of a safetensors file; what is larger is split into shards.
    weights_only
        Leave out optimizer, scheduler, step and curriculum.
    copy_multi_layer_state
        Take the curriculum from this multi_layer_state.pt.
    allow_different_base
        Merge although the configs name different base models.
    on_bad_state
        When the training state of an input cannot be used: refuse (error), or merge its weights
        without its state (skip).
    dry_run
        Show the plan; write nothing.
    json
        Print the report as JSON.
    """
    options = MergeOptions(
        on_conflict=on_conflict,
        uniform=uniform,
        dtype=dtype,
        format=format,
        max_shard_size=parse_size(max_shard_size),
        weights_only=weights_only,
        copy_multi_layer_state=copy_multi_layer_state,
        allow_different_base=allow_different_base,
        on_bad_state=on_bad_state,
    )
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
        return
    for note in report.notes:
        say(note)
    _print_report(report)


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
