"""Metrics in the log, whatever an earlier run left there."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from npt_fast.checkpoint.training_log import LOG
from npt_fast.errors import TrainingError
from npt_fast.training.metrics_log import MetricsLog

VALUES: dict[str, float | str] = {
    "loss/total": 0.1 + 0.2,  # has 17 digits, and the log must keep all of them
    "mlp_direct_loss/layer_11": 2.5,
    "curriculum/stage": "mixed",
    "curriculum/stage_index": 1,
    "training/grad_norm": 1e-30,
}


def lines(folder: Path) -> list[dict[str, Any]]:
    text = (folder / LOG).read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def test_a_line_per_call(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    assert lines(tmp_path) == []
    log.write(1, VALUES)
    assert lines(tmp_path) == [{"step": 1, **VALUES}], "written at once"
    log.write(2, {"eval/kl": 0.5})
    log.write(2, {})
    assert lines(tmp_path) == [{"step": 1, **VALUES}, {"step": 2, "eval/kl": 0.5}, {"step": 2}]
    assert [path.name for path in tmp_path.iterdir()] == [LOG]


def test_what_is_no_number_is_null(tmp_path: Path) -> None:
    """JSON has no NaN: other readers would refuse the whole line."""
    log = MetricsLog(tmp_path, 0)
    log.write(3, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.0, "e": "nan"})
    assert lines(tmp_path) == [{"step": 3, "a": None, "b": None, "c": None, "d": 0.0, "e": "nan"}]


def write_log(folder: Path, *steps: int, end: str = "") -> None:
    text = "".join(json.dumps({"step": step, "loss/total": step / 7}) + "\n" for step in steps)
    (folder / LOG).write_text(text + end)


def test_lines_beyond_the_step_resumed_at_are_dropped(tmp_path: Path) -> None:
    write_log(tmp_path, 90, 100, 100, 101, 1000)
    before = (tmp_path / LOG).read_text().splitlines()
    log = MetricsLog(tmp_path, 100)
    assert (tmp_path / LOG).read_text().splitlines() == before[:3], "to the letter"
    log.write(101, {"loss/total": 0.0})
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
    log = MetricsLog(tmp_path, 100)
    log.write(101, {})
    assert [line["step"] for line in lines(tmp_path)] == [90, 100, 101]


def test_a_log_that_is_none(tmp_path: Path) -> None:
    """Nothing hangs, and no line is read that could fill memory."""
    log = tmp_path / LOG
    log.write_bytes(b"x" * (1 << 20))
    with pytest.raises(TrainingError, match=rf"{LOG}: has a line of 1,048,576 bytes or more"):
        MetricsLog(tmp_path, 100)
    assert log.stat().st_size == 1 << 20
    log.unlink()
    os.mkfifo(log)
    with pytest.raises(TrainingError, match=rf"{LOG}: not a regular file"):
        MetricsLog(tmp_path, 100)
    log.unlink()
    log.symlink_to("/dev/zero")
    with pytest.raises(TrainingError, match=rf"{LOG}: not a regular file"):
        MetricsLog(tmp_path, 100)


def test_a_last_line_that_only_lacks_its_end_is_kept(tmp_path: Path) -> None:
    write_log(tmp_path, 90, end='{"step": 100, "loss/total": 0.5}')
    log = MetricsLog(tmp_path, 100)
    log.write(101, {})
    assert [line["step"] for line in lines(tmp_path)] == [90, 100, 101]


def test_a_new_run_begins_a_new_log(tmp_path: Path) -> None:
    write_log(tmp_path, 0, 1)
    MetricsLog(tmp_path, 0)
    assert lines(tmp_path) == []


def test_resuming_elsewhere_begins_a_new_log(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 100)
    log.write(101, {})
    assert lines(tmp_path) == [{"step": 101}]
