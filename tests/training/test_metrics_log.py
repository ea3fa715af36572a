"""Metrics in the log, whatever an earlier run left there, and in trackers, without a network."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import socket
import sqlite3
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from npt_fast.checkpoint.training_log import LOG
from npt_fast.config import TrainOptions
from npt_fast.errors import TrainingError
from npt_fast.training.metrics_log import MetricsLog

VALUES: dict[str, float | str] = {
    "loss/total": 0.1 + 0.2,  # has 17 digits, and the log must keep all of them
    "mlp_direct_loss/layer_11": 2.5,
    "curriculum/stage": "mixed",
    "curriculum/stage_index": 1,
    "training/grad_norm": 1e-30,
}
NUMBERS = {name: value for name, value in VALUES.items() if not isinstance(value, str)}


def metrics(folder: Path, step: int = 0, **options: Any) -> MetricsLog:
    """Open the log as a run does, with its whole configuration."""
    chosen = TrainOptions(train_layers="11,13", **options)
    config = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(chosen).items()}
    return MetricsLog(folder, chosen, step, config)


def lines(folder: Path) -> list[dict[str, Any]]:
    text = (folder / LOG).read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


# ---- the log ----


def test_a_line_per_call(tmp_path: Path) -> None:
    log = metrics(tmp_path)
    assert lines(tmp_path) == []
    log.write(1, VALUES)
    assert lines(tmp_path) == [{"step": 1, **VALUES}], "written at once, not when closed"
    log.write(2, {"eval/kl": 0.5})
    log.write(2, {})
    log.close()
    assert lines(tmp_path) == [{"step": 1, **VALUES}, {"step": 2, "eval/kl": 0.5}, {"step": 2}]
    assert [path.name for path in tmp_path.iterdir()] == [LOG]


def test_what_is_no_number_is_null(tmp_path: Path) -> None:
    """JSON has no NaN: other readers would refuse the whole line."""
    log = metrics(tmp_path)
    log.write(3, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.0, "e": "nan"})
    log.close()
    assert lines(tmp_path) == [{"step": 3, "a": None, "b": None, "c": None, "d": 0.0, "e": "nan"}]


def write_log(folder: Path, *steps: int, end: str = "") -> None:
    text = "".join(json.dumps({"step": step, "loss/total": step / 7}) + "\n" for step in steps)
    (folder / LOG).write_text(text + end)


def test_lines_beyond_the_step_resumed_at_are_dropped(tmp_path: Path) -> None:
    write_log(tmp_path, 90, 100, 100, 101, 1000)
    before = (tmp_path / LOG).read_text().splitlines()
    log = metrics(tmp_path, 100)
    assert (tmp_path / LOG).read_text().splitlines() == before[:3], "to the letter"
    log.write(101, {"loss/total": 0.0})
    log.close()
    assert [line["step"] for line in lines(tmp_path)] == [90, 100, 100, 101]


@pytest.mark.parametrize(
    "end",
    [
        pytest.param('{"step": 101, "loss/to', id="torn"),
        pytest.param('{"step": 1', id="torn in the step"),
        pytest.param('{"step": 101, "a": "\xc3', id="torn letter"),
        pytest.param("\0" * 100, id="blocks that were never written"),
        pytest.param('{"step": ' + "[" * 100_000 + "\n", id="deep"),
        pytest.param('{"step": 1' + "0" * 5000 + "}\n", id="a huge number"),
        pytest.param('{"step": 1' + "0" * 400 + "}\n", id="a number no float holds"),
        pytest.param('"a text"\n[1]\n5\nnull\n{}\n{"step": null}\n{"step": "x"}\n', id="others"),
    ],
)
def test_what_a_killed_run_left_does_not_stop_the_next(tmp_path: Path, end: str) -> None:
    write_log(tmp_path, 90, 100)
    with (tmp_path / LOG).open("ab") as file:
        file.write(end.encode("latin-1"))
    log = metrics(tmp_path, 100)
    log.write(101, {})
    log.close()
    assert [line["step"] for line in lines(tmp_path)] == [90, 100, 101]


def test_a_log_that_is_none(tmp_path: Path) -> None:
    """Nothing hangs, and no line is read that could fill memory."""
    log = tmp_path / LOG
    log.write_bytes(b"x" * (1 << 20))
    with pytest.raises(TrainingError, match=rf"{LOG}: has a line of 1,048,576 bytes or more"):
        metrics(tmp_path, 100)
    assert log.stat().st_size == 1 << 20
    log.unlink()
    os.mkfifo(log)
    with pytest.raises(TrainingError, match=rf"{LOG}: not a regular file"):
        metrics(tmp_path, 100)
    log.unlink()
    log.symlink_to("/dev/zero")
    with pytest.raises(TrainingError, match=rf"{LOG}: not a regular file"):
        metrics(tmp_path, 100)


def test_a_last_line_that_only_lacks_its_end_is_kept(tmp_path: Path) -> None:
    write_log(tmp_path, 90, end='{"step": 100, "loss/total": 0.5}')
    log = metrics(tmp_path, 100)
    log.write(101, {})
    log.close()
    assert [line["step"] for line in lines(tmp_path)] == [90, 100, 101]


def test_a_new_run_begins_a_new_log(tmp_path: Path) -> None:
    write_log(tmp_path, 0, 1)
    metrics(tmp_path).close()
    assert lines(tmp_path) == []


def test_resuming_elsewhere_begins_a_new_log(tmp_path: Path) -> None:
    log = metrics(tmp_path, 100)
    log.write(101, {})
    log.close()
    assert lines(tmp_path) == [{"step": 101}]


# ---- trackers ----


@pytest.mark.parametrize("name", ["wandb", "tensorboard", "trackio"])
def test_a_tracker_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """One line says how to install it; the log of the earlier run is unchanged."""
    write_log(tmp_path, 100, 200)
    find = importlib.util.find_spec

    def without(wanted: str, package: str | None = None) -> Any:
        return None if wanted == name else find(wanted, package)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(TrainingError) as caught:
        metrics(tmp_path, 100, track=name)
    message = str(caught.value)
    assert "\n" not in message and name in message and f"pip install {name}" in message
    assert [line["step"] for line in lines(tmp_path)] == [100, 200]


def test_a_tracker_that_does_not_start(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("where its folder should be")
    with pytest.raises(TrainingError) as caught:
        metrics(tmp_path, track="tensorboard")
    message = str(caught.value)
    assert message.startswith("track tensorboard: does not start: ") and "\n" not in message
    assert LOG in message


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = metrics(tmp_path, track="tensorboard", wandb_name="mine", wandb_tags=("a", "b"))
    log.write(5, VALUES)
    log.write(6, {"loss/total": 0.25, "training/grad_norm": math.nan})
    log.close()
    assert [line["step"] for line in lines(tmp_path)] == [5, 6]
    events = EventAccumulator(str(tmp_path / "tensorboard" / "mine"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(NUMBERS)
    found = {name: [(e.step, e.value) for e in events.Scalars(name)] for name in NUMBERS}
    for name, value in NUMBERS.items():
        assert found[name][0] == (5, pytest.approx(value, rel=1e-6)), (
            name
        )  # tensorboard stores float32
    assert found["loss/total"][1:] == [(6, 0.25)]
    assert found["training/grad_norm"][1][0] == 6 and math.isnan(found["training/grad_norm"][1][1])


@pytest.mark.parametrize("track", ["none", "wandb"])
def test_disabled_is_no_tracker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, track: str
) -> None:
    """The original's way to train without wandb must not ask to install it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    metrics(tmp_path, track=track, wandb_mode="disabled").close()


# a process of its own: trackers start services, and some fix their folder when imported
TRACKED = """
import json, sys
from pathlib import Path
from accelerate import PartialState
from tests.training.test_metrics_log import VALUES, metrics
PartialState(cpu=True)  # as in a run
log = metrics(Path(sys.argv[1]), **json.loads(sys.argv[2]))
log.write(5, VALUES)
log.write(6, {"loss/total": 0.25})
log.close()
print("the report")
"""


def tracked(folder: Path, **options: Any) -> None:
    """Write metrics with a tracker, and assert that it does not even try to use a network."""
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
        root = str(Path(__file__).parents[2])
        done = subprocess.run(
            [sys.executable, "-c", TRACKED, str(folder), json.dumps(options)],
            cwd=elsewhere,
            env={**kept, **dict.fromkeys(names, address), "PYTHONPATH": root},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert done.stdout == "the report\n", "stdout is ours: --json"
    assert list(elsewhere.iterdir()) == []
    assert [line["step"] for line in lines(folder)] == [5, 6]


def test_wandb_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    folder = tmp_path / "run"
    folder.mkdir()
    tracked(folder, wandb_mode="offline", wandb_name="mine", wandb_tags=["a"])
    (record,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    content = record.read_bytes()
    for text in ("npt-multi-layer", "mine", "train_layers", *NUMBERS):  # design.md#metrics
        assert text.encode() in content, text
    assert repr(NUMBERS["loss/total"]).encode() in content


def test_trackio(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    folder = tmp_path / "run"
    folder.mkdir()
    tracked(folder, track="trackio", wandb_name="mine", wandb_project="ours")
    with sqlite3.connect(folder / "trackio" / "ours.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by step")
        found = [(run, step, json.loads(values)) for run, step, values in rows]
    # values that are not numbers are not shown there
    assert found == [("mine", 5, NUMBERS), ("mine", 6, {"loss/total": 0.25})]
