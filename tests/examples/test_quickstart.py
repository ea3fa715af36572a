"""The notebook's cells run as they are, here on a tiny model in the place of the real one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import npt_fast as npt
from tests.training import tiny

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"


def cells(kind: str) -> list[dict[str, Any]]:
    content = json.loads(NOTEBOOK.read_text())
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    return [cell for cell in content["cells"] if cell["cell_type"] == kind]


def test_the_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.save(tmp_path / "base", layers=24)
    names: dict[str, Any] = {}
    for cell in cells("code"):
        code = "".join(cell["source"]).replace("smollm2-135m", str(tmp_path / "base"))
        exec(compile(code, str(NOTEBOOK), "exec"), names)
    assert names["report"].global_step == 20
    assert [status.layer for status in npt.status(names["model"])] == [23]
    lines = capsys.readouterr().out.splitlines()
    starts = [line.partition(":")[0] for line in lines if "The capital of Germany is" in line]
    assert starts == ["no injection", "injected", "base model"]


def test_outputs_are_of_one_run_from_top_to_bottom() -> None:
    code = cells("code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    kinds = {kind for cell in code for output in cell["outputs"] for kind in output.get("data", ())}
    assert {"text/html", "image/png"} <= kinds
    assert not any(output["output_type"] == "error" for cell in code for output in cell["outputs"])


def test_links_lead_to_files() -> None:
    text = "".join("".join(cell["source"]) for cell in cells("markdown"))
    for guide in ("training", "merging", "transfer"):
        assert f"../docs/{guide}.md" in text
        assert (NOTEBOOK.parents[1] / "docs" / f"{guide}.md").exists()
