"""Logs of runs are read whole, or refused in one line that names the line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from npt_fast.checkpoint import training_log
from npt_fast.checkpoint.training_log import LOG, read_log
from npt_fast.errors import CheckpointError
from npt_fast.training.metrics_log import MetricsLog


def test_what_a_run_writes_is_read(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    log.write(1, {"mlp_direct_loss/layer_11": 0.5, "curriculum/stage": "teacher"})
    log.write(2, {"mlp_direct_loss/layer_2": 0.25, "curriculum/stage": "teacher"})
    log.write(2, {"eval/kl": float("nan")})
    log.write(3, {"mlp_direct_loss/layer_11": 0.125, "curriculum/stage": "student"})
    for path in (tmp_path, tmp_path / LOG):
        found = read_log(path)
        assert found.path == path and found.layers == [2, 11]
        assert found.stages == [("teacher", 1, 2), ("student", 3, 3)]
        assert found.values("mlp_direct_loss/layer_11") == ([1, 3], [0.5, 0.125])
        assert found.values("eval/kl") == found.values("nothing") == ([], [])


def test_half_a_line_at_the_end_is_left_out(tmp_path: Path) -> None:
    (tmp_path / LOG).write_text('{"step": 1, "a": 2}\n{"step": 2, "a"')
    assert read_log(tmp_path).metrics == {"a": ([1], [2.0])}


def test_what_is_no_log_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = json.dumps({"step": 1, "a": 2.0})
    for second, problem in (
        ("not JSON", r"line 2: not valid JSON"),
        ('{"a": 1}', "line 2: has no step, so this is not the log of a run"),
        ('{"step": true}', "line 2: has no step"),
        ('{"step": 2, "a": [1]}', "line 2: 'a' must be a number, a text or null"),
        ('{"step": 2, "a": NaN}', "line 2: the number NaN is not allowed"),
        ("[]", "line 2: not a JSON object"),
    ):
        (tmp_path / LOG).write_text(f"{sound}\n{second}\n")
        with pytest.raises(CheckpointError, match=problem) as caught:
            read_log(tmp_path)
        assert str(caught.value).startswith(str(tmp_path / LOG))
    (tmp_path / LOG).write_text("")
    with pytest.raises(CheckpointError, match="has no metrics yet"):
        read_log(tmp_path)
    with pytest.raises(CheckpointError, match="none: does not exist"):
        read_log(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=f"empty: has no {LOG}; name the folder of a run"):
        read_log(tmp_path / "empty")
    (tmp_path / LOG).write_text(
        "".join(f'{{"step": {n}, "curriculum/stage": "{n}"}}\n' for n in range(1002))
    )
    with pytest.raises(CheckpointError, match="line 1001: the stage changes more than 1,000 times"):
        read_log(tmp_path)
    monkeypatch.setattr(training_log, "_LARGEST", 100)
    with pytest.raises(CheckpointError, match="more than 100 are refused"):
        read_log(tmp_path)
