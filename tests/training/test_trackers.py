"""Metrics of a run in Trainer's trackers, without a network."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import npt_fast as npt
from npt_fast.training.trackers import tracker_of
from tests.training import runs
from tests.training.runs import Place

NAMES = {
    "loss/total": "train/loss/total",
    "mlp_direct_loss/layer_1": "train/mlp_direct_loss/layer_1",
    "training/grad_norm": "train/training/grad_norm",
    "eval/kl": "eval/kl",
    "eval_kl/news": "eval/kl/news",
}
"""Metrics of the log, and what trackers call them."""
SETTINGS: dict[str, Any] = {"max_steps": 2, "eval_steps": 2, "logging_steps": 1}


def logged(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of the log by the tracker's names."""
    return {
        theirs: [(line["step"], line[ours]) for line in runs.log(run) if ours in line]
        for ours, theirs in NAMES.items()
    }


def test_a_tracker_that_is_not_installed(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line says how to install it; nothing is written."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(npt.TrainingError, match=r"^track wandb: not installed; pip install wandb$"):
        place.train(tmp_path / "run", wandb_mode="offline")
    assert not list((tmp_path / "run").rglob("*.jsonl"))


@pytest.mark.parametrize("track", ["none", "wandb"])
def test_disabled_is_no_tracker(monkeypatch: pytest.MonkeyPatch, track: Any) -> None:
    """The original's way to train without wandb must not ask to install it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    options = npt.TrainOptions(train_layers="1", track=track, wandb_mode="disabled")
    assert tracker_of(options) == "none"


def test_a_tracker_that_does_not_start(place: Place, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").write_text("where its folder should be")
    with pytest.raises(npt.TrainingError) as caught:
        place.train(tmp_path / "run", track="tensorboard")
    message = str(caught.value)
    assert message.startswith("track tensorboard: does not start: ") and "\n" not in message
    assert "training_log.jsonl has the metrics" in message


def test_tensorboard(place: Place, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    place.train(run, track="tensorboard", wandb_name="mine", wandb_tags=["a", "b"], **SETTINGS)
    assert not [name for name in os.environ if name.startswith(("TENSORBOARD_", "WANDB_P"))]
    events = EventAccumulator(str(run / "tensorboard" / "mine"))
    events.Reload()
    for name, expected in logged(run).items():
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found and found == [(s, pytest.approx(v, rel=1e-6)) for s, v in expected], name
    arguments = events.Tensors("args/text_summary")[0].tensor_proto.string_val[0]
    assert json.loads(arguments)["train_layers"] == "1,2"


# a process of its own: trackers start services, and some fix their folder when imported
TRACKED = """
import json, sys
import npt_fast as npt
npt.train(npt.TrainOptions(**json.loads(sys.argv[1])))
print("the report")
"""


def tracked(place: Place, folder: Path, **options: Any) -> None:
    """Train with a tracker, and assert that it does not even try to use a network."""
    elsewhere = folder.with_name("elsewhere")
    elsewhere.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.upper().startswith(("WANDB", "TRACKIO", "HTTP", "NO_PROXY", "ALL_PROXY"))
        }
        names = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "WANDB_BASE_URL")
        path = os.pathsep.join([str(Path(__file__).parents[2]), kept.get("PYTHONPATH", "")])
        settings = place.settings(folder, **SETTINGS, **options)
        done = subprocess.run(
            [sys.executable, "-c", TRACKED, json.dumps({**settings, "output_dir": str(folder)})],
            cwd=elsewhere,
            env={**kept, **dict.fromkeys(names, address), "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert done.stdout == "the report\n", "stdout is ours: --json"
    assert list(elsewhere.iterdir()) == []


def test_wandb_offline(place: Place, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    folder = tmp_path / "run"
    tracked(place, folder, wandb_mode="offline", wandb_name="mine", wandb_tags=["a"])
    (record,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    content = record.read_bytes()
    for text in ("npt-multi-layer", "mine", "train_layers", *NAMES.values()):
        assert text.encode() in content, text


def test_trackio(place: Place, tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    folder = tmp_path / "run"
    tracked(place, folder, track="trackio", wandb_name="mine", wandb_project="ours")
    with sqlite3.connect(folder / "trackio" / "ours.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by step")
        found = [(run, json.loads(values)) for run, _, values in rows]
    assert {run for run, _ in found} == {"mine"}
    for name, expected in logged(folder).items():
        values = [(row["train/global_step"], row[name]) for _, row in found if name in row]
        assert values == expected, name
