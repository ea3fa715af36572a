"""``npt-fast verify``"""

from __future__ import annotations

import npt_fast as npt
from npt_fast.cli.arguments import CheckpointText
from npt_fast.cli.output import print_json, print_verification, progress_bar


def verify(checkpoint: CheckpointText, *, json: bool = False) -> int:
    """Check every tensor of a merged checkpoint: digests, CRCs, values, and sources if they exist.

    npt-fast verify experiments/merged_11_13

    Parameters
    ----------
    checkpoint
        Merged checkpoint, or a copy of one; or ORG/REPO on the Hub.
    json
        Print the report as JSON.
    """
    with progress_bar() as progress:
        report = npt.verify(checkpoint, progress=progress)
    if json:
        print_json(report.to_dict())
    else:
        print_verification(report)
    return 0 if report.passed else 3
