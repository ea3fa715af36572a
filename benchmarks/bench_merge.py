"""Time and memory of a merge, compared with ``cp`` and the usual ways.

``python -m benchmarks.bench_merge`` (``make bench-merge``) prints one table and saves it in
``benchmarks/results``; ``pytest benchmarks/bench_merge.py`` runs the same under pytest-benchmark.
Every run is a separate process, measured from start to exit. Rounds are interleaved, so that a busy
minute slows all rows alike. The baseline is ``cp`` of the input files and fsync of the copies,
because a merge syncs as well. The torch and safetensors rows do what users do, without fsync.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

from npt_fast.benchmarks.harness import MB, ROOT, machine_facts, save
from npt_fast.tables import markdown_table

_COPY = "cp + fsync"

# A small process in between: what a child counts as its peak memory begins with its parent's, and
# a parent may have torch loaded. The exit code of a killed child is the negative signal number.
_LAUNCHER = """
import json, os, sys, time
start = time.perf_counter()
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(pid, 0)
seconds = time.perf_counter() - start
code = os.waitstatus_to_exitcode(status)
cpu = usage.ru_utime + usage.ru_stime
os.write(3, json.dumps([code, seconds, cpu, usage.ru_maxrss * 1024]).encode())
"""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One finished process: exit code, wall and CPU seconds, peak resident bytes, output."""

    code: int
    seconds: float
    cpu: float
    peak: int
    stdout: str
    stderr: str


def measure(command: Sequence[str | Path], cwd: Path | None = None) -> Measurement:
    """Run a command (with the full path of its program) and measure that process alone."""
    reader, writer = os.pipe()
    # the shell opens descriptor 3, because subprocess cannot renumber descriptors
    script = f'exec "$@" 3>&{writer}'
    launcher = [sys.executable, "-S", "-E", "-c", _LAUNCHER, *map(str, command)]
    with open(reader, "rb") as result:
        try:
            done = subprocess.run(
                ["/bin/bash", "-c", script, "bash", *launcher],
                pass_fds=[writer], capture_output=True, text=True, cwd=cwd,
            )  # fmt: skip
        finally:
            os.close(writer)
        code, seconds, cpu, peak = json.loads(result.read())
    return Measurement(code, seconds, cpu, peak, done.stdout, done.stderr)


@dataclass(frozen=True, slots=True)
class Size:
    """A set of checkpoints to merge; `layer` holds arguments of `tests.checkpoints`."""

    name: str
    checkpoints: int
    layers_each: int
    layer: dict[str, Any]


SIZES = (
    Size("8 x 92 MB", 8, 4, {"d": 4096, "f": 14336, "rank": 256, "modulation": "single"}),
    Size("2 x 604 MB", 2, 1, {"d": 2048, "f": 8192, "rank": 512, "num_ranks": 8}),
)

_MAKE = """
import json, sys
from pathlib import Path
from safetensors.torch import save_file
from tests.checkpoints import layer_weights, write_checkpoint
root, layers_each, layer = Path(sys.argv[1]), int(sys.argv[3]), json.loads(sys.argv[4])
for index in range(int(sys.argv[2])):
    weights = {}
    for number in range(layers_each):
        weights |= layer_weights(index * layers_each + number, **layer)
    write_checkpoint(root / "pt" / f"checkpoint-{index}", weights)
    folder = root / "safetensors" / f"checkpoint-{index}"
    folder.mkdir(parents=True)
    save_file(weights, folder / "npt_weights.safetensors", metadata={"format": "pt"})
"""

_TORCH = """
import sys
import torch
merged = {}
for path in sys.argv[2:]:
    merged |= torch.load(path, weights_only=True)
torch.save(merged, sys.argv[1])
"""

_SAFETENSORS = """
import sys
from safetensors.torch import load_file, save_file
merged = {}
for path in sys.argv[2:]:
    merged |= load_file(path)
save_file(merged, sys.argv[1], metadata={"format": "pt"})
"""


@dataclass(slots=True)
class Row:
    """One way to merge, and its measurements.

    Attributes:
        size: name of the inputs.
        format: format of the inputs, ``"pt"`` or ``"safetensors"``.
        way: name of the way.
        command: command line of the process.
        seconds: wall time of each round.
        peak: largest resident memory of any round, in bytes.
    """

    size: str
    format: str
    way: str
    command: list[str]
    seconds: list[float] = field(default_factory=list)
    peak: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def make_inputs(size: Size, directory: Path) -> None:
    """Write the checkpoints in both formats, in another process so that this one stays small."""
    command = [sys.executable, "-c", _MAKE, str(directory), str(size.checkpoints)]
    command += [str(size.layers_each), json.dumps(size.layer)]
    subprocess.run(command, cwd=ROOT, check=True)
    os.sync()


def rows_of(size: Size, inputs: Path, output: Path) -> list[Row]:
    """All ways to compare for one set of inputs; each command creates the directory `output`."""
    rows = []
    for form, library, script in (
        ("pt", "torch.load + torch.save", _TORCH),
        ("safetensors", "load_file + save_file", _SAFETENSORS),
    ):
        folders = sorted((inputs / form).iterdir())
        files = [str(folder / f"npt_weights.{form}") for folder in folders]
        merge = [str(Path(sys.executable).with_name("npt-fast")), "merge", "--weights-only"]
        merge += ["--checkpoints", *map(str, folders), "--output", str(output)]
        script_copy = 'cp -r -- "$1" "$2"; sync -- "$2"/*/*'
        copy = ["/bin/bash", "-e", "-c", script_copy, "cp", str(inputs / form), str(output)]
        single = str(output / f"npt_weights.{form}")
        load = f"import os; os.mkdir({str(output)!r})\n{script}"
        rows += [
            Row(size.name, form, _COPY, copy),
            Row(size.name, form, "npt-fast merge", merge),
            Row(size.name, form, "npt-fast merge --verify", [*merge, "--verify"]),
            Row(size.name, form, library, [sys.executable, "-c", load, single, *files]),
        ]
    return rows


def run_once(row: Row, output: Path) -> Measurement:
    """One run after a sync and without an output, which is removed afterwards."""
    # or this run would pay for writing what the one before left in memory
    os.sync()
    result = measure(row.command)
    try:
        if result.code:
            raise RuntimeError(f"{row.way}: exit {result.code}: {result.stderr[-2000:]}")
        written = sum(f.stat().st_size for f in output.rglob("npt_weights.*"))
        if written < 50 * MB:
            raise RuntimeError(f"{row.way}: wrote only {written} bytes")
    finally:
        shutil.rmtree(output, ignore_errors=True)
    row.seconds.append(result.seconds)
    row.peak = max(row.peak, result.peak)
    return result


def run_rounds(rows: Sequence[Row], output: Path, rounds: int) -> None:
    """Run all rows `rounds` times, each round in a new order, so that all share disk effects."""
    for number in range(rounds):
        for row in random.Random(number).sample(rows, len(rows)):
            run_once(row, output)
        print(f"  round {number + 1} of {rounds}", file=sys.stderr)


def ratio_to_copy(row: Row, rows: Sequence[Row]) -> float:
    """Median time divided by the median of ``cp`` of the same files."""
    (copy,) = (r for r in rows if (r.size, r.format, r.way) == (row.size, row.format, _COPY))
    return row.median / copy.median


def rows_table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    heads = ("checkpoints", "format", "way", "wall s", "min", "max", "peak MB", "ratio to cp")
    body = [
        (
            row.size, row.format, row.way, f"{row.median:.2f}", f"{min(row.seconds):.2f}",
            f"{max(row.seconds):.2f}", f"{row.peak / MB:.1f}", f"{ratio_to_copy(row, rows):.2f}",
        )
        for row in rows
    ]  # fmt: skip
    return markdown_table(heads, body)


def save_results(rows: Sequence[Row], facts: dict[str, str], rounds: int) -> Path:
    """Write the table and the raw numbers; return the path of the table."""
    command = f"`make bench-merge`; medians of {rounds} interleaved rounds, warm page cache"
    lines = [
        rows_table(rows), "",
        "Wall is the whole process. `cp + fsync` copies the same input files; npt-fast syncs its",
        "output too, torch and safetensors do not. Peak is the resident memory of one process.",
    ]  # fmt: skip
    plain = [{k: v for k, v in asdict(row).items() if k != "command"} for row in rows]
    document = {"machine": facts, "rounds": rounds, "rows": plain}
    title = "Merging: wall time and memory"
    return save("merge", title, facts | {"command": command}, "\n".join(lines), document)


@pytest.fixture(scope="module", params=SIZES, ids=lambda size: size.name)
def inputs(request: pytest.FixtureRequest) -> Iterator[tuple[Size, Path]]:
    """The checkpoints of one size; on a disk, even if /tmp is a tmpfs."""
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="npt-bench-") as folder:
        make_inputs(request.param, Path(folder) / "in")
        yield request.param, Path(folder)


@pytest.mark.parametrize("index", range(8))
def test_merge_speed(benchmark: Any, inputs: tuple[Size, Path], index: int) -> None:
    """One row of the table, as pytest-benchmark sees it."""
    size, folder = inputs
    row = rows_of(size, folder / "in", folder / "out")[index]
    benchmark.group = f"merge {size.name}, {row.format}"
    benchmark.name = row.way
    benchmark.pedantic(run_once, (row, folder / "out"), rounds=3)
    benchmark.extra_info["peak_bytes"] = row.peak


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="runs of each row")
    parser.add_argument("--directory", default="/var/tmp", help="where to work: 5 GB free")
    parser.add_argument("--no-save", action="store_true", help="only print")
    options = parser.parse_args()
    rows: list[Row] = []
    for size in SIZES:
        with tempfile.TemporaryDirectory(dir=options.directory, prefix="npt-bench-") as folder:
            print(f"{size.name}: making inputs", file=sys.stderr)
            make_inputs(size, Path(folder) / "in")
            own = rows_of(size, Path(folder) / "in", Path(folder) / "out")
            run_rounds(own, Path(folder) / "out", options.rounds)
            rows += own
    stat = ["stat", "-f", "-c", "%T", options.directory]
    filesystem = subprocess.run(stat, capture_output=True, text=True).stdout.strip()
    facts = machine_facts("torch", "safetensors", "numpy")
    facts["file system"] = filesystem or "unknown"
    print("\n".join(f"{name}: {value}" for name, value in facts.items()))
    print(rows_table(rows))
    if not options.no_save:
        print(f"Saved to {save_results(rows, facts, options.rounds)}")


if __name__ == "__main__":
    main()
