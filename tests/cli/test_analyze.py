"""``npt-fast analyze``: what the guide promises, and more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import npt_fast as npt
from tests.checkpoints import (
    layer_weights,
    multi_layer_state,
    run,
    trained_checkpoint,
    write_checkpoint,
)

SECTIONS = [
    "NPT Weights Analysis",
    "Training State Analysis",
    "Configuration",
    "Merge Information",
    "Multi-Layer Training State",
]


def fail(text: str) -> Any:
    raise AssertionError(f"{text} is no JSON")


def test_sections_and_labels(capsys: Any, tmp_path: Path) -> None:
    paths = [trained_checkpoint(tmp_path / str(n), n, steps=n, num_ranks=2) for n in (11, 13)]
    npt.merge(paths, tmp_path / "out")
    code, out, err = run(capsys, "analyze", "--checkpoint", tmp_path / "out")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[:4] == ["=" * 60, "NPT Checkpoint Analysis", f"Checkpoint: {tmp_path / 'out'}",
                         "=" * 60]  # fmt: skip
    positions = [lines.index(title) for title in SECTIONS]
    assert positions == sorted(positions)
    assert all(lines[position + 1] == "-" * 40 for position in positions)
    for line in (
        "Total keys: 36",
        "Total parameters: 2,688",
        "Modulation type: triple",
        "Number of ranks: 2",
        "NPT rank: 4",
        "Layers found: [11, 13]",
        "Layer 13:",
        "  Total elements: 1,344",
        "global_step: 13",
        "batch_count: 52",
        "optimizer:",
        "  num_param_groups: 1",
        "  layers_with_moments: 11, 13",
        "has_scheduler: True",
        "mixed_precision: False",
        "  merged_layers: 11, 13",
        f"    layer 13: {paths[1]}",
        "model_name: test/model",
        "Merged layers: [11, 13]",
        f"  Layer 11: {paths[0]}",
        "Layers to train: [11, 13]",
        "Curriculum stages: 1",
        "  - teacher: until step 50",
    ):
        assert line in lines, line
    assert any(line.startswith("  npt_weights.pt: ") for line in lines)
    assert "{" not in out  # nothing is shown as Python writes it


@pytest.mark.parametrize("modulation", ["single", "dual", "triple"])
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_k_r_and_type_of_every_layer(
    capsys: Any, tmp_path: Path, modulation: str, num_ranks: int
) -> None:
    weights = {
        **layer_weights(1, modulation=modulation, num_ranks=num_ranks, rank=5),
        **layer_weights(2, modulation="dual", num_ranks=7, dtype=torch.bfloat16),
    }
    path = write_checkpoint(tmp_path / "a", weights)
    _, out, _ = run(capsys, "analyze", "--checkpoint", path)
    assert f"  Modulation: {modulation}, num_ranks {num_ranks}, rank 5\n" in out
    assert "  Modulation: dual, num_ranks 7, rank 4\n" in out
    assert "Dtype: BF16" in out and "Dtype: F32" in out
    assert "Number of ranks: varies by layer" in out


def test_json_is_the_report(capsys: Any, tmp_path: Path) -> None:
    path = trained_checkpoint(tmp_path / "a", 1)
    npt.merge([path], tmp_path / "out", verify=True)
    code, out, _ = run(capsys, "analyze", "--checkpoint", tmp_path / "out", "--json")
    assert code == 0
    report = json.loads(out, parse_constant=fail)
    expected = json.loads(json.dumps(npt.inspect(tmp_path / "out").to_dict()))
    assert report == {"checkpoints": [expected], "verdict": None}


def test_verbose_lists_every_tensor(capsys: Any, tmp_path: Path) -> None:
    weights = layer_weights(1, num_ranks=2)
    path = write_checkpoint(tmp_path / "a", weights)
    _, plain, _ = run(capsys, "analyze", "--checkpoint", path)
    assert "W_down_gate.1" not in plain
    _, out, _ = run(capsys, "analyze", "--checkpoint", path, "--verbose")
    assert "  Parameter details:" in out
    for name, tensor in weights.items():
        (line,) = [line for line in out.splitlines() if f" {name} " in line]
        assert str(list(tensor.shape)) in line and "F32" in line
        assert f"norm {float(tensor.double().norm()):.6g}" in line


def test_verbose_counts_nans(capsys: Any, tmp_path: Path) -> None:
    weights = layer_weights(1)
    weights["layer_1_np.W_down_up"][:3, 0] = torch.nan
    path = write_checkpoint(tmp_path / "a", weights)
    code, out, _ = run(capsys, "analyze", "--checkpoint", path, "--verbose")
    assert code == 0
    assert "  NaN or infinite: 3\n" in out
    assert "NaN/Inf 3" in out


def test_verbose_json_of_nans_is_json(capsys: Any, tmp_path: Path) -> None:
    weights = layer_weights(1)
    weights["layer_1_np.W_down_up"][:3, 0] = torch.nan
    path = write_checkpoint(tmp_path / "a", weights)
    _, out, _ = run(capsys, "analyze", "--checkpoint", path, "--verbose", "--json")
    report = json.loads(out, parse_constant=fail)
    assert report["checkpoints"][0]["layers"][0]["details"][3]["non_finite"] == 3


def test_several_that_can_be_merged(capsys: Any, tmp_path: Path) -> None:
    paths = [trained_checkpoint(tmp_path / name, n) for n, name in ((1, "a"), (2, "b"), (1, "c"))]
    code, out, _ = run(capsys, "analyze", "--checkpoint", *paths)
    assert code == 0
    verdict = out[out.index("Can these be merged?") :]
    assert "Yes: the result would have layers [1, 2]" in verdict
    assert "Layer 1 already exists" in verdict
    assert out.count("NPT Checkpoint Analysis") == 3


def test_several_that_cannot_be_merged(capsys: Any, tmp_path: Path) -> None:
    paths = [
        write_checkpoint(tmp_path / "a", layer_weights(1)),
        write_checkpoint(tmp_path / "b", layer_weights(2, d=18)),
    ]
    code, out, _ = run(capsys, "analyze", "--checkpoint", *paths)
    assert code == 0
    assert "No: " in out and "hidden_size 18, 16 in" in out
    _, out, _ = run(capsys, "analyze", "--checkpoint", *paths, "--json")
    assert json.loads(out)["verdict"]["mergeable"] is False


def test_a_state_that_cannot_be_read_is_a_warning(capsys: Any, tmp_path: Path) -> None:
    path = write_checkpoint(
        tmp_path / "a", layer_weights(1), multi_layer_state=multi_layer_state([1])
    )
    torch.save({"global_step": 1, "config": Path("x")}, path / "training_state.pt")
    code, out, err = run(capsys, "analyze", "--checkpoint", path)
    assert code == 0
    assert err.startswith("Warning: ") and "training_state.pt" in err and err.count("\n") == 1
    assert "Layers found: [1]" in out


HOSTILE = "layer_1\x1b[31m\n"


def test_text_from_a_checkpoint_does_not_drive_the_terminal(capsys: Any, tmp_path: Path) -> None:
    path = write_checkpoint(
        tmp_path / "a",
        layer_weights(1),
        config={"model_name": f"x{HOSTILE}y"},
        multi_layer_state=multi_layer_state([1], curriculum_schedule=[{"name": HOSTILE}]),
    )
    _, out, err = run(capsys, "analyze", "--checkpoint", path)
    assert "\x1b" not in out + err


def test_the_certificate_of_layers(capsys: Any, tmp_path: Path) -> None:
    """Layers with one certificate, also where another lies between them, share one table."""
    path = write_checkpoint(
        tmp_path / "a", {**layer_weights(1), **layer_weights(2), **layer_weights(4)}
    )
    certificate = {
        "layers": [1, 2, 4], "step": 3, "data": "d" * 60 + "docs", "tokens": 9, "kl": 0.125,
        "perplexity_ratio": 1.5, "texts": {
            "news": {"tokens": 8000, "kl": 0.25, "perplexity_ratio": 2.0},
            "story": {"tokens": 8000, "kl": None, "perplexity_ratio": 1.5},
        },
    }  # fmt: skip
    alone = {**certificate, "layers": [2], "step": None, "texts": {}}
    layers = {"1": certificate, "2": alone, "4": certificate}
    recorded = {"format_version": 1, "layers": {n: {"certificate": c} for n, c in layers.items()}}
    (path / "npt_config.json").write_text(json.dumps(recorded))
    _, out, _ = run(capsys, "analyze", "--checkpoint", path)
    _, _, printed = out.partition("Certificates\n")
    lines = printed.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[1] == "Layers 1,4, measured with 1-2,4 on, after step 3:"
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[4:8]]
    assert rows == [
        ["..." + "d" * 21 + "docs", "9", "0.1250", "1.5000"],
        ["news", "8,000", "0.2500", "2.0000"],
        ["story", "8,000", "not finite", "1.5000"],
        ["worst of other kinds", "16,000", "not finite", "2.0000"],
    ]
    assert lines[8] == "Layers 2, measured with 2 on:"
    assert printed.count("news") == 1 and printed.count("docs") == 2
    _, out, _ = run(capsys, "analyze", "--checkpoint", path, "--json")
    found, other, _ = json.loads(out)["checkpoints"][0]["layers"]
    worst = {"kl": None, "perplexity_ratio": 2.0}
    assert found["certificate"] == {**certificate, "worst": worst}
    assert other["certificate"] == {**alone, "worst": {}}
