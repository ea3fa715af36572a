"""Lost files, layers and tensors are found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import npt_fast as npt
from tests.checkpoint.merging import forget_sources, merged
from tests.checkpoints import layer_weights, read_weights


def lose_a_shard(path: Path) -> None:
    next(iter(sorted(path.glob("*.safetensors")))).unlink()


def lose_the_state(path: Path) -> None:
    (path / "training_state.pt").unlink()


def lose_the_config(path: Path) -> None:
    (path / "config.json").unlink()


def lose_the_npt_config(path: Path) -> None:
    (path / "npt_config.json").unlink()


def lose_the_curriculum(path: Path) -> None:
    (path / "multi_layer_state.pt").unlink()


def lose_all_weights(path: Path) -> None:
    for file in path.glob("npt_weights*"):
        file.unlink()


LOSSES = [
    lose_a_shard, lose_the_state, lose_the_config, lose_the_npt_config, lose_the_curriculum,
]  # fmt: skip


@pytest.mark.parametrize("with_sources", [True, False], ids=["sources", "copy"])
@pytest.mark.parametrize("lose", LOSSES, ids=lambda lose: lose.__name__)
def test_a_lost_file(tmp_path: Path, lose: Callable[[Path], None], with_sources: bool) -> None:
    (tmp_path / "elsewhere").mkdir()
    path = merged(tmp_path, format="safetensors", max_shard_size=2000)
    if not with_sources:
        path = forget_sources(tmp_path)
    lose(path)
    report = npt.verify(path)
    assert not report.passed
    assert all("\n" not in problem for problem in report.problems)


def test_lost_weights(tmp_path: Path) -> None:
    path = merged(tmp_path)
    lose_all_weights(path)
    with pytest.raises(npt.CheckpointError, match="NPT weights not found"):
        npt.verify(path)


@pytest.mark.parametrize("with_sources", [True, False], ids=["sources", "copy"])
def test_a_lost_layer(tmp_path: Path, with_sources: bool) -> None:
    (tmp_path / "elsewhere").mkdir()
    path = merged(tmp_path, weights_only=True)
    if not with_sources:
        path = forget_sources(tmp_path)
    kept = {n: t for n, t in read_weights(path).items() if n.startswith("layer_1_")}
    torch.save(kept, path / "npt_weights.pt")
    report = npt.verify(path)
    assert "Missing layers: [2]" in report.problems
    assert (report.expected_layers, report.found_layers) == ([1, 2], [1])


def test_a_layer_too_many(tmp_path: Path) -> None:
    path = merged(tmp_path, weights_only=True)
    torch.save({**read_weights(path), **layer_weights(7)}, path / "npt_weights.pt")
    assert "Unexpected layers: [7]" in npt.verify(path).problems


def test_a_lost_tensor(tmp_path: Path) -> None:
    path = merged(tmp_path, weights_only=True)
    weights = read_weights(path)
    del weights["layer_2_np.W_a_up_gate.1"]
    torch.save(weights, path / "npt_weights.pt")
    report = npt.verify(path)
    assert any("layer_2_np.W_a_up_gate.1 is missing" in problem for problem in report.problems)


def test_a_lost_moment(tmp_path: Path) -> None:
    path = merged(tmp_path)
    state = torch.load(path / "training_state.pt", weights_only=True)
    del state["optimizer_state_dict"]["state"][3]
    torch.save(state, path / "training_state.pt")
    assert any("optimizer.3.exp_avg" in problem for problem in npt.verify(path).problems)
