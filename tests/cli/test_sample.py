"""``npt-fast sample``: a text by one command, as training data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import npt_fast as npt
from npt_fast.hf.base_model import load_base_model
from tests.checkpoints import run
from tests.training.runs import LENGTH, Place


def arguments(place: Place, output: Path, *more: object) -> list[object]:
    return [
        "sample", "--model_name", place.base, "--output", output, "--tokens", 20 * LENGTH,
        "--max_length", LENGTH, "--cpu", *more,
    ]  # fmt: skip


def test_a_text_to_train_on(place: Place, capsys: Any, tmp_path: Path) -> None:
    path = tmp_path / "self.jsonl"
    code, out, err = run(capsys, *arguments(place, path, "--seed", 5))
    assert (code, err) == (0, "")
    first, second, third = out.splitlines()
    assert first == f"Sampled {20 * LENGTH} tokens from {place.base}, seed 5"
    assert second.endswith(" of 20 rows are read back as the same tokens")
    assert third == f"Text saved to: {path}"
    model, tokenizer = load_base_model(str(place.base))
    ids = npt.sample_text(model, tokenizer, 20 * LENGTH, max_length=LENGTH, seed=5)
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    assert texts == [text.rstrip("\ufffd") for text in tokenizer.batch_decode(ids)]
    code, _, err = run(capsys, *place.arguments(tmp_path / "run", data=path, max_steps=1))
    assert code == 0, err


def test_first_tokens_and_json(place: Place, capsys: Any, tmp_path: Path) -> None:
    path = tmp_path / "self.jsonl"
    more = ["--first_tokens", "ab", "c", "--json"]
    code, out, err = run(capsys, *arguments(place, path, *more))
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report == {
        "model_name": str(place.base), "seed": 42, "rows": 20, "tokens": 20 * LENGTH,
        "same": report["same"],
    }  # fmt: skip
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    assert all(text.startswith("ab" if n % 2 == 0 else "c") for n, text in enumerate(texts))


@pytest.mark.parametrize(
    ("more", "code", "problem"),
    [
        (["--tokens", 0], 2, "Must be >= 1"),
        (["--tokens", 10**30], 2, "Must be <= 100000000"),
        (["--max_length", 1], 2, "Must be >= 2"),
        (["--output", "a.txt"], 1, "must end in .jsonl"),
        (["--output", "none/a.jsonl"], 1, "there is no folder none"),
        (["--first_tokens", ""], 1, "first_tokens: a text is empty"),
        (["--first_tokens", "a" * LENGTH], 1, "leave nothing to sample"),
    ],
)
def test_one_line(
    place: Place, capsys: Any, tmp_path: Path, more: list[object], code: int, problem: str
) -> None:
    given = arguments(place, tmp_path / "a.jsonl")
    if more[0] in given:
        given[given.index(more[0]) + 1] = more[1]
    else:
        given += more
    found, out, err = run(capsys, *given)
    assert (found, out) == (code, "")
    assert err.startswith("Error: ") and err.count("\n") == 1 and problem in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["train", "evaluate"])
@pytest.mark.parametrize("data", ["self:abc", "self:0", "self:-1", "self:999999999", "a,,self"])
def test_data_that_is_no_text(verb: str, data: str, capsys: Any) -> None:
    needed = {"train": ["--train_layers", "1"], "evaluate": ["--checkpoint", "a"]}[verb]
    code, out, err = run(capsys, verb, *needed, f"--data={data}")
    assert (code, out) == (2, "")
    assert err.startswith("Error: ") and err.count("\n") == 1
    assert "is not self or self:TOKENS" in err or "the path is empty" in err
