"""``make fuzz``: it counts inputs and failures, and keeps an input that fails."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.fuzz import __main__ as fuzz


def test_inputs_are_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    assert fuzz.all_targets(["facts"], 0) == 0  # a batch for each core, whatever the time
    name, everything, failed = capsys.readouterr().out.splitlines()
    assert name.split()[0] == "facts" and name.split()[2] == "inputs"
    assert int(name.split()[1]) >= fuzz.BATCH
    assert everything.split()[:2] == ["all", name.split()[1]]
    assert failed == "0 failed"


@pytest.mark.parametrize("end", ["kill -SEGV $$", "echo 'Error: no' >&2; exit 1"])
def test_an_input_that_fails_is_kept(
    end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\nprintf 'a: [' > $5/facts.yaml\n{end}\n")
    program.chmod(0o700)
    monkeypatch.setattr(fuzz, "KEPT", tmp_path / "kept")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(program))
        assert fuzz.all_targets(["facts"], 1) == 1
    out = capsys.readouterr().out
    (kept,) = (tmp_path / "kept").iterdir()
    assert kept.read_bytes() == b"a: ["
    assert ("Error: no" if "echo" in end else "died with -11") in out
    assert f"-m tests.fuzz --again facts {kept}\n" in out
    assert out.splitlines()[-1] != "0 failed"
    assert fuzz.again("facts", str(kept)) == 0
    assert capsys.readouterr().out == "refused, as it should be\n"
