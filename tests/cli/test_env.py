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
    assert found["commit"] and found["device"]
    _, out, _ = run(capsys, "env")
    assert out.splitlines() == [f"{name}: {value}" for name, value in found.items()]


def test_every_gpu_is_listed(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["uuid, name", "GPU-1, NVIDIA H200", "GPU-2, NVIDIA H200"]
    monkeypatch.setattr("npt_fast.benchmarks.device.device_state", lambda: lines)
    _, out, _ = run(capsys, "env", "--json")
    assert json.loads(out)["nvidia-smi"] == "; ".join(lines)


def test_a_torch_that_cannot_be_imported(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "npt_fast.benchmarks.device", None)
    code, out, _ = run(capsys, "env", "--json")
    assert code == 0
    assert json.loads(out)["device"].startswith("not known: ")
