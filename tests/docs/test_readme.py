"""README's code runs as it is printed, here on a tiny model in the place of the real one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import npt_fast as npt
from tests.training import tiny

README = Path(__file__).parents[2] / "README.md"


def test_the_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.save(tmp_path / "base", layers=24)
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    assert code.count("smollm2-135m") == 1
    names: dict[str, Any] = {}
    exec(code.replace("smollm2-135m", str(tmp_path / "base")), names)
    assert [status.layer for status in npt.status(names["model"])] == [23]
    injected, plain = capsys.readouterr().out.strip().split("The capital of Germany is")[1:]
    assert injected and plain
