"""``npt-fast sweep``: layers by strengths, as tables, JSON and a report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import npt_fast as npt
from npt_fast.config import Injection
from npt_fast.hf.base_model import load_base_model
from npt_fast.transfer.compare import compare
from tests.checkpoints import run
from tests.training.runs import Place


def arguments(place: Place, checkpoint: Path, *more: object) -> list[object]:
    return [
        "sweep", "--checkpoint", checkpoint, "--model_name", place.base, "--cpu",
        "--from", "abc", "--prompt", "dead", *more,
    ]  # fmt: skip


def test_every_cell_is_a_comparison(place: Place, checkpoint: Path, capsys: Any) -> None:
    more = ["--strength", 0.5, 2, "--mode", "blend", "--position", "first", "--track", "a", "b"]
    code, out, err = run(capsys, *arguments(place, checkpoint, *more, "--json"))
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["layers"] == [[1], [2], [1, 2]] and found["strengths"] == [0.5, 2]
    model, tokenizer = load_base_model(str(place.base))
    npt.load(model, checkpoint)
    source = npt.extract(model, tokenizer, "abc")
    for row, layers in enumerate(found["layers"]):
        for column, strength in enumerate(found["strengths"]):
            expected = compare(
                model, tokenizer, source.only(layers), "dead",
                Injection(position=0, mode="blend", strength=strength), tracked=["a", "b"],
            )  # fmt: skip
            assert found["kl"][row][column] == pytest.approx(expected.kl)
            for token in expected.tracked:
                values = found["tracked"][token.text]
                assert values[row][column] == pytest.approx(token.after)
                assert found["no_injection"][token.text] == pytest.approx(token.before)


def test_tables_and_a_report(place: Place, checkpoint: Path, capsys: Any, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    code, out, _ = run(capsys, *arguments(place, checkpoint, "--track", "a", "--html", report))
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == f"Checkpoint: {checkpoint}"
    heads = [line for line in lines if line.startswith("| layers")]
    assert len(heads) == 2 and all("x 0.25" in head and "x 2" in head for head in heads)
    names = [line.split("|")[1].strip() for line in lines if line.startswith("| ")]
    assert names == ["layers", "------", "1", "2", "1,2"] * 2
    assert "Layer by layer" in report.read_text()


def test_a_column_for_each_token(
    place: Place, checkpoint: Path, capsys: Any, tmp_path: Path
) -> None:
    report = tmp_path / "report.html"
    more = ["--each_token", "--html", report, "--json"]
    code, out, _ = run(capsys, *arguments(place, checkpoint, *more))
    found = json.loads(out)
    assert code == 0 and found["position"] == "all" and found["strengths"] == [1]
    assert found["columns"] == ["0 'd'", "1 'e'", "2 'a'", "3 'd'"]
    assert all(len(row) == 4 for row in found["kl"])
    assert "<th>1 &#x27;e&#x27;</th>" in report.read_text()


def test_what_is_wrong_is_one_line(place: Place, checkpoint: Path, capsys: Any) -> None:
    cases: list[tuple[list[object], int, str]] = [
        (["--strength", "much"], 2, "strength"),
        (["--layers", "3"], 1, "has no layer 3, only [1, 2]"),
        (["--track", ""], 1, "the text is empty"),
    ]
    for more, expected_code, expected in cases:
        code, out, err = run(capsys, *arguments(place, checkpoint, *more))
        assert (code, out) == (expected_code, ""), err
        assert err.startswith("Error: ") and err.count("\n") == 1 and expected in err


def test_how_texts_are_read(place: Place, bos_base: Path, checkpoint: Path, capsys: Any) -> None:
    bos = replace(place, base=bos_base)
    for option, tokens in (([], ["<bos>", *"dead"]), (["--no-special-tokens"], list("dead"))):
        _, out, _ = run(capsys, *arguments(bos, checkpoint, *option, "--each_token", "--json"))
        found = json.loads(out)
        assert found["tokens"] == tokens and found["prompt"] == "dead"
        assert found["columns"] == [f"{place} {token!r}" for place, token in enumerate(tokens)]
    code, out, _ = run(capsys, *arguments(bos, checkpoint, "--chat", "--position", "1"))
    assert code == 0 and "Hit: tokens 1 'u'" in out.splitlines()
    assert "Reading: as a chat message" in out.splitlines()
