"""``npt-fast compare``: what the library finds, as lines, JSON and a report."""

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
from npt_fast.transfer.generate import Sampling
from tests.checkpoints import run
from tests.training.runs import Place


def arguments(place: Place, checkpoint: Path, *more: object) -> list[object]:
    return [
        "compare", "--checkpoint", checkpoint, "--model_name", place.base, "--cpu",
        "--from", "abc", "--prompt", "dead", *more,
    ]  # fmt: skip


def test_json_is_the_librarys(place: Place, checkpoint: Path, capsys: Any) -> None:
    more = [
        "--layers", "2", "--sequence", "--position", "-2", "--mode", "exact-add",
        "--strength", "-1.5", "--when", "both", "--tokens", 4, "--track", "a", " b",
    ]  # fmt: skip
    code, out, err = run(capsys, *arguments(place, checkpoint, *more, "--json"))
    assert (code, err) == (0, "")
    model, tokenizer = load_base_model(str(place.base))
    npt.load(model, checkpoint, layers=[2])
    source = npt.extract(model, tokenizer, "abc", position="all", reduce="mean")
    expected = compare(
        model, tokenizer, source, "dead",
        Injection(position=-2, mode="exact-add", strength=-1.5, when="both"),
        sampling=Sampling(tokens=4), tracked=["a", " b"],
    )  # fmt: skip
    found = json.loads(out)
    assert found["layers"] == [2] and found["positions"] == [2]
    assert (found["no_injection"], found["injected"]) == (expected.no_injection, expected.injected)
    assert found["kls"] == pytest.approx(expected.kls)
    assert [t["after"] for t in found["tracked"]] == pytest.approx(
        [token.after for token in expected.tracked]
    )
    assert (found["mode"], found["strength"], found["when"]) == ("exact-add", -1.5, "both")
    assert found["reading"] == {"special_tokens": True, "chat": False}
    assert found["modulation"] == source.description
    assert found["injected"] != found["no_injection"]


def test_lines_and_a_report(place: Place, checkpoint: Path, capsys: Any, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    code, out, _ = run(
        capsys, *arguments(place, checkpoint, "--tokens", 3, "--track", "a", "--html", report)
    )
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == f"Checkpoint: {checkpoint}"
    assert "Hit: layers [1, 2], tokens 3 'd'" in lines and "Prompt: dead" in lines
    assert any(line.startswith("  no injection: ") for line in lines)
    assert any(line.startswith("  injected: ") for line in lines)
    assert any(line.startswith("| 'a' ") for line in lines)
    html = report.read_text()
    assert str(checkpoint) in html and "What an injection does" in html


def test_what_is_wrong_is_one_line(
    place: Place, checkpoint: Path, capsys: Any, tmp_path: Path
) -> None:
    cases: list[tuple[list[object], int, str]] = [
        (["--mode", "ad"], 2, "mode"),
        (["--layers", "x"], 2, "'x' is not a list of layers"),
        (["--tokens", 0], 2, "tokens"),
        (["--layers", "3"], 1, "has no layer 3, only [1, 2]"),
        (["--position", 9], 1, "position 9 is outside the text"),
        (["--position", "at:q"], 1, "'q' does not occur in 'dead'"),
        (["--html", tmp_path / "none" / "a.html"], 1, "none"),
    ]
    for more, expected_code, expected in cases:
        code, out, err = run(capsys, *arguments(place, checkpoint, *more))
        assert (code, out) == (expected_code, ""), err
        assert err.startswith("Error: ") and err.count("\n") == 1 and expected in err
    code, _, err = run(capsys, "compare", "--from", "a", "--prompt", "b")
    assert code == 2 and "--checkpoint" in err


@pytest.mark.parametrize(
    ("option", "tokens"),
    [
        ([], ["<bos>", *"dead"]),
        (["--no-special-tokens"], list("dead")),
        (["--chat"], ["<bos>", *"user:dead;me:"]),
    ],
)
def test_how_texts_are_read(
    place: Place,
    bos_base: Path,
    checkpoint: Path,
    capsys: Any,
    option: list[str],
    tokens: list[str],
) -> None:
    bos = replace(place, base=bos_base)
    code, out, err = run(capsys, *arguments(bos, checkpoint, *option, "--json"))
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["prompt"] == tokens and found["positions"] == [len(tokens) - 1]
    _, out, _ = run(capsys, *arguments(bos, checkpoint, *option))
    last = f"{len(tokens) - 1} {tokens[-1]!r}"
    assert f"Hit: layers [1, 2], tokens {last}" in out.splitlines()
    how = {"--chat": "as a chat message", "--no-special-tokens": "without special tokens"}
    assert f"Reading: {how.get(*option, '') if option else 'with special tokens'}" in out
    source = [*tokens[: tokens.index("d")], *"abc", *tokens[tokens.index("d") + 4 :]]
    assert f'Modulation: "abc" at {len(source) - 1} {source[-1]!r}' in out.splitlines()


def test_a_chat_without_a_template(place: Place, checkpoint: Path, capsys: Any) -> None:
    code, out, err = run(capsys, *arguments(place, checkpoint, "--chat"))
    assert (code, out) == (1, "") and err.count("\n") == 1
    assert err == f"Error: {place.base}: the tokenizer has no chat template; leave out the chat\n"
    code, _, err = run(capsys, *arguments(place, checkpoint, "--chat", "--no-special-tokens"))
    assert code == 2 and "a chat template writes special tokens" in err


def test_generated_tokens_are_named(
    place: Place, checkpoint: Path, capsys: Any, tmp_path: Path
) -> None:
    report = tmp_path / "report.html"
    more = ["--when", "decode", "--tokens", 3, "--html", report]
    _, out, _ = run(capsys, *arguments(place, checkpoint, *more))
    assert "Hit: layers [1, 2], tokens the generated ones" in out.splitlines()
    html = report.read_text()
    assert "the generated ones" in html and 'class="hit"' not in html
