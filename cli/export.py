"""``npt-fast export``"""

from __future__ import annotations

from typing import Annotated

from cyclopts import Group, Parameter
from cyclopts.validators import MutuallyExclusive

import npt_fast as npt
from npt_fast.cli.arguments import CheckpointText, HubRepo, Layers, PathText
from npt_fast.cli.output import (
    note,
    print_json,
    print_verification,
    progress_bar,
    say,
    size,
    warn,
)
from npt_fast.cli.push import check_push, push_written

# a reference has no weights to link
_WEIGHTS = Group("Base weights", validator=MutuallyExclusive())  # type: ignore[no-untyped-call]


def export(
    checkpoint: CheckpointText,
    *,
    output: PathText,
    model_name: PathText | None = None,
    layers: Layers = None,
    reference: Annotated[bool, Parameter(group=_WEIGHTS)] = False,
    hardlink: Annotated[bool, Parameter(group=_WEIGHTS)] = False,
    verify: bool = False,
    allow_different_base: bool = False,
    push_to_hub: HubRepo | None = None,
    json: bool = False,
) -> None:
    """Write a checkpoint and its base model as one folder for transformers and engines.

    npt-fast export --checkpoint merged_11_13 --output served

    Parameters
    ----------
    checkpoint
        Checkpoint directory, weights file, or ORG/REPO on the Hub.
    output
        Directory to write. It appears complete or not at all.
    model_name
        Base model: Hub id, folder, .gguf file, or smollm2-135m; if not given, the one that the
        checkpoint records.
    layers
        Layers to export: 11,13 or 11-15, all, upper_half or lower_half; all if not given.
    reference
        Name the base model in the folder, which then has none of its weights.
    hardlink
        Make hard links to the base model's weights instead of copies.
    verify
        Compare every tensor and file with its source before the output appears; record digests.
    allow_different_base
        Allow another base model of the same sizes than the layers were trained on.
    push_to_hub
        Repository on the Hub to push the folder to, as push does.
    json
        Print the report as JSON.
    """
    check_push(push_to_hub)
    with progress_bar() as progress:
        report = npt.export(
            checkpoint,
            output,
            model_name=model_name,
            layers=layers,
            reference=reference,
            hardlink=hardlink,
            verify=verify,
            allow_different_base=allow_different_base,
            progress=progress,
        )
    for line in report.notes:
        note(f"Note: {line}")
    for warning in report.warnings:
        warn(warning)
    if json:
        print_json(report.to_dict())
    else:
        if report.verification is not None:
            print_verification(report.verification)
            say()
        say(f"Exported layers: {[info.layer for info in report.layers]}")
        say(f"Bytes: {', '.join(f'{way} {size(n)}' for way, n in report.ways.items())}")
        say(f"Output saved to: {report.output}")
    push_written(report.output, push_to_hub)
