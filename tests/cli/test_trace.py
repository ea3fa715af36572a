"""``npt-fast trace``: a table, JSON, a picture, and the answer in the last line."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from npt_fast.hf.base_model import load_base_model
from npt_fast.transfer.trace import trace
from tests.checkpoints import run
from tests.training.runs import Place


def arguments(place: Place, *more: object) -> list[object]:
    return ["trace", "--model_name", place.base, "--cpu", "--from", "abc", "--to", "dea", *more]


def test_json_is_the_librarys(place: Place, capsys: Any) -> None:
    more = ["--track", "a", "b", "--window", 2, "--from_position", "-2", "--to_position", "first"]
    code, out, err = run(capsys, *arguments(place, *more, "--json"))
    assert (code, err) == (0, "")
    model, tokenizer = load_base_model(str(place.base))
    expected = trace(
        model, tokenizer, "abc", "dea", tracked=["a", "b"], window=2,
        source_position=-2, target_position=0,
    )  # fmt: skip
    found = json.loads(out)
    assert found.pop("decisive") == [patch.layers for patch in expected.decisive]
    assert found.pop("strongest") == expected.strongest.layers
    assert found.pop("finding") == expected.finding
    assert found == json.loads(json.dumps(asdict(expected)))


def test_a_table_and_a_picture(place: Place, capsys: Any, tmp_path: Path) -> None:
    picture = tmp_path / "trace.png"
    code, out, _ = run(capsys, *arguments(place, "--track", "a", "--plot", picture))
    assert code == 0 and picture.stat().st_size > 5000
    lines = out.splitlines()
    assert lines[0].startswith("From: 'abc' at token 2 'c'; likeliest ")
    assert lines[1].startswith("To: 'dea' at token 2 'a'; likeliest ")
    assert lines[2].split("|")[1].strip() == "layer" and "'a'" in lines[2] and "top-1" in lines[2]
    table = lines[4:8]
    assert [line.split("|")[1].strip() for line in table] == ["0", "1", "2", "3"]
    assert all(line.count(" -> ") >= 1 for line in table)
    changed = [line for line in table if "->" in line.split("|")[4]]
    assert lines[8].startswith("Layers that change the answer: " if changed else "No layer")
    assert lines[-1].startswith("The attention of layer" if changed else "No layer")


def test_no_layer_matters(place: Place, capsys: Any) -> None:
    given = ["trace", "--model_name", place.base, "--cpu", "--from", "abc", "--to", "abc"]
    code, out, _ = run(capsys, *given, "--window", 2)
    assert code == 0
    assert out.splitlines()[-1].startswith("No layer changes the answer, which stays ")
    assert [line.split("|")[1].strip() for line in out.splitlines()[4:-1]] == ["0-1", "1-2", "2-3"]


def test_what_is_wrong_is_one_line(place: Place, capsys: Any, tmp_path: Path) -> None:
    cases: list[tuple[list[object], int, str]] = [
        (["--window", 0], 2, "window"),
        (["--window", 9], 1, "a window of 9 layers: the model has 4"),
        (["--from_position", "somewhere"], 1, "'somewhere' is not a position"),
        (["--to_position", "at:q"], 1, "'q' does not occur in 'dea'"),
        (["--cross_relation", "b"], 1, "cross_relation 'b': write {} for the subject"),
        (["--plot", tmp_path / "none" / "a.png"], 1, "cannot be written"),
    ]
    for more, expected_code, expected in cases:
        code, out, err = run(capsys, *arguments(place, *more))
        assert (code, out) == (expected_code, ""), err
        assert err.startswith("Error: ") and err.count("\n") == 1 and expected in err
    code, _, err = run(capsys, "trace", "--from", "abc")
    assert code == 2 and "--to" in err


def test_how_texts_are_read(place: Place, bos_base: Path, capsys: Any) -> None:
    bos = replace(place, base=bos_base)
    for option, where in (
        ([], "From: '<bos>abc' at token 3 'c'; "),
        (["--no-special-tokens"], "From: 'abc' at token 2 'c'; "),
        (["--chat"], "From: '<bos>user:abc;me:' at token 12 ':'; "),
    ):
        code, out, err = run(capsys, *arguments(bos, *option))
        assert (code, err) == (0, "") and out.startswith(where)
