"""``npt-fast serve`` without vLLM: what it checks before a server starts."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from npt_fast.vllm import server
from tests.checkpoints import run

HERE = metadata.EntryPoints(
    [metadata.EntryPoint("npt_fast", "npt_fast.vllm.plugin:register", "vllm.general_plugins")]
)


@pytest.fixture
def as_if_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "find_spec", lambda _: object())
    monkeypatch.setattr(server, "entry_points", lambda *, group: HERE.select(group=group))
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)


def refused(capsys: Any, model: Any) -> str:
    code, out, err = run(capsys, "serve", model, "--port", "1")
    assert (code, out) == (1, "") and err.startswith("Error: ") and err.count("\n") == 1
    return str(err)


def test_the_model_comes_first(capsys: Any) -> None:
    code, _, err = run(capsys, "serve", "--port", "1", "served")
    assert code == 2 and "the model comes first: npt-fast serve MODEL --port" in err


def test_vllm_is_missing(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "find_spec", lambda _: None)
    assert "needs the package vllm; pip install 'npt_fast[serve]'" in refused(capsys, "x")


def test_the_plugin_is_missing(
    capsys: Any, as_if_there: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "npt_fast2,other")
    assert "VLLM_PLUGINS is 'npt_fast2,other'; add npt_fast" in refused(capsys, "x")
    monkeypatch.setattr(server, "entry_points", lambda *, group: metadata.EntryPoints())
    assert "vLLM does not find npt_fast's plugin" in refused(capsys, "x")


def test_the_folder_is_no_export(
    capsys: Any,
    as_if_there: None,
    files: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert "gone: no such folder" in refused(capsys, tmp_path / "gone")
    for folder in (*files, tmp_path):
        assert "is no exported model; npt-fast export writes one" in refused(capsys, folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "is no folder, and the Hub does not have it" in refused(capsys, "nobody/nothing")
    own = {"model_type": "npt_fast-llama", "architectures": ["NPTAquilaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(own))
    assert "SmolLM3ForCausalLM, not in NPTAquilaForCausalLM" in refused(capsys, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    assert "config.json: not valid JSON" in refused(capsys, tmp_path)
