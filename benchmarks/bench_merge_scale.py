"""Seconds and memory of merging by number of parameters, from 2,000 to 200,000.

``python -m benchmarks.bench_merge_scale`` (``make bench-merge-scale``) prints one table and saves
it in ``benchmarks/results``. 80 layers with num_ranks 128 have 92,160 parameters, each with three
tensors of AdamW's state. The tensors are tiny, because this measures the cost of their number.
Every step is a separate process, measured from start to exit.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from npt_fast.benchmarks.bench_merge import measure
from npt_fast.benchmarks.harness import ROOT, machine_facts, save
from npt_fast.tables import markdown_table

SIZES = ((14, 16), (18, 128), (174, 128))
"""Layers and num_ranks; triple modulation has nine parameters for each rank of a layer."""
MIB = 1 << 20

# Two checkpoints of half the layers each, and a base model that fits them.
_MAKE = """
import sys
from pathlib import Path
import torch
from tests.checkpoints import layer_weights, write_checkpoint
from tests.training import tiny
root, layers, num_ranks = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
for name, own in (("a", range(layers // 2)), ("b", range(layers // 2, layers))):
    weights = {}
    for layer in own:
        weights |= layer_weights(layer, d=8, f=8, rank=1, num_ranks=num_ranks)
    moments = {
        index: {
            "step": torch.tensor(1.0),
            "exp_avg": 0.01 * torch.randn(tensor.shape),
            "exp_avg_sq": 0.01 * torch.rand(tensor.shape),
        }
        for index, tensor in enumerate(weights.values())
    }
    group = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01,
             "amsgrad": False, "params": list(moments)}
    optimizer = {"state": moments, "param_groups": [group]}
    state = {"global_step": 1, "optimizer_state_dict": optimizer}
    write_checkpoint(root / name, weights, training_state=state)
tiny.save(root / "base", layers=layers, hidden_size=8, intermediate_size=8,
          num_attention_heads=2, num_key_value_heads=1)
"""

_IMPORT = """
import torch
import npt_fast.training.train
"""

# What `npt-fast train --resume_from` does with a checkpoint before its first step.
_RESUME = """
import sys
import torch
import npt_fast.training.train
from npt_fast.checkpoint.checkpoint import open_checkpoint
from npt_fast.hf.base_model import load_base_model
from npt_fast.hf.checkpoint import load
from npt_fast.hf.convert import components
from npt_fast.training.state import read_state, restore_optimizer
checkpoint = open_checkpoint(sys.argv[2])
saved = read_state(checkpoint)
model = load(load_base_model(sys.argv[1])[0], sys.argv[2])
parts = components(model)
optimizer = torch.optim.AdamW([p for part in parts.values() for p in part.parameters()])
fresh = restore_optimizer(optimizer, parts, saved, checkpoint)
assert not fresh and len(parts) == len(checkpoint.modules)
"""


@dataclass(frozen=True, slots=True)
class Row:
    """One step at one size: wall seconds, and peak bytes of resident memory."""

    parameters: int
    step: str
    seconds: float
    peak: int


def steps(folder: Path) -> dict[str, list[str]]:
    """The steps to measure, in the order in which they must run."""
    program = str(Path(sys.executable).with_name("npt-fast"))
    inputs = ["--checkpoints", str(folder / "a"), str(folder / "b")]
    out = str(folder / "out")
    return {
        "plan (merge --dry-run)": [program, "merge", *inputs, "--output", out, "--dry-run"],
        "merge": [program, "merge", *inputs, "--output", str(folder / "unproven")],
        "merge --verify": [program, "merge", *inputs, "--output", out, "--verify"],
        "verify": [program, "verify", out],
        "analyze": [program, "analyze", "--checkpoint", out],
        "import of the trainer alone": [sys.executable, "-c", _IMPORT],
        "resume": [sys.executable, "-c", _RESUME, str(folder / "base"), out],
    }


def run(layers: int, num_ranks: int, directory: str) -> Iterator[Row]:
    """Run all steps at one size."""
    with tempfile.TemporaryDirectory(dir=directory, prefix="npt-scale-") as name:
        folder = Path(name)
        make = [sys.executable, "-c", _MAKE, name, str(layers), str(num_ranks)]
        subprocess.run(make, cwd=ROOT, check=True, capture_output=True)
        for step, command in steps(folder).items():
            result = measure(command, cwd=ROOT)
            if result.code:
                raise RuntimeError(f"{step}: exit {result.code}: {result.stderr[-2000:]}")
            yield Row(9 * num_ranks * layers, step, result.seconds, result.peak)


def rows_table(rows: list[Row]) -> str:
    """One line for each step, one pair of columns for each size, as Markdown."""
    sizes = list(dict.fromkeys(row.parameters for row in rows))
    heads = ["", *(f"{size:,} parameters" for size in sizes)]
    body = []
    for step in dict.fromkeys(row.step for row in rows):
        own = {row.parameters: row for row in rows if row.step == step}
        cells = [f"{own[s].seconds:.1f} s, {own[s].peak / MIB:.0f} MiB" for s in sizes]
        body.append((step, *cells))
    return markdown_table(heads, body)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--directory", default="/var/tmp", help="where to work: 2 GB free")
    parser.add_argument("--sizes", type=int, default=len(SIZES), help="how many of the sizes")
    parser.add_argument("--no-save", action="store_true", help="only print")
    options = parser.parse_args()
    rows: list[Row] = []
    for layers, num_ranks in SIZES[: options.sizes]:
        for row in run(layers, num_ranks, options.directory):
            rows.append(row)
            print(f"  {row.parameters:,}: {row.step}: {row.seconds:.1f} s", file=sys.stderr)
    facts = machine_facts("torch", "numpy")
    print(rows_table(rows))
    if not options.no_save:
        text = (
            f"{rows_table(rows)}\n\nSeconds of wall time and peak resident memory of one process."
        )
        document = {"machine": facts, "rows": [asdict(row) for row in rows]}
        facts |= {"command": "`make bench-merge-scale`; each step once"}
        print(f"Saved to {save('merge-scale', 'Merging many parameters', facts, text, document)}")


if __name__ == "__main__":
    main()
