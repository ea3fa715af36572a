"""Merging and describing checkpoints of the Hub: what is downloaded when, counted in bytes."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

import npt_fast as npt
from tests.checkpoints import contents, layer_weights, run, trained_checkpoint, write_checkpoint
from tests.hub import Hub

WIDE = {"d": 256, "f": 512, "rank": 32}
"""Sizes with tensors of 32 kB and more, so that headers are a small part of a file."""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for temporary files, in which nothing may remain."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def add(hub: Hub, tmp_path: Path, layer: int, format: str = "pt", **sizes: Any) -> Path:
    """A repository ``org/<layer>`` with a trained checkpoint; returns the same folder."""
    folder = trained_checkpoint(tmp_path / f"given{layer}", layer, **{**WIDE, **sizes})
    if format != "pt":
        options = npt.MergeOptions(format="safetensors", max_shard_size=300_000)
        npt.merge(folder, tmp_path / f"{layer}", options=options)
        folder = tmp_path / f"{layer}"
    hub.add(f"org/{layer}", folder)
    return folder


def weights_sent(hub: Hub) -> int:
    return sum(n for name, n in hub.sent.items() if name.endswith((".pt", ".safetensors")))


def weights_size(*folders: Path) -> int:
    files = (path for folder in folders for path in folder.iterdir())
    return sum(f.stat().st_size for f in files if f.suffix in (".pt", ".safetensors"))


@pytest.mark.parametrize("format", ["pt", "safetensors"])
def test_a_dry_run_fetches_headers(
    format: str, hub: Hub, tmp_path: Path, temporary: Path, capsys: Any
) -> None:
    local = [add(hub, tmp_path, layer, format) for layer in (5, 6)]
    report = npt.merge(["org/5", "org/6"], tmp_path / "out", dry_run=True)
    expected = npt.merge(local, tmp_path / "out", dry_run=True)
    assert report.files.keys() == expected.files.keys()
    assert report.files["npt_config.json"] > 0
    assert [info.architecture for info in report.layers] == [
        info.architecture for info in expected.layers
    ]
    assert report.global_step == expected.global_step == 3
    assert weights_sent(hub) < weights_size(*local) / 5
    commit = hub.repos["org/5"].refs["main"]
    assert report.layers[0].source == f"hf://org/5@{commit}"
    assert report.notes[0].startswith(f"hf://org/5@{commit}: only headers were read of ")
    assert not (tmp_path / "out").exists() and not list(temporary.iterdir())
    code, out, err = run(
        capsys, "merge", "org/5", "org/6:6", "--output", tmp_path / "out", "--dry_run"
    )
    assert (code, err) == (0, "") and "Would merge layers: [5, 6]" in out


def test_a_conflict_is_known_before_weights_are_fetched(
    hub: Hub, tmp_path: Path, temporary: Path, capsys: Any
) -> None:
    local = [add(hub, tmp_path, 5, "safetensors"), add(hub, tmp_path, 6, "safetensors", d=128)]
    out = tmp_path / "out"
    code, _, err = run(capsys, "merge", "org/5", "org/6", "--output", out)
    assert code == 1 and err.count("\n") == 1
    assert "hf://org/6@" in err and "was trained on another base model: hidden_size 128" in err
    assert weights_sent(hub) < weights_size(*local) / 5
    assert not out.exists() and not list(temporary.iterdir())


def test_a_broken_checkpoint_is_known_before_weights_are_fetched(
    hub: Hub, tmp_path: Path, temporary: Path
) -> None:
    local = [add(hub, tmp_path, 5), add(hub, tmp_path, 6)]
    repo = hub.repos["org/6"]
    repo.commit({**repo.files, "npt_weights.pt": repo.files["npt_weights.pt"][:-4000]})
    with pytest.raises(npt.CheckpointError) as caught:
        npt.merge(["org/5", "org/6"], tmp_path / "out")
    assert str(caught.value).startswith(
        f"hf://org/6@{repo.refs['main']}/npt_weights.pt: does not end"
    )
    assert weights_sent(hub) < weights_size(*local) / 5
    assert not (tmp_path / "out").exists() and not list(temporary.iterdir())


def test_a_merge_is_that_of_the_same_folders(hub: Hub, tmp_path: Path) -> None:
    local = [add(hub, tmp_path, layer) for layer in (5, 6)]
    report = npt.merge(["org/5", "org/6"], tmp_path / "out", verify=True)
    npt.merge(local, tmp_path / "expected", verify=True)
    found, expected = contents(tmp_path / "out"), contents(tmp_path / "expected")
    for name in ("npt_weights.pt", "merge_digests.txt"):
        assert found[name] == expected[name]
    assert report.verification is not None and report.verification.passed
    summary = json.loads(found["merge_summary.json"])
    commits = [hub.repos[f"org/{n}"].refs["main"] for n in (5, 6)]
    assert summary["layer_sources"] == {
        "5": f"hf://org/5@{commits[0]}",
        "6": f"hf://org/6@{commits[1]}",
    }
    assert summary["working_directory"] is None
    # sources in the cache are compared with, and never asked for
    hub.requests.clear()
    again = npt.verify(tmp_path / "out")
    assert again.passed and again.compared == again.tensors and not hub.requests


def test_verify_downloads_nothing_that_a_file_names(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(hub, tmp_path, 5)
    npt.merge("org/5", tmp_path / "out", verify=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    hub.requests.clear()
    found = npt.verify(tmp_path / "out")
    assert found.passed and not hub.requests
    assert "is not in the Hub's cache" in found.notes[0]
    path = tmp_path / "out" / "merge_summary.json"
    content = json.loads(path.read_text())
    content["inputs"][0]["path"] = "org/5"
    path.write_text(json.dumps(content))
    assert "Checkpoint not found: org/5" in npt.verify(tmp_path / "out").notes[0]
    assert not hub.requests


def test_analyze_fetches_headers(hub: Hub, tmp_path: Path, capsys: Any, temporary: Path) -> None:
    local = [add(hub, tmp_path, 5), add(hub, tmp_path, 6, "safetensors")]
    for name, folder in zip(("org/5", "org/6"), local, strict=True):
        report, expected = npt.inspect(name), npt.inspect(folder)
        assert report.path == f"hf://{name}@{hub.repos[name].refs['main']}"
        assert report.layers == expected.layers and report.files == expected.files
        assert report.training_state == expected.training_state
    assert npt.can_merge(["org/5", "org/6"]).layers == [5, 6]
    assert weights_sent(hub) < weights_size(*local) / 2  # the headers, three times
    code, out, err = run(capsys, "analyze", "org/5", "org/6")
    assert (code, err) == (0, "") and "Yes: the result would have layers [5, 6]" in out
    assert not list(temporary.iterdir())
    norms = npt.inspect("org/5", values=True).layers[0].details[0].norm
    assert norms == npt.inspect(local[0], values=True).layers[0].details[0].norm


def test_a_server_without_ranges(hub: Hub, tmp_path: Path) -> None:
    hub.ranges = False
    add(hub, tmp_path, 5)
    assert npt.merge("org/5", tmp_path / "out", dry_run=True).layers[0].layer == 5
    weights = layer_weights(6, d=1024, f=1024, rank=256)  # more than is fetched for a header
    hub.add("org/6", write_checkpoint(tmp_path / "large", weights))
    with pytest.raises(npt.CheckpointError, match="its server sends whole"):
        npt.merge("org/6", tmp_path / "out", dry_run=True)
    assert npt.inspect("org/6", values=True).layers[0].layer == 6


def test_a_cut_connection(hub: Hub, tmp_path: Path, temporary: Path) -> None:
    add(hub, tmp_path, 5)
    hub.cut = {"npt_weights.pt": 0}
    with pytest.raises(npt.CheckpointError) as caught:
        npt.merge("org/5", tmp_path / "out")
    assert "org/5" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() and not list(temporary.iterdir())


def test_offline(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(hub, tmp_path, 5)
    npt.merge("org/5", tmp_path / "first")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    npt.merge("org/5", tmp_path / "again")
    assert contents(tmp_path / "again").keys() == contents(tmp_path / "first").keys()
    with pytest.raises(npt.CheckpointError, match="org/6: no such path, and the Hub is turned off"):
        npt.merge("org/6", tmp_path / "other")
