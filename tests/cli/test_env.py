"""``npt-fast env``: what a report of a problem needs, even where torch does not work."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from typing import Any

import pytest

import npt_fast as npt
from tests.checkpoints import run


def test_what_it_shows(capsys: Any) -> None:
    code, out, err = run(capsys, "env", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["npt_fast"] == npt.__version__
    assert found["torch"] == version("torch") and found["triton"] == version("triton")
    assert found["commit"] and found["devices"]
    _, out, _ = run(capsys, "env")
    assert out.splitlines() == [f"{name}: {value}" for name, value in found.items()]


def test_gpus_are_named(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, total_memory = "NVIDIA H200", 150_000_000_000

    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda number: Properties)
    _, out, _ = run(capsys, "env", "--json")
    assert json.loads(out)["devices"] == "NVIDIA H200 (150 GB), NVIDIA H200 (150 GB)"


def test_a_torch_that_cannot_be_imported(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    code, out, _ = run(capsys, "env", "--json")
    assert code == 0
    assert json.loads(out)["devices"].startswith("not known: ")
