"""Facts about the machine, and files of results, that all benchmarks share."""

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
"""Root of the checkout, or of the installed package if there is none."""
CHECKOUT = (ROOT / "pyproject.toml").exists()
RESULTS = ROOT / "benchmarks" / "results" if CHECKOUT else Path("benchmark-results")
MB = 1_000_000


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
