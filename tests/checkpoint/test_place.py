"""Checkpoints on the Hub: names, downloads, the cache, and what goes wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

import npt_fast as npt
from npt_fast.checkpoint.checkpoint import open_checkpoint
from npt_fast.checkpoint.place import hub_name
from npt_fast.errors import HubError
from npt_fast.hub import HubName
from tests.checkpoints import (
    contents,
    layer_weights,
    trained_checkpoint,
    write_checkpoint,
    write_shards,
)
from tests.hub import Hub


def turn_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def refuse(problem: str, name: str, kind: type[npt.NPTError] = HubError) -> None:
    with pytest.raises(kind) as caught:
        open_checkpoint(name)
    assert problem in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("given", ["repo", "/a/b", "a/b/c", "a/b.pt", "a/b.safetensors", "./a"])
def test_paths_are_no_names(given: str) -> None:
    assert hub_name(given) is None


def test_what_is_on_the_disk_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trained_checkpoint(tmp_path / "org" / "repo", 1)
    trained_checkpoint(tmp_path / "run" / "checkpoints" / "checkpoint-3", 1)
    assert hub_name("org/repo") is None and hub_name("run/checkpoint-3") is None
    assert open_checkpoint("run/checkpoint-3").given == "run/checkpoint-3"
    assert hub_name("hf://org/repo") == HubName("hf://org/repo", "org/repo")
    with pytest.raises(npt.CheckpointError, match="org/repo: is a path, which has no revisions"):
        hub_name("org/repo", "v1")
    with pytest.raises(npt.CheckpointError, match="hf://org: names on the Hub are hf://org/repo"):
        hub_name("hf://org")
    with pytest.raises(npt.CheckpointError, match=r"^https://hub/org/repo: names on the Hub"):
        open_checkpoint("https://hub/org/repo")


def test_a_checkpoint_is_opened_by_its_commit(hub: Hub, tmp_path: Path) -> None:
    folder = trained_checkpoint(tmp_path / "a", 5)
    repo = hub.add("org/repo", folder, **{"README.md": b"card", "model.py": b"evil"})
    opened = open_checkpoint("org/repo")
    assert opened.given == f"hf://org/repo@{repo.refs['main']}"
    assert opened.directory is not None and contents(opened.directory) == contents(folder)
    assert not {"org/repo/README.md", "org/repo/model.py"} & hub.sent.keys()


def test_what_is_cached_is_not_fetched_again(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/repo", trained_checkpoint(tmp_path / "a", 5))
    first = open_checkpoint("org/repo")
    sent = hub.sent.total()
    again = open_checkpoint("org/repo@main")
    assert (again.directory, hub.sent.total()) == (first.directory, sent)
    assert first.notes == again.notes == ()
    turn_off(monkeypatch)
    for name in ("org/repo", "org/repo@main", first.given):
        found = open_checkpoint(name)
        assert found.directory == first.directory
        assert "(HF_HUB_OFFLINE); using what is in the cache" in found.notes[0]
    assert npt.inspect("org/repo").files == {
        path.name: path.stat().st_size for path in (tmp_path / "a").iterdir()
    }


def test_revisions(hub: Hub, tmp_path: Path) -> None:
    old = trained_checkpoint(tmp_path / "old", 5)
    repo = hub.add("org/repo", trained_checkpoint(tmp_path / "new", 6))
    commit = repo.commit({path.name: path.read_bytes() for path in old.iterdir()}, "v1")
    assert list(open_checkpoint("org/repo").modules) == [6]
    assert list(open_checkpoint("org/repo@v1").modules) == [5]
    assert list(open_checkpoint(f"hf://org/repo@{commit}").modules) == [5]
    refuse("org/repo@v2: has no revision v2 on the Hub", "org/repo@v2")


def test_what_the_hub_does_not_give(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = hub.add("org/repo", trained_checkpoint(tmp_path / "a", 5))
    refuse("org/gone: no such path, and the Hub has no such", "org/gone")
    refuse("hf://org/gone: the Hub has no such repository, or a private one", "hf://org/gone")
    repo.gated = True
    refuse("org/repo: is gated on the Hub: ask for access on its page, and log in", "org/repo")
    hub.down = 503
    refuse("the Hub answers 503", "org/repo")
    hub.down = 403
    refuse("org/repo: no such path, and the Hub answers 403 Forbidden; log in (hf", "org/repo")
    hub.down = 429
    refuse("answers 429 Too Many Requests; wait some minutes, or log in", "hf://org/repo")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    refuse("org/repo: no such path, and the Hub cannot be reached: ", "org/repo")
    turn_off(monkeypatch)
    refuse("org/repo: no such path, and the Hub is turned off (HF_HUB_OFFLINE)", "org/repo")


def test_other_repositories(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    hub.add("org/model", tmp_path / "model")
    refuse("org/model: holds no NPT weights on the Hub", "org/model", npt.CheckpointError)
    assert not hub.sent


def test_a_hostile_repository(hub: Hub, tmp_path: Path) -> None:
    folder = trained_checkpoint(tmp_path / "a", 5)
    escape = f"../../{tmp_path.name}-escaped/npt_config.json"
    repo = hub.add("org/repo", folder, **{escape: b"{}", "sub/npt_config.json": b"{}"})
    assert open_checkpoint("org/repo").description is None
    assert set(hub.sent) == {f"org/repo/{path.name}" for path in folder.iterdir()}
    hub.sent.clear()
    repo.commit({**repo.files, "npt_config.json": b" " * (5 << 20)})
    refuse("npt_config.json: 5,242,880 bytes of JSON; more than", "org/repo", npt.CheckpointError)
    assert not hub.sent
    for size in ("12", 1.5, -1, 1 << 70, None):
        hub.lies = {"npt_weights.pt": size}
        refuse("org/repo: the Hub's answer lacks a commit, or a file's name or size", "org/repo")
    hub.lies = {}
    repo.commit({**contents(folder), "npt_weights.pt": b"cos\nsystem\n(S'touch canary'\ntR."})
    refuse("a plain pickle, which can run code", "org/repo", npt.CheckpointError)
    index = b'{"weight_map": {"layer_5_np.W_down": "../../../token"}}'
    repo.commit({"npt_weights.safetensors.index.json": index})
    refuse("not a file beside it", "org/repo", npt.CheckpointError)


def test_an_interrupted_download_goes_on(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the library's retries
    folder = trained_checkpoint(tmp_path / "a", 5)
    hub.add("org/repo", folder)
    size = (folder / "npt_weights.pt").stat().st_size
    hub.cut = {"npt_weights.pt": size // 2}
    refuse("org/repo: the download was interrupted: ", "org/repo")
    turn_off(monkeypatch)
    refuse("(HF_HUB_OFFLINE)", "org/repo")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub.cut = {}
    before = hub.sent["org/repo/config.json"]
    opened = open_checkpoint("org/repo")
    assert opened.directory is not None and contents(opened.directory) == contents(folder)
    assert hub.sent["org/repo/config.json"] == before


def test_forms_of_weights(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/alone", write_checkpoint(tmp_path / "a", layer_weights(5)))
    assert list(open_checkpoint("org/alone").modules) == [5]
    shards = [layer_weights(5), layer_weights(6)]
    hub.add("org/shards", write_shards(tmp_path / "b", shards))
    assert list(open_checkpoint("org/shards").modules) == [5, 6]


def test_verify(hub: Hub, tmp_path: Path) -> None:
    npt.merge(trained_checkpoint(tmp_path / "a", 5), tmp_path / "merged", verify=True)
    repo = hub.add("org/repo", tmp_path / "merged")
    assert npt.verify("org/repo").passed
    weights = bytearray(repo.files["npt_weights.pt"])
    weights[len(weights) // 2] ^= 1
    repo.commit({**repo.files, "npt_weights.pt": bytes(weights)})
    assert not npt.verify("org/repo").passed
