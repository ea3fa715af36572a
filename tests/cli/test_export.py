"""``npt-fast export``: what it prints, and that options arrive."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import npt_fast as npt
from tests.checkpoints import run
from tests.hf.exports import load, logits


def test_what_an_export_says(capsys: Any, files: tuple[Path, Path], tmp_path: Path) -> None:
    base, checkpoint = files
    arguments = ["export", "--checkpoint", checkpoint, "--model_name", base, "--output"]
    code, out, err = run(capsys, *arguments, tmp_path / "out", "--verify")
    note = f"nothing here tells whether the layers were trained on the weights of {base}"
    assert (code, err) == (0, f"Note: {note}\n")
    assert "✓ Verification passed!" in out
    lines = out.splitlines()
    assert "Exported layers: [1, 2]" in lines
    assert f"Output saved to: {tmp_path / 'out'}" in lines
    by_hand = npt.load(load(base), checkpoint)
    assert logits(load(tmp_path / "out")).equal(logits(by_hand))


def test_options_arrive(capsys: Any, files: tuple[Path, Path], tmp_path: Path) -> None:
    base, checkpoint = files
    arguments = ["export", "--checkpoint", checkpoint, "--model_name", base, "--json"]
    code, out, _ = run(
        capsys, *arguments, "--layers", "2", "--reference", "--output", tmp_path / "a"
    )
    assert code == 0 and [layer["layer"] for layer in json.loads(out)["layers"]] == [2]
    assert not (tmp_path / "a" / "model.safetensors").exists()
    code, out, _ = run(capsys, *arguments, "--hardlink", "--output", tmp_path / "b")
    assert code == 0 and "hard link" in json.loads(out)["ways"]


def test_mistakes_give_one_line(capsys: Any, files: tuple[Path, Path], tmp_path: Path) -> None:
    base, checkpoint = files
    arguments = ["export", "--checkpoint", checkpoint, "--output", tmp_path / "out"]
    for more, expected, problem in (
        (["--reference", "--hardlink"], 2, "Mutually exclusive"),
        (["--layers", "x"], 2, "layers"),
        (["--model_name", tmp_path / "gone"], 1, "no such folder; give the base model"),
        (["--model_name", base, "--layers", "3"], 1, "has no layer 3, only [1, 2]"),
    ):
        code, out, err = run(capsys, *arguments, *more)
        assert (code, out) == (expected, "")
        assert err.startswith("Error: ") and err.count("\n") == 1 and problem in err
    assert os.listdir(tmp_path) == []
