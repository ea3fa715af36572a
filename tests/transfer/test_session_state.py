"""Saved sessions: what is restored, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from npt_fast.checkpoint import strict_json
from npt_fast.errors import CheckpointError, ModelError, NPTError, TransferError
from npt_fast.hf.tokenizer import PLAIN, Reading
from npt_fast.transfer.session import Session, fingerprint
from tests.transfer.sessions import new_session


def test_saved_and_loaded_bit_for_bit(two: Session, tmp_path: Path) -> None:
    two.calculate("a name/with ../ odd signs", "a - 2*b")
    two.track([" x", "é"])
    two.activate([2])
    two.set(seed=7, temperature=0.5, strategy="top_p")
    saved = two.state
    folder = two.save(tmp_path / "session")
    assert sorted(file.suffix for file in folder.iterdir()) == [".json"] + [".safetensors"] * 3
    other = new_session(tmp_path / "again")
    assert other.load(folder) == list(saved.shelf)
    found = other.state
    assert (found.tracked, found.layers, found.settings) == (
        saved.tracked,
        saved.layers,
        saved.settings,
    )
    for name, item in saved.shelf.items():
        assert fingerprint(found.shelf[name].modulation) == fingerprint(item.modulation)
        assert found.shelf[name].created == item.created
        assert found.shelf[name].modulation.origin == item.modulation.origin
    two.delete("a")
    two.save(folder)  # replaces its own folder; loaded modulations do not depend on it
    assert len(list(folder.iterdir())) == 3
    assert fingerprint(other.modulation("a")) == fingerprint(saved.shelf["a"].modulation)
    assert other.undo().startswith("load") and not other.state.shelf


def test_one_modulation_is_loaded_beside_the_others(two: Session, tmp_path: Path) -> None:
    two.modulation("a").save(tmp_path / "kept.safetensors")
    assert two.load(tmp_path / "kept.safetensors") == ["kept"]
    assert set(two.state.shelf) == {"a", "b", "kept"}
    assert fingerprint(two.modulation("kept")) == fingerprint(two.modulation("a"))


def test_files_that_are_refused(two: Session, tmp_path: Path) -> None:
    folder = two.save(tmp_path / "session")
    before = two.state

    def refused(path: Path, problem: str, kind: type[NPTError] = CheckpointError) -> None:
        with pytest.raises(kind, match=problem):
            two.load(path)
        assert two.state == before

    (tmp_path / "old").write_bytes(pickle.dumps({"modulation_bank": {}}))
    refused(tmp_path / "old", "pickle, which can run code")
    torch.save({"a": torch.ones(1)}, tmp_path / "old.bin")
    refused(tmp_path / "old.bin", "pickle, which can run code")
    refused(tmp_path / "missing", "cannot be opened: No such file")
    (tmp_path / "noise.safetensors").write_bytes(b"\xff" * 64)
    refused(tmp_path / "noise.safetensors", "not a safetensors file")
    deep = new_session(tmp_path / "deep", num_attention_heads=4, num_hidden_layers=5)
    deep.extract("w", "text")
    refused(deep.save(tmp_path / "foreign"), "another base model", ModelError)
    more = new_session(tmp_path / "more", 1, 2, 3)
    refused(more.save(tmp_path / "layers"), "layer 3 is not loaded", ModelError)
    index = json.loads((folder / "session.json").read_text())
    for key, value in [
        ("modulations", [{"name": "a"}]),
        ("modulations", 3),
        ("settings", {"tokens": "many"}),
        ("settings", {"colour": 1}),
        ("layers", ["x"]),
        ("npt_shelf", 9),
        *((key, value) for key in index for value in (None, 5, [5], {"a": 5}, "x", True, [None])),
        ("settings", {**index["settings"], "seed": "1"}),
        ("settings", {**index["settings"], "top_p": 2}),
        ("settings", {**index["settings"], "strategy": ["greedy"]}),
        *(("modulations", [{**index["modulations"][0], key: 5}]) for key in ("name", "file")),
        ("modulations", [index["modulations"][0]] * 2),
    ]:
        if key == "base" or (key, value) == ("npt_shelf", True):  # not read; equal to 1
            continue
        (folder / "session.json").write_bytes(strict_json.dump({**index, key: value}))
        if (key, value) == ("layers", [5]):
            refused(folder, "layer 5 is not loaded", ModelError)
        else:
            refused(folder, "is wrong|not a saved session")
    two.modulation("a").save(tmp_path / "kept.safetensors")
    for name in ("../kept.safetensors", "/kept.safetensors", "session.json", "", ".", "a/b"):
        outside = [{"name": "a", "file": name, "created": ""}]
        (folder / "session.json").write_bytes(strict_json.dump({**index, "modulations": outside}))
        refused(folder, "file must be the name of a .safetensors file")
    (folder / "session.json").write_bytes(strict_json.dump(index))
    (folder / "0.safetensors").unlink()
    (folder / "0.safetensors").symlink_to(tmp_path / "kept.safetensors")
    refused(folder, "links inside a checkpoint are not followed")
    (folder / "0.safetensors").unlink()
    os.mkfifo(folder / "0.safetensors")
    refused(folder, "not a regular file")
    (folder / "session.json").unlink()
    os.mkfifo(folder / "session.json")
    refused(folder, "not a regular file")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "not a regular file")
    refused(Path("/dev/zero"), "not a regular file")


def test_a_session_that_could_not_be_read_back_is_not_written(two: Session, tmp_path: Path) -> None:
    two.save(tmp_path / "s")
    two.calculate("big", "1e308 * (1e308 * a)")
    with pytest.raises(TransferError, match=f"^{tmp_path}/s: cannot be written: 2.safe.* infinity"):
        two.save(tmp_path / "s")
    two.undo()
    two.extract("\ud800", "text")
    with pytest.raises(TransferError, match=f"^{tmp_path}/s: cannot be written: session.json: "):
        two.save(tmp_path / "s")
    two.undo()
    assert two.load(tmp_path / "s") == ["a", "b"]
    for name, value in (("seed", 1 << 63), ("top_k", 1 << 63), ("tokens", 10**400)):
        told = "at most 10,000" if name == "tokens" else "must fit 64 bits"
        with pytest.raises(TransferError, match=told):
            two.set(**{name: value})
    with pytest.raises(TransferError, match="is not valid Unicode text"):
        two.track(["\ud800"])


def test_files_of_any_name_and_any_text_are_loaded(session: Session, tmp_path: Path) -> None:
    """Names of files need not be Unicode and may look like a pickle's."""
    for number, text in enumerate(["x" * n for n in range(1, 70)] + ["\0", "😀" * 9, "a\n"]):
        session.extract("a", text)
        session.modulation("a").save(tmp_path / f"{number}.pkl")
        assert session.load(tmp_path / f"{number}.pkl") == [f"{number}.pkl"]
    odd = tmp_path / "caf\udce9"
    session.modulation("a").save(odd)
    assert session.load(odd) == ["caf\\udce9"]
    session.save(tmp_path / "s")
    assert "caf\\udce9" in session.load(tmp_path / "s")


def test_folders_of_others_are_not_replaced(two: Session, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("mine")
    with pytest.raises(TransferError, match="not a saved session"):
        two.save(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "mine"


def test_how_texts_are_read_is_saved(two: Session, tmp_path: Path) -> None:
    two.set(special_tokens=False)
    two.save(tmp_path / "s")
    other = new_session(tmp_path / "again")
    other.load(tmp_path / "s")
    assert other.state.reading == PLAIN
    other.undo()
    assert other.state.reading == Reading()
    index = json.loads((tmp_path / "s" / "session.json").read_text())
    for wrong in ({"special_tokens": True}, {"special_tokens": 1, "chat": False},
                  {"special_tokens": False, "chat": True},
                  {"special_tokens": True, "chat": True, "more": 1}):  # fmt: skip
        changed = strict_json.dump({**index, "reading": wrong})
        (tmp_path / "s" / "session.json").write_bytes(changed)
        with pytest.raises(CheckpointError, match=r"session.json: is wrong: reading: "):
            other.load(tmp_path / "s")
