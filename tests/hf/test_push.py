"""Pushing to the Hub: what arrives, the model card, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import npt_fast as npt
from npt_fast.errors import HubError
from tests.checkpoints import contents, flip_byte, trained_checkpoint
from tests.doors import DOORS, Attack, attacks
from tests.hf.exports import Parts, load, logits, write_parts
from tests.hub import TOKEN, Hub

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return write_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(autouse=True)
def logged_in(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def refuse(
    problem: str, folder: Path, repo: str = "me/np", kind: type[npt.NPTError] = HubError, **how: Any
) -> None:
    with pytest.raises(kind) as caught:
        npt.push(folder, repo, **how)
    assert problem in str(caught.value) and "\n" not in str(caught.value)


def test_push_and_load_back(parts: Parts, hub: Hub, tmp_path: Path) -> None:
    report = npt.push(parts.checkpoint, "me/np", private=True)
    repo = hub.repos["me/np"]
    assert repo.private and len(repo.commits) == 2  # the empty one, and one with everything
    pushed = contents(parts.checkpoint)
    assert {n: d for n, d in repo.files.items() if n in pushed} == pushed
    assert set(repo.files) == {*pushed, "README.md", ".gitattributes"}
    assert report.checkpoint == f"hf://me/np@{repo.refs['main']}"
    assert report.files == {name: len(data) for name, data in pushed.items()}
    model = npt.load(load(parts.base), "me/np")
    assert torch.equal(logits(model), logits(parts.by_hand()))
    model = npt.load(load(parts.base), "me/np", revision=repo.refs["main"], layers=[2])
    assert [status.layer for status in npt.status(model)] == [2]
    with pytest.raises(HubError, match="me/np@v2: has no revision v2"):
        npt.load(load(parts.base), "me/np", revision="v2")


def test_what_is_not_the_checkpoints_stays_here(parts: Parts, hub: Hub, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(parts.checkpoint, tmp_path / "np"))
    for name in ("notes.txt", "secrets.json", "README.md", "training_log.jsonl"):
        (folder / name).write_text("mine")
    (folder / "logs").mkdir()
    npt.push(folder, "me/np")
    found = hub.repos["me/np"].files
    assert set(found) == {*os.listdir(parts.checkpoint), "README.md", ".gitattributes"}
    assert found["README.md"] != b"mine"


def test_another_push_replaces_the_checkpoint(parts: Parts, hub: Hub, tmp_path: Path) -> None:
    """Two formats of weights beside each other could not be read."""
    npt.push(trained_checkpoint(tmp_path / "pt", 1), "me/np")
    repo = hub.repos["me/np"]
    repo.commit({**repo.files, "plot.png": b"mine"})
    report = npt.push(parts.checkpoint, "me/np", commit_message="Again")
    assert {"npt_weights.pt", "training_state.pt"} <= set(report.removed)
    assert set(repo.files) == {
        *os.listdir(parts.checkpoint), "README.md", ".gitattributes", "plot.png",
    }  # fmt: skip


def test_a_branch(parts: Parts, hub: Hub) -> None:
    for _ in range(2):
        report = npt.push(parts.checkpoint, "me/np", revision="v1")
    repo = hub.repos["me/np"]
    assert "npt_config.json" in repo.commits[repo.refs["v1"]]
    assert set(repo.files) == {".gitattributes"}
    assert report.checkpoint == f"hf://me/np@{repo.refs['v1']}"
    assert 'npt.load(model, "me/np@v1")' in repo.commits[repo.refs["v1"]]["README.md"].decode()


def test_the_card_of_a_merge(parts: Parts, hub: Hub, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(parts.checkpoint, tmp_path / "np"))
    described = json.loads((folder / "npt_config.json").read_text())
    described["base_model"]["name"] = "meta/llama"
    text = {"tokens": 70, "kl": 0.0123, "perplexity_ratio": 1.5}
    described["layers"]["1"]["certificate"] = {
        "layers": [1, 2], "step": 500, "data": "medium", **text, "texts": {"C": text},
    }  # fmt: skip
    (folder / "npt_config.json").write_text(json.dumps(described))
    npt.merge(f"{folder}:1", tmp_path / "one")
    npt.push(tmp_path / "one", "me/np")
    card = hub.repos["me/np"].files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: npt_fast\nbase_model: meta/llama\ntags:\n")
    assert "The base model is `meta/llama`.\n" in card
    row = next(line for line in card.splitlines() if line.startswith("|     1 |"))
    assert "| triple" in row and f"`{folder}`" in row
    assert "| `medium` |     70 | 0.0123 | 1.5000 |" in card
    assert 'from_pretrained("meta/llama")' in card and 'npt.load(model, "me/np")' in card


def test_names_in_a_card_are_no_code(parts: Parts, hub: Hub, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(parts.checkpoint, tmp_path / "np"))
    described = json.loads((folder / "npt_config.json").read_text())
    described["base_model"]["name"] = 'a/b"); import os\n---\nlicense: mit #'
    (folder / "npt_config.json").write_text(json.dumps(described))
    npt.push(folder, "me/np")
    card = hub.repos["me/np"].files["README.md"].decode()
    assert "import os" not in card.split("```")[1]
    assert card.split("---")[1].splitlines()[1:] == [
        "library_name: npt_fast", "tags:", "- neuro-plastic-transformer",
    ]  # fmt: skip


def test_an_export_is_pushed_with_its_base_model(parts: Parts, hub: Hub, tmp_path: Path) -> None:
    out = tmp_path / "out"
    npt.export(parts.checkpoint, out, verify=True)
    (out / "secrets.json").write_text("{}")
    npt.push(out, "me/served")
    repo = hub.repos["me/served"]
    assert set(repo.files) == {*os.listdir(out), ".gitattributes"} - {"secrets.json"}
    assert 'from_pretrained("me/served")' in repo.files["README.md"].decode()
    assert torch.equal(logits(load("me/served")), logits(parts.by_hand()))
    # of it, the NP layers alone go into another base model
    hub.sent.clear()
    model = npt.load(load(parts.base), f"hf://me/served@{repo.refs['main']}")
    assert torch.equal(logits(model), logits(parts.by_hand()))
    assert "me/served/model.safetensors" not in hub.sent


def test_layers_of_a_whole_model(parts: Parts, hub: Hub, tmp_path: Path) -> None:
    parts.by_hand().save_pretrained(tmp_path / "whole", max_shard_size="40KB")
    hub.add("me/whole", tmp_path / "whole", **{"tokenizer.json": b"{}"})
    model = npt.load(load(parts.base), "me/whole")
    assert torch.equal(logits(model), logits(parts.by_hand()))
    assert "me/whole/tokenizer.json" not in hub.sent
    hub.add("me/base", parts.base)
    with pytest.raises(npt.CheckpointError, match="me/base: is a model without NP layers"):
        npt.load(model, "me/base")
    assert set(hub.sent) & {"me/base/model.safetensors"} == set()


def test_what_is_refused(
    parts: Parts, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    refuse("NPT weights not found", tmp_path / "empty", kind=npt.CheckpointError)
    refuse("Checkpoint not found", tmp_path / "gone", kind=npt.CheckpointError)
    refuse("me: is not the name of a repository", parts.checkpoint, "me")
    npt.load(load(parts.base), parts.checkpoint).save_pretrained(tmp_path / "whole")
    refuse("is no folder of a checkpoint", tmp_path / "whole", kind=npt.CheckpointError)
    linked = Path(shutil.copytree(parts.checkpoint, tmp_path / "linked"))
    (tmp_path / "secret").write_text("{}")
    (linked / "config.json").symlink_to(tmp_path / "secret")
    refuse("config.json: is a symbolic link", linked, kind=npt.CheckpointError)
    npt.export(parts.checkpoint, tmp_path / "reference", reference=True)
    refuse("which only this machine has", tmp_path / "reference", kind=npt.ModelError)
    assert not hub.repos
    hub.add("me/model", parts.base)
    refuse("me/model: holds a whole model", parts.checkpoint, "me/model")
    assert "npt_config.json" not in hub.repos["me/model"].files
    monkeypatch.setenv("HF_TOKEN", "wrong")
    refuse("the Hub answers 401", parts.checkpoint)
    monkeypatch.delenv("HF_TOKEN")
    refuse("hf://me/np: log in (hf auth login, or HF_TOKEN)", parts.checkpoint)
    assert npt.push(parts.checkpoint, "me/np", token=TOKEN).files
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refuse("the Hub is turned off", parts.checkpoint)


def test_damage_is_not_pushed(hub: Hub, tmp_path: Path) -> None:
    npt.merge(trained_checkpoint(tmp_path / "a", 1), tmp_path / "merged", verify=True)
    shutil.rmtree(tmp_path / "a")
    weights = tmp_path / "merged" / "npt_weights.pt"
    flip_byte(weights, weights.stat().st_size // 2)
    refuse("merged: not pushed: ", tmp_path / "merged", kind=npt.VerificationError)
    assert not hub.repos and not hub.requests


PUSHED = ("npt_weights.pt", "training_state.pt", "npt_config.json", "config.json")
HOSTILE = [
    pytest.param(name, attack, id=f"{name}-{kind}")
    for door in DOORS
    if (name := door.file.removeprefix("a/")) in PUSHED
    for kind, attack in attacks(door)
    if not name.endswith(".json") or kind != "text"  # odd text under a key that nobody asks for
]


@pytest.mark.parametrize(("name", "attack"), HOSTILE)
def test_hostile_files_are_not_pushed(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, attack: Attack
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = trained_checkpoint(tmp_path / "np", 1)
    attack(folder / name)
    refuse(name, folder, kind=npt.NPTError)
    assert not hub.requests and not (tmp_path / "canary").exists()


def test_nothing_is_half_pushed(parts: Parts, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub goes down once the weights are there: the branch is as before."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    npt.push(parts.checkpoint, "me/np")
    repo = hub.repos["me/np"]
    repo.commit({"npt_config.json": b"{}"})
    hub.refuse_commits = True
    refuse("the Hub answers 500", parts.checkpoint)
    assert repo.files == {"npt_config.json": b"{}"}
