"""Files on disk are what they were: users have them, and other versions write and read them.

`tests/data/formats` and the digests below were made by version 0.1.0 in November 2026. A change
here is a change of a format: it needs a new format version and a line in CHANGELOG.md. `older` has
files without an entry that was added since.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

import npt_fast as npt
from npt_fast.config import FileFormat
from npt_fast.hf.tokenizer import Reading
from npt_fast.transfer.session import Session
from tests.checkpoints import contents
from tests.transfer import models

DATA = Path(__file__).parent / "data"
SHARED = {
    "config.json": "a8a9ec1fc14809d5",
    "multi_layer_state.pt": "0cff8a3697680485",
    "npt_config.json": "bc85d9cd79eb048a",
}
MERGES = {
    "pt": {
        **SHARED,
        "merge_digests.txt": "812b57f0de4647ec",
        "merge_summary.json": "71dfef0eedde47af",
        "npt_weights.pt": "df6fa821cd718c8d",
    },
    "safetensors": {
        **SHARED,
        "merge_digests.txt": "08d6d439e995c058",
        "merge_summary.json": "d4dad6be4de1297c",
        "npt_weights.safetensors": "7f2d5b2bcefd586e",
    },
}
SAVED = {
    "npt_config.json": "d50082f10b2fb5cc",
    "npt_weights.safetensors": "0e22607adaa99418",
}


def digests(folder: Path, hidden: str = "") -> dict[str, str]:
    """SHA-256 of every file, short; a path that differs from run to run is taken out."""
    return {
        name: hashlib.sha256(data.replace(hidden.encode(), b"HERE")).hexdigest()[:16]
        for name, data in sorted(contents(folder).items())
    }


@pytest.mark.parametrize("kind", MERGES)
def test_a_merge(kind: FileFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(DATA / "smollm2_135m", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)  # paths are recorded as they are given
    inputs = ["runs/layer11/checkpoint-800", "runs/layer13/checkpoint-600"]
    npt.merge(inputs, "out", verify=True, options=npt.MergeOptions(format=kind))
    assert digests(tmp_path / "out", str(tmp_path)) == MERGES[kind]


def test_a_saved_model(tmp_path: Path) -> None:
    model = models.converted()
    with torch.no_grad():
        for parameter in model.parameters():  # the base model's too, for its fingerprint
            parameter.copy_(torch.arange(parameter.numel()).view_as(parameter) / 1024)
    npt.save(model, tmp_path / "out")  # what torch.save writes differs between its versions
    assert digests(tmp_path / "out") == SAVED


@pytest.mark.parametrize("age", ["", "older"])
def test_a_modulation(age: str, tmp_path: Path) -> None:
    path = DATA / "formats" / age / "modulation.safetensors"
    npt.load_modulation(path).save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_a_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # that of random weights differs between CPUs
    monkeypatch.setattr("npt_fast.transfer.base_model.fingerprint", lambda model: None)
    session = Session(models.converted(), models.tokenizer)
    session.load(DATA / "formats" / "session")
    assert session.state.reading == Reading()
    session.save(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(DATA / "formats" / "session")


def test_a_session_from_before_special_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on without them, and is written with the one entry that it lacked."""
    monkeypatch.setattr("npt_fast.transfer.base_model.fingerprint", lambda model: None)
    session = Session(models.converted(), models.tokenizer)
    session.load(DATA / "formats" / "older" / "session")
    assert session.state.reading == Reading(special_tokens=False)
    session.save(tmp_path / "again")
    known, found = contents(DATA / "formats" / "older" / "session"), contents(tmp_path / "again")
    index = json.loads(found.pop("session.json"))
    assert index.pop("reading") == {"special_tokens": False, "chat": False}
    assert index == json.loads(known.pop("session.json")) and found == known
