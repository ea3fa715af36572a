"""Measure what injections move, with controls, and print the tables of a report in Markdown.

    python examples/transfer_study.py experiments/merged_11_13_23 study > tables.md

The folder `study` gets the same as CSV, JSON, HTML and a picture. docs/transfer.md says what the
columns and controls mean; `npt-fast study` does the same for any model and suite.
"""

from __future__ import annotations

import sys
import time

import torch

import npt_fast as npt
from npt_fast.hf.base_model import load_base_model
from npt_fast.transfer.study_report import study_lines


def main() -> None:
    """Print the tables."""
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    checkpoint, output = sys.argv[1:]
    begun = time.perf_counter()
    model, tokenizer = load_base_model("smollm2-135m", checkpoints=[checkpoint])
    npt.load(model, checkpoint)
    found = npt.study(
        model, tokenizer,
        modes=["replace", "exact-blend", "exact-add"], strengths=[0.5, 1.0, 2.0], pairs=24,
        output=output, progress=lambda line: print(line, file=sys.stderr),
    )  # fmt: skip
    print(f"## NP layers {', '.join(map(str, found.layers))}\n")
    print("\n".join(study_lines(found)))
    print(f"\n{time.perf_counter() - begun:.0f} s, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
