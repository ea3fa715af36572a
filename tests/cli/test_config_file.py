"""``--config``: options from a YAML file mean what they mean on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import npt_fast as npt
from tests.checkpoints import run
from tests.training import runs
from tests.training.runs import Place


def written(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def test_options_come_from_the_file(
    capsys: Any, tmp_path: Path, layer11: Path, layer13: Path
) -> None:
    """In either spelling, as single values and lists, and required ones too."""
    out = tmp_path / "out"
    config = written(
        tmp_path,
        f"checkpoints: [{layer11}, {layer13}]\noutput: {out}\non-conflict: error\n"
        "weights_only: true\nverify: no\nformat: null\nmax_shard_size: 1GB\n",
    )
    code, _, err = run(capsys, "merge", "--config", config)
    assert (code, err) == (0, "")
    assert [layer.layer for layer in npt.inspect(out).layers] == [11, 13]
    assert not (out / "training_state.pt").exists()
    assert not (out / "merge_digests.txt").exists()


def test_what_is_given_counts_instead(
    capsys: Any, tmp_path: Path, layer11: Path, layer13: Path
) -> None:
    lines = f"checkpoints: [{layer11}, {layer13}]\noutput: {tmp_path / 'out'}\n"
    config = written(tmp_path, lines)
    code, _, _ = run(capsys, "merge", layer13, "--output", tmp_path / "b", "--config", config)
    assert code == 0 and not (tmp_path / "out").exists()
    assert [layer.layer for layer in npt.inspect(tmp_path / "b").layers] == [13]


def test_a_runs_own_file_trains_the_same(place: Place, capsys: Any, tmp_path: Path) -> None:
    """Its learning rate is 1e-05, which YAML takes for a text."""
    given = place.arguments(tmp_path / "one", learning_rate=1e-5, max_steps=3, wandb_tags="a")
    code, *_ = run(capsys, *given)
    assert code == 0
    config = tmp_path / "one" / "config.json"
    assert "1e-05" in config.read_text()
    code, *_ = run(capsys, "train", "--config", config, "--output_dir", tmp_path / "two")
    assert code == 0
    ends = [tmp_path / name / "checkpoints" / "checkpoint-3" for name in ("one", "two")]
    runs.assert_same_end(*ends)
    changed = {"output_dir": str(tmp_path / "two")}
    expected = {**json.loads(config.read_text()), **changed}
    assert json.loads((tmp_path / "two" / "config.json").read_text()) == expected


TRAIN = "train_layers: 1\n"
MISTAKES = {
    "unknown": ("max_stepss: 3\n", 2, "line 2: unknown key 'max_stepss'; did you mean 'max_steps'"),
    "another-verbs": ("output: a\n", 2, "line 2: unknown key 'output'"),
    "its-own": ("config: a\n", 2, "line 2: unknown key 'config'"),
    "type": ("\nmax-steps: many\n", 2, "line 3"),
    "choice": ("loss: huge\n", 2, "line 2"),
    "range": ("\nmax-steps: -3\n", 2, "line 3: max_steps must be positive, got -3"),
    "later": ("curriculum_stages: x\n", 1, "line 2: curriculum_stages: 'x' is not name:steps"),
    "flag": ("fp16: maybe\n", 2, "line 2"),
    "code": ("trust_remote_code: true\n", 2, "line 2: no file may let code run"),
    "nested": ("data: {a: b}\n", 1, "not a value or a list of values"),
    "twice": ("seed: 1\nseed: 2\n", 1, "'seed' is there twice"),
    "spelling": ("max_steps: 1\nmax-steps: 2\n", 2, "line 3: 'max-steps' and 'max_steps' are the"),
    "tag": ("seed: !!int 1\n", 1, "leave tags out"),
    "no-yaml": ("seed: [1\n", 1, "is not valid YAML"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_that_names_the_place(
    capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.chdir(tmp_path)
    text, expected, problem = MISTAKES[case]
    config = written(tmp_path, TRAIN + text)
    code, out, err = run(capsys, "train", "--config", config)
    assert (code, out) == (expected, "")
    assert err.startswith("Error: ") and err.count("\n") == 1
    assert str(config) in err and problem in err
    assert list(tmp_path.iterdir()) == [config]


@pytest.mark.parametrize(
    ("content", "problem"), [("- a\n", "not a mapping"), (None, "cannot be opened")]
)
def test_a_file_that_is_none(
    capsys: Any, tmp_path: Path, content: str | None, problem: str
) -> None:
    config = tmp_path / "run.yaml"
    if content is not None:
        config.write_text(content)
    code, out, err = run(capsys, "analyze", "--config", config)
    assert (code, out) == (1, "")
    assert str(config) in err and problem in err and err.count("\n") == 1


def test_an_empty_file_gives_nothing(capsys: Any, tmp_path: Path, layer11: Path) -> None:
    code, *_ = run(capsys, "analyze", layer11, "--config", written(tmp_path, "# nothing\n"))
    assert code == 0
