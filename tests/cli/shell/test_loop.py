"""The loop: JSON, scripts, errors, and the log."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import npt_fast as npt
from npt_fast.transfer import journal
from npt_fast.transfer.session import Session
from tests.cli.shell.piped import Shell
from tests.training import tiny


def test_one_json_object_per_command(shell: Shell) -> None:
    """The figures equal the library's."""
    code, found = shell.json(
        "# a comment", "", "/track x", '!extract a "first"', 'inject a "other" -tokens 3', "exit",
        "never reached",
    )  # fmt: skip
    assert code == 0
    assert [entry["command"] for entry in found] == [
        "track x", 'extract a "first"', 'inject a "other" -tokens 3', "exit",
    ]  # fmt: skip
    assert all(entry["ok"] for entry in found)
    result = found[2]["result"]
    model, tokenizer = tiny.model(initializer_range=0.2), tiny.tokenizer()
    npt.load(model, shell.checkpoint)
    modulation = npt.extract(model, tokenizer, "first")
    ids = tokenizer("other", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        before = model(ids).logits[0, -1].softmax(-1)
        with npt.inject(model, modulation):
            after = model(ids).logits[0, -1].softmax(-1)
    assert result["kl"] == pytest.approx((before * (before / after).log()).sum().item(), abs=1e-5)
    (x,) = tokenizer("x")["input_ids"]
    assert result["tracked"] == [
        {"text": "x", "before": pytest.approx(before[x].item(), abs=1e-6),
         "after": pytest.approx(after[x].item(), abs=1e-6), "base": None},
    ]  # fmt: skip
    assert (result["layers"], result["positions"], len(result["injected"])) == ([1, 2], [4], 3)


def test_the_first_error_stops(shell: Shell) -> None:
    code, out, err = shell.pipe("extract a first", "inject b text", "list")
    assert (code, err) == (1, "Error: line 2: no modulation is called 'b'; there are a\n")
    assert "Name" not in out
    code, out, err = shell.pipe("inject b text", "list", options=["--keep-going"])
    assert (code, out) == (1, "No saved modulations\n")
    assert err == "Error: line 1: no modulation is called 'b'; extract one first\n"


def test_scripts(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "inner").write_text("extract a first\n")
    (tmp_path / "outer").write_text("# é\n\nrun inner\nlist\n")
    code, found = shell.json(options=["--script", "outer"])
    assert code == 0
    assert [entry["command"] for entry in found] == ["run inner", "extract a first", "list"]
    (tmp_path / "circle").write_text("run circle\n")
    code, out, err = shell.pipe(options=["--script", "circle"])
    assert code == 1 and err.count("\n") == 1 and "scripts run each other" in err
    (tmp_path / "inner").write_text("extract\nlist\n")
    code, out, err = shell.pipe(options=["--script", "outer"])
    assert (code, out) == (1, "Running inner\n")
    assert err == (
        "Error: line 3: run inner, line 1: NAME is missing: extract NAME TEXT [-pos X]\n"
    )
    code, out, err = shell.pipe(options=["--script", "outer", "--keep-going"])
    assert (code, out) == (1, "Running inner\nNo saved modulations\nNo saved modulations\n")


def test_a_bug_does_not_end_the_session(shell: Shell) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("shapes\ndo not fit")

    shell.monkeypatch.setattr(Session, "predict", broken)
    code, out, err = shell.pipe("test text", "list", options=["--keep-going"])
    assert (code, out) == (1, "No saved modulations\n")
    assert err == ("Error: line 1: unexpected RuntimeError: shapes do not fit; please report it\n")


def test_a_log_that_cannot_go_on_does_not_end_the_session(shell: Shell) -> None:
    shell.monkeypatch.setattr("npt_fast.transfer.journal._MAX_BYTES", 3000)
    code, out, err = shell.pipe("extract a first", *["list"] * 20, options=["--log", "log"])
    assert code == 1 and out.count("Extracted") == 1
    assert err.count("\n") == 1 and "log: is full" in err and "no longer logged" in err
    assert len(journal.read("log")[1]) >= 1
