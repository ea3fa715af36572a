"""What the curves of runs show is read back from the figure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from npt_fast.checkpoint.training_log import LOG, RunLog, read_log
from npt_fast.pictures.runs import draw_runs


def run(folder: Path, layers: list[int], steps: range, *, evaluated: bool = False) -> RunLog:
    folder.mkdir(parents=True)
    rows: list[dict[str, Any]] = [
        {
            "step": step,
            "loss/total": 1 / step,
            "training/learning_rate": step / 1000,
            "curriculum/stage": "teacher" if step < 5 else "student",
            **{f"mlp_direct_loss/layer_{n}": (n + 1) / step for n in layers},
        }
        for step in steps
    ]
    if evaluated:
        rows.append({"step": 9, "eval/kl": 0.5, "eval_worst/kl": 0.75})
        rows.append({"step": 10, "eval/kl": None, "eval/perplexity_ratio": 1.5})
    (folder / LOG).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return read_log(folder)


def lines(figure: Any) -> dict[str, list[tuple[list[float], list[float]]]]:
    """The lines of each panel, by its title."""
    return {
        axes.get_title(): [(list(x), list(y)) for x, y in (line.get_data() for line in axes.lines)]
        for axes in figure.axes
    }


def test_every_metric_is_a_line(tmp_path: Path) -> None:
    found = run(tmp_path / "a", [3, 11], range(1, 9), evaluated=True)
    drawn = lines(draw_runs([found]))
    assert list(drawn) == [
        "direct loss of each layer", "total loss", "KL from the base model",
        "perplexity over the base model's", "learning rate", "stage of the curriculum",
    ]  # fmt: skip
    for layer in (3, 11):
        values = [(layer + 1) / step for step in range(1, 9)]
        assert (list(range(1, 9)), values) in drawn["direct loss of each layer"]
    assert drawn["total loss"] == [(list(range(1, 9)), [1 / step for step in range(1, 9)])]
    for value in (0.5, 0.75):
        assert ([9], [value]) in drawn["KL from the base model"]
    assert ([10], [1.5]) in drawn["perplexity over the base model's"]


def test_several_runs_are_told_apart(tmp_path: Path) -> None:
    runs = [run(tmp_path / name, [3], range(1, 9)) for name in ("one", "$two_x^ $")]
    figure = draw_runs(runs)
    total = next(axes for axes in figure.axes if axes.get_title() == "total loss")
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["one", "$two_x^ $"]
    for line, entry in zip(total.lines, legend.get_lines(), strict=True):
        assert line.get_color() == entry.get_color()
        assert line.get_linestyle() == entry.get_linestyle()
    assert total.lines[0].get_color() != total.lines[1].get_color()
    direct = figure.axes[0].lines
    assert direct[0].get_color() == direct[2].get_color()  # a layer's colour in both runs
    assert direct[0].get_linestyle() != direct[2].get_linestyle()
    figure.canvas.draw()  # a name is no formula


def test_runs_of_one_name_are_their_paths(tmp_path: Path) -> None:
    runs = [run(tmp_path / name / "run", [3], range(1, 9)) for name in "ab"]
    (legend,) = draw_runs(runs).legends
    assert [text.get_text()[-5:] for text in legend.get_texts()] == ["a/run", "b/run"]


def test_stages_are_bars_up_to_the_next_one(tmp_path: Path) -> None:
    figure = draw_runs([run(tmp_path / "a", [3], range(1, 9))])
    axes = figure.axes[-1]
    bars = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches]
    assert bars == [(0, 5), (5, 8)]
    assert [text.get_text() for text in axes.texts] == ["teacher", "student"]


@pytest.mark.parametrize("layers", [1, 60])
def test_legends_stay_short(tmp_path: Path, layers: int) -> None:
    figure = draw_runs([run(tmp_path / "a", list(range(layers)), range(1, 9))])
    entries = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert entries[0] == "layer 0" and len(entries) == {1: 1, 60: 20}[layers]
    assert len(figure.axes[0].lines) == 2 * layers
