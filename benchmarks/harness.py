"""Facts about the machine, and files of results, that all benchmarks share."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import npt_fast

ROOT = Path(__file__).resolve().parent.parent
"""Root of the checkout, or of the installed package if there is none."""
CHECKOUT = (ROOT / "pyproject.toml").exists()
RESULTS = ROOT / "benchmarks" / "results" if CHECKOUT else Path("benchmark-results")
MB = 1_000_000


Found = TypeVar("Found")


class Timed(NamedTuple):
    """Seconds of each round, and those of the baseline right before it."""

    seconds: list[float]
    baseline: list[float]

    def ratios(self) -> tuple[float, float, float]:
        """Median, minimum and maximum of the rounds' ratios to the baseline."""
        found = [own / other for own, other in zip(*self, strict=True)]
        return statistics.median(found), min(found), max(found)


def time_in_turn(
    baseline: Callable[[], object], runs: Mapping[str, Callable[[], object]], rounds: int
) -> dict[str, Timed]:
    """Time functions, each directly after the baseline, in rounds after one that warms up."""
    found = {name: Timed([], []) for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            begun = time.perf_counter()
            baseline()
            between = time.perf_counter()
            run()
            if number:
                found[name].baseline.append(between - begun)
                found[name].seconds.append(time.perf_counter() - between)
        print(f"  round {number} of {rounds}", file=sys.stderr)
    return found


def report(
    description: str | None,
    measure: Callable[[int], Found],
    table: Callable[[Found], str],
    save_results: Callable[[Found, int], Path],
) -> None:
    """The command of a benchmark: measure some rounds, print the table and save it."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="rounds, in which each way runs once")
    parser.add_argument("--no-save", action="store_true", help="only print")
    options = parser.parse_args()
    found = measure(options.rounds)
    print(table(found))
    if not options.no_save:
        print(f"Saved to {save_results(found, options.rounds)}")


def machine_facts(*packages: str) -> dict[str, str]:
    """Facts that a reader needs to judge the numbers, with the versions of `packages`."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    model = re.search(r"model name\s*:\s*(.+)", text)
    facts = {
        "date": date.today().isoformat(),
        "commit": _commit(),
        "cpu": model[1] if model else platform.machine(),
        "cores": str(os.cpu_count()),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "npt_fast": npt_fast.__version__,
    }
    for package in packages:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    return facts


def _commit() -> str:
    """Commit of the checkout; NPT_COMMIT overrides it, for machines without git."""
    told = os.environ.get("NPT_COMMIT", "")
    if told or not (ROOT / ".git").exists() or shutil.which("git") is None:
        return told or "unknown"
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"


def save(
    name: str,
    title: str,
    facts: Mapping[str, str],
    text: str,
    document: Mapping[str, Any],
    *,
    machine: str = "cpu",
    directory: Path = RESULTS,
) -> Path:
    """Write ``<name>-<machine>.md``, and the raw numbers as JSON next to it.

    Args:
        name: name of the benchmark.
        title: first line of the tables' file.
        facts: facts about the machine and the run.
        text: tables in Markdown.
        document: content of the JSON file.
        machine: key of the fact that names the measured device.
        directory: folder to write to.

    Returns:
        The path of the tables.
    """
    path = result_path(name, facts[machine], directory)
    directory.mkdir(parents=True, exist_ok=True)
    lines = [f"# {title}", "", *(f"- {key}: {value}" for key, value in facts.items()), "", text]
    _replace(path, "\n".join(lines))
    _replace(path.with_suffix(".json"), json.dumps(document, indent=1))
    return path


def result_path(name: str, machine: str, directory: Path) -> Path:
    """Path of a benchmark's tables for a machine of that name."""
    slug = re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")
    return directory / f"{name}-{slug}.md"


def _replace(path: Path, text: str) -> None:
    """Replace the file in one step, so that an interrupted run leaves the old one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text + "\n")
    temporary.replace(path)
