"""What every benchmark's results say about the machine, and how they are written."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import npt_fast

ROOT = Path(__file__).resolve().parent.parent
"""Of the checkout; of the installed package where there is none."""
CHECKOUT = (ROOT / "pyproject.toml").exists()
RESULTS = ROOT / "benchmarks" / "results" if CHECKOUT else Path("benchmark-results")
MB = 1_000_000


def machine_facts(*packages: str) -> dict[str, str]:
    """What a reader needs to judge the numbers, with the versions of `packages`."""
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
    """Of the checkout; NPT_COMMIT says it where there is no git."""
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
    """Write ``<name>-<machine>.md`` and the raw numbers beside it; gives the path of the former.

    Args:
        name: of the benchmark.
        title: first line.
        facts: about the machine and the run.
        text: tables.
        document: what goes to the JSON file.
        machine: the fact that names what was measured.
        directory: where to.
    """
    path = result_path(name, facts[machine], directory)
    directory.mkdir(parents=True, exist_ok=True)
    lines = [f"# {title}", "", *(f"- {key}: {value}" for key, value in facts.items()), "", text]
    _replace(path, "\n".join(lines))
    _replace(path.with_suffix(".json"), json.dumps(document, indent=1))
    return path


def result_path(name: str, machine: str, directory: Path) -> Path:
    """Where the tables of a benchmark are kept for a machine of that name."""
    slug = re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")
    return directory / f"{name}-{slug}.md"


def _replace(path: Path, text: str) -> None:
    """In one step: whoever is ended in between leaves the file as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text + "\n")
    temporary.replace(path)
