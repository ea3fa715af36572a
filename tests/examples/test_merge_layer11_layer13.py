"""The convenience script, as a user runs it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "examples" / "merge_layer11_layer13.sh"


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", SCRIPT, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )


def sources(folder: Path) -> dict[str, str]:
    summary = json.loads((folder / "merge_summary.json").read_text())
    return dict(summary["layer_sources"])


def test_the_newest_checkpoint_is_the_highest_step(
    tmp_path: Path, layer11: Path, layer13: Path
) -> None:
    """10000 comes after 9000, though not in the alphabet; with or without checkpoints/."""
    for step in (9000, 10000):
        shutil.copytree(layer11, tmp_path / "run11" / "checkpoints" / f"checkpoint-{step}")
    shutil.copytree(layer13, tmp_path / "run13" / "checkpoint-600")
    done = run(tmp_path, "run11", "run13")
    assert done.returncode == 0, done.stderr
    assert "✓ Verification passed!" in done.stdout
    assert sources(tmp_path / "experiments" / "merged_layer11_13") == {
        "11": "run11/checkpoints/checkpoint-10000",
        "13": "run13/checkpoint-600",
    }


def test_checkpoints_and_output_can_be_named(tmp_path: Path, layer11: Path, layer13: Path) -> None:
    assert run(tmp_path, str(layer11), str(layer13), "out").returncode == 0
    assert sources(tmp_path / "out") == {"11": str(layer11), "13": str(layer13)}
    again = run(tmp_path, str(layer11), str(layer13), "out")
    assert again.returncode == 1 and "Use --force to overwrite" in again.stderr


def test_what_is_wrong_is_said(tmp_path: Path, layer11: Path) -> None:
    assert run(tmp_path).returncode == 2
    (tmp_path / "empty").mkdir()
    done = run(tmp_path, str(layer11), "empty")
    assert done.returncode == 1 and "neither a checkpoint nor a run" in done.stderr
    assert not (tmp_path / "experiments").exists()
