"""``npt-fast plot``, and ``--plot`` of analyze and merge: a picture, or one line and no file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from npt_fast.checkpoint.training_log import LOG
from tests.checkpoints import run, trained_checkpoint
from tests.training.runs import Place

ROW = '{"step": 1, "loss/total": 2.5, "curriculum/stage": "teacher"}\n'


def test_a_trained_run(place: Place, capsys: Any, tmp_path: Path) -> None:
    place.train(tmp_path / "run", max_steps=4, logging_steps=1, eval_steps=2)
    picture = tmp_path / "a.svg"
    code, out, err = run(capsys, "plot", tmp_path / "run", "--output", picture)
    assert (code, out, err) == (0, f"Written to {picture}\n", "")
    text = picture.read_text()  # matplotlib writes each text as a comment beside its outlines
    for words in ("layer 1", "layer 2", "total loss", "KL from the base model", "learning rate"):
        assert f"<!-- {words} -->" in text


def test_several_runs_in_the_current_folder(capsys: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / LOG).write_text(ROW)
    assert run(capsys, "plot", "a", f"b/{LOG}") == (0, "Written to plot.png\n", "")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_wrong_is_one_line(capsys: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    cases: list[tuple[list[object], int, str]] = [
        (["plot"], 2, "RUNS"),
        (["plot", "none"], 1, "none: does not exist"),
        (["plot", "a"], 1, f"a: has no {LOG}; name the folder of a run"),
        (["plot", "a", "--output", "b.xyz"], 1, "the name must end in .png, .svg or .pdf"),
        (["merge", "--checkpoints", "x", "--output", "y", "--plot", "a.bmp"], 1, "must end in"),
        (
            ["merge", "--checkpoints", "x", "--output", "y", "--dry-run", "--plot", "a.png"],
            1,
            "--plot draws what was merged; leave out --dry_run or --plot",
        ),
        (["analyze", "--checkpoint", "x", "--plot", "none/a.png"], 1, "there is no folder none"),
    ]
    for given, expected_code, expected in cases:
        code, out, err = run(capsys, *given)
        assert (code, out) == (expected_code, ""), err
        assert err.startswith("Error: ") and err.count("\n") == 1 and expected in err, err
    (tmp_path / "a" / LOG).write_text(ROW + "oops\n")
    code, out, err = run(capsys, "plot", "a")
    assert (code, out) == (1, "") and err.startswith(f"Error: a/{LOG}: line 2: not valid JSON")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_merge_and_analyze(capsys: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for layer in (3, 5):
        trained_checkpoint(tmp_path / f"run{layer}", layer)
    merging = ["merge", "--checkpoints", "run3", "run5", "--output", "both", "--plot", "m.svg"]
    code, _, err = run(capsys, *merging)
    assert (code, err) == (0, "")
    code, _, err = run(capsys, "analyze", "--checkpoint", "run3", "both", "--plot", "a.svg")
    assert code == 0, err
    tree, whole = (Path(name).read_text() for name in ("m.svg", "a.svg"))
    for text, words in ((tree, "layer 3, step 3"), (whole, "layer 3, step 3"), (whole, "W_b_up")):
        assert words in text
    assert "W_b_up" not in tree
