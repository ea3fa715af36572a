"""``npt-fast merge``: the guide's commands, what they print, and that options arrive."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import npt_fast as npt
from tests.checkpoints import (
    flip_byte,
    layer_weights,
    multi_layer_state,
    offset_of,
    read_weights,
    run,
    trained_checkpoint,
    write_checkpoint,
)

GUIDE = """\
Verification Results:
  Expected layers: [11, 13]
  Found layers: [11, 13]
  Checkpoint has 144 keys
✓ Verification passed!
"""


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    return [
        trained_checkpoint(tmp_path / "a", 11, steps=3),
        trained_checkpoint(tmp_path / "b", 13, steps=5),
    ]


def test_the_guides_block_to_the_letter(capsys: Any, tmp_path: Path) -> None:
    """Triple, 8 ranks: 72 tensors a layer, 144 in all, as in the guide."""
    paths = [write_checkpoint(tmp_path / str(n), layer_weights(n, num_ranks=8)) for n in (11, 13)]
    code, out, _ = run(
        capsys, "merge", "--checkpoints", *paths, "--output", tmp_path / "out", "--verify"
    )
    assert code == 0
    assert GUIDE in out
    code, out, _ = run(capsys, "verify", tmp_path / "out")
    assert code == 0
    assert out.endswith(GUIDE)


def test_what_a_merge_says(capsys: Any, pair: list[Path], tmp_path: Path) -> None:
    code, out, err = run(capsys, "merge", "--checkpoints", *pair, "--output", tmp_path / "out")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    total = sum(tensor.numel() for tensor in read_weights(tmp_path / "out").values())
    for line in (
        "Merged layers: [11, 13]",
        f"Total NPT parameters: {total:,}",
        "Layer sources:",
        f"  Layer 11: {pair[0]}",
        f"  Layer 13: {pair[1]}",
        "    triple, num_ranks 1, rank 4, step 3, optimizer kept",
        "Training continues from step 5",
        f"Output saved to: {tmp_path / 'out'}",
        "✓ Successfully merged 2 NPT layers!",
    ):
        assert line in lines
    assert "Verification" not in out


def test_a_conflict_warns_and_goes_on(capsys: Any, tmp_path: Path) -> None:
    paths = [trained_checkpoint(tmp_path / name, 11) for name in "ab"]
    code, out, err = run(capsys, "merge", "--checkpoints", *paths, "--output", tmp_path / "out")
    assert code == 0
    assert err.startswith("Warning: Layer 11 already exists") and err.count("\n") == 1
    assert "already exists" not in out


def test_a_fresh_layer_is_reported(capsys: Any, tmp_path: Path) -> None:
    paths = [
        trained_checkpoint(tmp_path / "a", 1),
        write_checkpoint(tmp_path / "b", layer_weights(2)),
    ]
    _, out, _ = run(capsys, "merge", "--checkpoints", *paths, "--output", tmp_path / "out")
    assert "optimizer kept" in out and "optimizer fresh" in out


SPELLINGS = {
    "kebab": [
        "--on-conflict=mean", "--max-shard-size", "2KB", "--weights-only", "--dry-run",
        "--allow-different-base", "--format", "safetensors", "--dtype", "float16",
    ],
    "snake": [
        "--on_conflict=mean", "--max_shard_size", "2KB", "--weights_only", "--dry_run",
        "--allow_different_base", "--format", "safetensors", "--dtype", "float16",
    ],
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("output_first", [False, True])
def test_both_spellings(capsys: Any, tmp_path: Path, spelling: str, output_first: bool) -> None:
    paths = [trained_checkpoint(tmp_path / name, 11) for name in "ab"]
    inputs, output = ["--checkpoints", *paths], ["--output", tmp_path / "out"]
    head = [*output, *inputs] if output_first else [*inputs, *output]
    code, out, _ = run(capsys, "merge", *head, *SPELLINGS[spelling], "--json")
    assert code == 0
    report = json.loads(out)
    assert report["dry_run"] and not (tmp_path / "out").exists()
    assert report["layers"][0]["num_ranks"] == 2
    assert report["layers"][0]["optimizer"] == "left out"
    assert sum(name.endswith(".safetensors") for name in report["files"]) > 1


@pytest.mark.parametrize(
    ("text", "shards"), [("2000", 12), ("2KB", 12), ("2 kb", 12), ("1MB", 1), ("5gb", 1)]
)
def test_sizes(capsys: Any, tmp_path: Path, text: str, shards: int) -> None:
    weights = layer_weights(1, d=64, f=64, rank=8)  # 9 tensors of 2048 bytes
    path = write_checkpoint(tmp_path / "a", weights)
    code, _, _ = run(
        capsys, "merge", "--checkpoints", path, "--output", tmp_path / "out",
        "--format", "safetensors", "--max-shard-size", text,
    )  # fmt: skip
    assert code == 0
    found = len(list((tmp_path / "out").glob("*.safetensors")))
    assert found == (9 if shards > 1 else 1)


def test_dry_run(capsys: Any, pair: list[Path], tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    code, out, _ = run(
        capsys, "merge", "--checkpoints", *pair, "--output", tmp_path / "out", "--dry-run"
    )
    assert code == 0
    assert "Would merge layers: [11, 13]" in out
    assert "Nothing was written." in out
    assert "npt_weights.pt: " in out and "Disk needed: " in out and "Expected ways: " in out
    assert sorted(tmp_path.rglob("*")) == before


def test_json_is_the_report(capsys: Any, pair: list[Path], tmp_path: Path) -> None:
    code, out, err = run(
        capsys, "merge", "--checkpoints", *pair, "--output", tmp_path / "out", "--verify", "--json"
    )
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["verification"]["passed"] is True
    assert report["global_step"] == 5
    assert [info["layer"] for info in report["layers"]] == [11, 13]
    assert set(report["files"]) == {
        path.name for path in (tmp_path / "out").iterdir()
    } - {"merge_summary.json", "merge_digests.txt"}  # fmt: skip


def test_selected_layers(capsys: Any, tmp_path: Path) -> None:
    path = write_checkpoint(
        tmp_path / "a", {**layer_weights(11), **layer_weights(12), **layer_weights(13)}
    )
    code, out, _ = run(
        capsys, "merge", "--checkpoints", f"{path}:11,13", "--output", tmp_path / "out"
    )
    assert code == 0 and "Merged layers: [11, 13]" in out


def test_the_note_about_the_missing_folder(capsys: Any, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run" / "checkpoints" / "checkpoint-8", layer_weights(1))
    given = tmp_path / "run" / "checkpoint-8"
    _, out, _ = run(capsys, "merge", "--checkpoints", given, "--output", tmp_path / "out")
    assert f"{given}: using {tmp_path / 'run' / 'checkpoints' / 'checkpoint-8'}" in out


def test_force(capsys: Any, pair: list[Path], tmp_path: Path) -> None:
    arguments = ["merge", "--checkpoints", *pair, "--output", tmp_path / "out"]
    assert run(capsys, *arguments)[0] == 0
    code, _, err = run(capsys, *arguments)
    assert code == 1
    message = f"Output path already exists: {tmp_path / 'out'}. Use --force to overwrite."
    assert err == f"Error: {message}\n"
    assert run(capsys, *arguments, "--force")[0] == 0


def test_a_failed_check_is_exit_code_3_and_a_list(
    capsys: Any, pair: list[Path], tmp_path: Path
) -> None:
    file = pair[0] / "npt_weights.pt"
    name = "layer_11_np.W_a_up_gate"
    flip_byte(file, offset_of(file, read_weights(pair[0])[name]))
    code, out, err = run(
        capsys, "merge", "--checkpoints", *pair, "--output", tmp_path / "out", "--verify"
    )
    assert (code, out) == (3, "")
    (line,) = err.splitlines()
    problem = f"{file}: {name}: damaged, its CRC-32 differs"
    assert line == f"Error: {tmp_path / 'out'}: not written: {problem}"
    assert not (tmp_path / "out").exists()


def test_copy_multi_layer_state(capsys: Any, pair: list[Path], tmp_path: Path) -> None:
    template = tmp_path / "template.pt"
    arguments = ["merge", "--checkpoints", *pair, "--output", tmp_path / "out"]
    code, _, err = run(capsys, *arguments, "--copy-multi-layer-state", template)
    assert code == 1 and str(template) in err
    assert not (tmp_path / "out").exists()
    torch.save(multi_layer_state([1], current_stage_index=3), template)
    assert run(capsys, *arguments, "--copy_multi_layer_state", template)[0] == 0
    state = torch.load(tmp_path / "out" / "multi_layer_state.pt", weights_only=True)
    assert state["current_stage_index"] == 3


def test_uniform_reaches_the_library(capsys: Any, tmp_path: Path) -> None:
    paths = [write_checkpoint(tmp_path / str(n), layer_weights(n, num_ranks=n)) for n in (1, 2)]
    code, out, _ = run(
        capsys, "merge", "--checkpoints", *paths, "--output", tmp_path / "out", "--uniform"
    )
    assert code == 0
    assert "tensors changed" in out
    assert npt.inspect(tmp_path / "out").num_ranks == 2
