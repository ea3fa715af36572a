"""``npt-fast verify``"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import npt_fast as npt
from tests.checkpoints import flip_byte, layer_weights, run, trained_checkpoint, write_checkpoint


@pytest.fixture
def output(tmp_path: Path) -> Path:
    paths = [trained_checkpoint(tmp_path / str(n), n) for n in (1, 2)]
    npt.merge(paths, tmp_path / "out", verify=True)
    return tmp_path / "out"


def test_passed(capsys: Any, output: Path) -> None:
    code, out, err = run(capsys, "verify", output)
    assert (code, err) == (0, "")
    first, *block = out.splitlines()
    assert first.startswith("Read back 72 tensors") and "72 bit-equal to their sources" in first
    assert block == [
        "Verification Results:",
        "  Expected layers: [1, 2]",
        "  Found layers: [1, 2]",
        "  Checkpoint has 18 keys",
        "✓ Verification passed!",
    ]


@pytest.mark.parametrize(
    "name", ["npt_weights.pt", "training_state.pt", "config.json", "npt_config.json"]
)
def test_a_flipped_byte_is_exit_code_3(capsys: Any, output: Path, name: str) -> None:
    size = (output / name).stat().st_size
    data = (output / name).read_bytes()
    place = size // 2
    if name.endswith(".pt"):  # inside data.pkl: padding between records means nothing
        place = data.index(b"layer_1_np" if name.startswith("npt") else b"exp_avg") + 3
    flip_byte(output / name, place)
    code, out, _ = run(capsys, "verify", output)
    assert code == 3
    assert name in out
    assert "✗ Verification failed!" in out and "passed" not in out


def test_json(capsys: Any, output: Path) -> None:
    code, out, _ = run(capsys, "verify", output, "--json")
    assert code == 0
    assert json.loads(out) == json.loads(json.dumps(npt.verify(output).to_dict()))
    flip_byte(output / "config.json", 30)
    code, out, _ = run(capsys, "verify", output, "--json")
    assert code == 3
    assert json.loads(out)["passed"] is False


def test_notes_say_what_was_not_checked(capsys: Any, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "a", layer_weights(1))
    code, out, _ = run(capsys, "verify", path)
    assert code == 0
    assert "Note: no merge_summary.json" in out


def test_an_incomplete_checkpoint(capsys: Any, tmp_path: Path) -> None:
    weights = layer_weights(1)
    del weights["layer_1_np.W_a_up_up"]
    code, out, _ = run(capsys, "verify", write_checkpoint(tmp_path / "a", weights))
    assert code == 3
    assert "layer 1 is incomplete: layer_1_np.W_a_up_up is missing" in out
