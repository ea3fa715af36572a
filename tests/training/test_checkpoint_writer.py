"""Checkpoints that training writes: their files, which ones stay, complete or not at all."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import npt_fast as npt
from npt_fast.training.run_directory import RunDirectory
from tests.checkpoints import (
    adamw_state,
    contents,
    layer_weights,
    load_state,
)
from tests.training import runs
from tests.training.runs import Place

WIDTHS: dict[str, Any] = {"d": 32, "f": 48}

# --- the files, and which checkpoints stay


def test_the_guides_layout(place: Place, tmp_path: Path) -> None:
    """The files, and what the original's tools look for in them (design.md#checkpoint-files)."""
    path = place.train(
        tmp_path / "out",
        curriculum_stages="teacher:3,mixed:3:0.3:0.6,student:10",
        max_steps=5,
        save_steps=2,
        eval_steps=4,
        residual="kept",
    )
    assert {p.name for p in path.parent.iterdir()} == {
        "checkpoint-2", "checkpoint-4", "checkpoint-5", "best", "final",
    }  # fmt: skip
    assert {p.name for p in path.parent.parent.iterdir()} == {
        "checkpoints", "config.json", "training_log.jsonl",
    }  # fmt: skip
    names = {
        "npt_weights.pt", "training_state.pt", "multi_layer_state.pt", "config.json",
        "npt_config.json",
    }  # fmt: skip
    for checkpoint in path.parent.iterdir():
        assert {p.name for p in checkpoint.iterdir()} == names
        assert npt.verify(checkpoint).passed
    state = torch.load(path / "multi_layer_state.pt", weights_only=True)
    assert state["curriculum_schedule"] == [
        {"name": "teacher", "until_step": 3, "mixing_ratio": 0.0, "mlp_mixing_ratio": 0.0},
        {"name": "mixed", "until_step": 6, "mixing_ratio": 0.3, "mlp_mixing_ratio": 0.6},
        {"name": "student", "until_step": 16, "mixing_ratio": 1.0, "mlp_mixing_ratio": 1.0},
    ]
    assert state["current_stage_index"] == 1
    config = json.loads((path / "config.json").read_text())
    spec = {
        "model_name": str(place.base),
        "batch_size": 2,
        "learning_rate": 1e-2,
        "max_steps": 5,
        "gradient_accumulation_steps": 2,
        "mixed_precision": False,
        "gradient_clip_value": 0.1,
    }
    assert spec.items() <= config.items()
    described = json.loads((path / "npt_config.json").read_text())
    assert described["base_model"]["name"] == str(place.base)
    last = [line for line in runs.log(tmp_path / "out") if "eval/kl" in line][-1]
    assert last["step"] == 5
    for layer in ("1", "2"):
        found = described["layers"][layer]
        assert (found["step"], found["residual"]) == (5, "kept")
        assert found["fidelity"] == last[f"eval_mlp_direct_loss/layer_{layer}"]
        certificate = found["certificate"]
        assert (certificate["layers"], certificate["step"]) == ([1, 2], 5)
        assert certificate["data"] == str(place.text)
        assert set(certificate["texts"]) == {"news", "story", "code", "french"}
        for figure in ("kl", "perplexity_ratio"):
            assert certificate[figure] == last[f"eval/{figure}"]
            assert certificate["worst"][figure] == last[f"eval_worst/{figure}"]
            for name, text in certificate["texts"].items():
                assert text[figure] == last[f"eval_{figure}/{name}"]
    assert load_state(path)["batch_count"] == 10


def test_best(place: Place, tmp_path: Path) -> None:
    """``best`` has the lowest KL; a resumed run knows the lowest KL before it."""
    settings = {"eval_steps": 1, "save_steps": 2}
    path = place.train(tmp_path / "out", max_steps=6, **settings)
    values = {
        line["step"]: line["eval/kl"] for line in runs.log(tmp_path / "out") if "eval/kl" in line
    }
    best = min(values, key=lambda step: values[step])
    assert load_state(path.with_name("best"))["global_step"] == best
    assert load_state(path.with_name("best"))["best_val_loss"] == values[best]
    # a step this large makes the model worse
    place.train(
        tmp_path / "out", max_steps=7, resume_from=str(path), learning_rate=10.0, **settings
    )
    worse = runs.log(tmp_path / "out")[-1]["step"]
    assert worse == 7
    assert load_state(path.with_name("best"))["global_step"] == best
    assert load_state(path.with_name("checkpoint-7"))["best_val_loss"] == values[best]


def test_keep_last(place: Place, tmp_path: Path) -> None:
    path = place.train(tmp_path / "out", save_steps=2, keep_last=2, eval_steps=3)
    names = ["best", "checkpoint-6", "checkpoint-8", "final"]
    assert sorted(p.name for p in path.parent.iterdir()) == names
    for name in names:
        assert npt.verify(path.with_name(name)).passed


def test_keep_last_beside_an_earlier_longer_run(place: Place, tmp_path: Path) -> None:
    """New checkpoints stay even if the folder has checkpoints of later steps."""
    path = place.train(tmp_path / "out", save_steps=2)
    begin = path.with_name("checkpoint-2")
    again = place.train(
        tmp_path / "out", resume_from=str(begin), save_steps=1, keep_last=2, max_steps=5
    )
    assert again.name == "checkpoint-5" and again.is_dir()
    assert list(RunDirectory(tmp_path / "out", resuming=True).checkpoint_steps()) == [4, 5, 6, 8]


def test_weights_that_are_not_finite_are_not_saved(place: Place, tmp_path: Path) -> None:
    """The loss was finite, but the step it led to exceeds float32."""
    message = "layer_1_np.W_down_gate.0 is not finite at step 1; no checkpoint had been saved"
    with pytest.raises(npt.TrainingError, match=message):
        place.train(tmp_path / "out", learning_rate=1e39, max_steps=1)
    assert not list((tmp_path / "out").glob("checkpoints/*"))


# --- complete or not at all


@pytest.mark.parametrize("limit", [0, 300, 9_000, 50_000, 400_000, 900_000, 1_190_000])
def test_a_full_disk(tmp_path: Path, limit: int) -> None:
    """The error may show in any write: tensors of 32 kB bypass the buffers, other parts do not."""
    weights = layer_weights(3, rank=32, num_ranks=2, d=256, f=256)
    state = adamw_state(weights)["optimizer_state_dict"]
    old = contents(runs.write(tmp_path / "a", weights, {}))
    with runs.file_size_limit(limit), pytest.raises(npt.StorageError, match="nothing was written"):
        runs.write(tmp_path / "a", weights, state)
    assert contents(tmp_path / "a") == old
    assert os.listdir(tmp_path) == ["a"]
    with runs.file_size_limit(limit), pytest.raises(npt.StorageError):
        runs.write(tmp_path / "new" / "a", weights, state)
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("call", ["fsync", "mkdir"])
def test_a_broken_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    weights = layer_weights(3, rank=4, num_ranks=2, **WIDTHS)
    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(npt.TrainingError, match="Input/output error; nothing was written"):
        runs.write(tmp_path / "a", weights, {})
    monkeypatch.undo()
    assert os.listdir(tmp_path) == []


def test_a_checkpoint_is_replaced_whole(tmp_path: Path) -> None:
    weights = layer_weights(3, rank=4, num_ranks=2, **WIDTHS)
    path = runs.write(tmp_path / "a", weights, {})
    (path / "npt_weights.safetensors").write_bytes(b"of an earlier run")
    runs.write(tmp_path / "a", weights, {})
    assert not (path / "npt_weights.safetensors").exists()
    assert {p.stat().st_mode & 0o777 for p in path.iterdir()} == {0o666 & ~umask()}


def test_what_could_not_be_read_again_does_not_take_the_place_of_what_can(tmp_path: Path) -> None:
    weights = layer_weights(3, rank=4, num_ranks=2, **WIDTHS)
    state = adamw_state(weights)["optimizer_state_dict"]
    old = contents(runs.write(tmp_path / "a", weights, state))
    state["param_groups"][0]["betas"] = torch.float32
    told = r"a/training_state\.pt: data\.pkl: .*betas: torch\.float32 is .* nothing was written"
    with pytest.raises(npt.CheckpointError, match=told):
        runs.write(tmp_path / "a", weights, state)
    assert contents(tmp_path / "a") == old and os.listdir(tmp_path) == ["a"]


def umask() -> int:
    before = os.umask(0)
    os.umask(before)
    return before
