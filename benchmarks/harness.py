"""What every benchmark's results say about the machine, and how they are written."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
MB = 1_000_000


def machine_facts(*packages: str) -> dict[str, str]:
    """What a reader needs to judge the numbers, with the versions of `packages`."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    model = re.search(r"model name\s*:\s*(.+)", text)
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    facts = {
        "date": date.today().isoformat(),
        "commit": commit or "unknown",
        "cpu": model[1] if model else platform.machine(),
        "cores": str(os.cpu_count()),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }
    for package in packages:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    return facts


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
    slug = re.sub(r"[^a-z0-9]+", "-", facts[machine].lower()).strip("-")
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}-{slug}.md"
    lines = [f"# {title}", "", *(f"- {key}: {value}" for key, value in facts.items()), "", text]
    path.write_text("\n".join(lines) + "\n")
    path.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    return path
