"""Exports: what the folder holds, and that its parts fit."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import npt_fast as npt
from npt_fast.hf import base_model
from npt_fast.hf import export as module
from npt_fast.hf.fingerprint import fingerprint, stored_fingerprint
from tests.checkpoints import layer_weights, write_checkpoint
from tests.hf.exports import (
    Parts,
    change,
    config_of,
    load,
    logits,
    refuse,
    without_fingerprint,
    write_parts,
)
from tests.training import tiny
from tests.transfer import models

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {"d": 32, "f": 48}


def test_the_folder(shared: Parts, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = npt.export(shared.checkpoint, out, verify=True)
    own = {"npt_weights.safetensors", "npt_config.json", "merge_summary.json", "merge_digests.txt"}
    assert set(os.listdir(out)) == {*os.listdir(shared.base), *own, "README.md"}
    for path in shared.base.iterdir():
        assert path.name == "config.json" or (out / path.name).read_bytes() == path.read_bytes()
    before, after = (
        load_file(shared.checkpoint / "npt_weights.safetensors"),
        load_file(out / "npt_weights.safetensors"),
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [info.layer for info in report.layers] == [1, 2]
    assert report.verification is not None and report.verification.compared == len(before)
    assert report.output == report.verification.path == str(out)

    base, found = config_of(shared.base), config_of(out)
    described = found.pop("npt")
    assert found == {
        **base, "model_type": "npt_fast-llama", "architectures": ["NPTLlamaForCausalLM"]
    }  # fmt: skip
    raw = (out / "npt_weights.safetensors").read_bytes()
    assert described.pop("weights") == {"sha256": hashlib.sha256(raw).hexdigest()}
    assert described == json.loads((out / "npt_config.json").read_text())


def test_the_folder_is_a_checkpoint_too(shared: Parts, tmp_path: Path) -> None:
    out = tmp_path / "out"
    npt.export(shared.checkpoint, out, verify=True)
    found = npt.verify(out)
    assert found.passed and found.notes == [] and found.compared == found.digests_matched == 36
    model = npt.load(load(shared.base), out)
    assert torch.equal(logits(model), logits(shared.by_hand()))
    assert [info.layer for info in npt.inspect(out).layers] == [1, 2]
    npt.merge(out, tmp_path / "merged")
    assert not (tmp_path / "merged" / "config.json").exists()  # the model's is not that of a run
    change(out, vocab_size=3)
    assert npt.verify(out).problems == ["config.json has changed"]


@pytest.mark.parametrize("form", ["shards", "pickle"])
def test_forms_of_base_weights(form: str, tmp_path: Path) -> None:
    saving = {"max_shard_size": "40KB"} if form == "shards" else {}
    parts = write_parts(tmp_path, **saving)
    if form == "pickle":
        torch.save(load(parts.base).state_dict(), parts.base / "pytorch_model.bin")
        (parts.base / "model.safetensors").unlink()
    report = npt.export(parts.checkpoint, tmp_path / "out")
    assert not any("nothing here tells" in note for note in report.notes)
    assert torch.equal(logits(load(tmp_path / "out")), logits(parts.by_hand()))


def test_what_is_not_the_models_is_not_taken(tmp_path: Path) -> None:
    parts = write_parts(tmp_path)
    for name in ("README.md", "model.py", "training_state.pt", "onnx.bin", "pytorch_model.bin"):
        (parts.base / name).write_bytes(b"other")
    change(parts.base, auto_map={"AutoConfig": "model.Own"})
    npt.export(parts.checkpoint, tmp_path / "out")
    assert not {"model.py", "training_state.pt", "onnx.bin"} & set(os.listdir(tmp_path / "out"))
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()
    assert "other" not in (tmp_path / "out" / "README.md").read_text()
    assert "auto_map" not in config_of(tmp_path / "out")


@pytest.mark.parametrize("layers", [[2], "2", "upper_half"])
def test_selected_layers(layers: Any, shared: Parts, tmp_path: Path) -> None:
    npt.export(shared.checkpoint, tmp_path / "out", layers=layers)
    npt.export(f"{shared.checkpoint}:2", tmp_path / "same")
    for name in ("npt_weights.safetensors", "config.json"):
        same = (tmp_path / "same" / name).read_bytes()
        assert (tmp_path / "out" / name).read_bytes() == same
    model = load(tmp_path / "out")
    assert [status.layer for status in npt.status(model)] == [2]
    alone = npt.load(load(shared.base), shared.checkpoint, layers=[2])
    assert torch.equal(logits(model), logits(alone))


def test_int8_factors_travel(shared: Parts, tmp_path: Path) -> None:
    model = npt.quantize(shared.by_hand())
    npt.save(model, tmp_path / "int8")
    npt.export(tmp_path / "int8", tmp_path / "out", verify=True)
    found = load(tmp_path / "out")
    assert {status.dtype for status in npt.status(found)} == {"int8"}
    assert torch.equal(logits(found), logits(model))


def test_a_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = write_parts(tmp_path / "tree")
    monkeypatch.chdir(tmp_path / "tree")
    npt.export(parts.checkpoint, "out", model_name="base", reference=True)
    assert config_of(Path("out"))["npt"]["base"] == {"folder": "../base"}
    assert not list(Path("out").glob("model*")) and Path("out", "tokenizer.json").exists()
    expected = logits(parts.by_hand())
    monkeypatch.chdir("/")
    moved = (tmp_path / "tree").rename(tmp_path / "moved")
    assert torch.equal(logits(load(moved / "out")), expected)
    shutil.rmtree(moved / "base")
    with pytest.raises(npt.ModelError, match=rf"its base model {moved}/base is missing"):
        load(moved / "out")


def test_a_reference_by_an_absolute_path_stays_one(shared: Parts, tmp_path: Path) -> None:
    npt.export(shared.checkpoint, tmp_path / "out", reference=True)
    assert config_of(tmp_path / "out")["npt"]["base"] == {"folder": str(shared.base)}
    assert torch.equal(logits(load(tmp_path / "out")), logits(shared.by_hand()))


def test_hard_links(shared: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = npt.export(shared.checkpoint, tmp_path / "out", hardlink=True)
    linked = tmp_path / "out" / "model.safetensors"
    assert linked.samefile(shared.base / "model.safetensors")
    assert report.ways["hard link"] == linked.stat().st_size
    assert not (tmp_path / "out" / "tokenizer.json").samefile(shared.base / "tokenizer.json")

    def fail(*names: Any, **options: Any) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(module.os, "link", fail)
    problem = "is on another file system than the output, .*; leave out --hardlink"
    refuse(problem, tmp_path / "x", shared.checkpoint, hardlink=True)
    with pytest.raises(npt.OptionError, match="leave out reference or hardlink"):
        npt.export(shared.checkpoint, tmp_path / "x", hardlink=True, reference=True)


def test_a_model_of_the_hub(shared: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found in the Hub's cache, which consists of links."""
    commit = "0123456789abcdef" * 2 + "01234567"
    cached = tmp_path / "models--org--tiny"
    snapshot = cached / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    (cached / "blobs").mkdir()
    for number, path in enumerate(sorted(shared.base.iterdir())):
        blob = f"{number:040x}"
        shutil.copy(path, cached / "blobs" / blob)
        (snapshot / path.name).symlink_to(f"../../blobs/{blob}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    npt.export(shared.checkpoint, tmp_path / "out", model_name="org/tiny", verify=True)
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    expected = logits(shared.by_hand())
    assert torch.equal(logits(load(tmp_path / "out")), expected)
    npt.export(shared.checkpoint, tmp_path / "named", model_name="org/tiny", reference=True)
    where = {"hub_id": "org/tiny", "revision": commit}
    assert config_of(tmp_path / "named")["npt"]["base"] == where
    assert torch.equal(logits(load(tmp_path / "named", cache_dir=tmp_path)), expected)
    (snapshot / "model.safetensors").unlink()  # a reference fetches no weights
    named = {"model_name": "org/tiny", "reference": True}
    report = npt.export(shared.checkpoint, tmp_path / "small", **named)
    told = "nothing here tells whether the layers were trained on the weights of org/tiny"
    assert report.notes == [told]
    with pytest.raises(npt.ModelError, match="org/none: the base model cannot be found"):
        npt.export(shared.checkpoint, tmp_path / "x", model_name="org/none")
    assert not (tmp_path / "x").exists()


def test_a_gguf_file_becomes_safetensors(
    tmp_path: Path, shared: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' reader of such files is not asked here, only what follows it."""

    def read(name: str, **options: Any) -> tuple[Any, Any]:
        assert (name, options) == ("x.gguf", {"dtype": "float32"})
        return load(shared.base), tiny.tokenizer()

    monkeypatch.setattr(base_model, "load_base_model", read)
    before = os.umask(0o022)
    try:
        npt.export(shared.checkpoint, tmp_path / "out", model_name="x.gguf")
    finally:
        os.umask(before)
    assert torch.equal(logits(load(tmp_path / "out")), logits(shared.by_hand()))
    usage = SimpleNamespace(free=7)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage)
    problem = r"x: [\d,]+ bytes needed, 7 free on its file system"
    refuse(problem, tmp_path / "x", shared.checkpoint, model_name="x.gguf")
    paths = list((tmp_path / "out").iterdir())
    assert {path.stat().st_mode & 0o777 for path in paths} == {0o644}
    with pytest.raises(npt.ModelError, match="GGUF file cannot be a reference"):
        npt.export(shared.checkpoint, tmp_path / "x", model_name="x.gguf", reference=True)


def test_writing_needs_no_torch(shared: Parts, tmp_path: Path) -> None:
    """Without a fingerprint to compare; merges need none either."""
    checkpoint = without_fingerprint(shared, tmp_path / "np")
    out = tmp_path / "out"
    code = (
        "import sys, npt_fast as npt\n"
        f"npt.export({str(checkpoint)!r}, {str(out)!r}, model_name={str(shared.base)!r})\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys(), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert torch.equal(logits(load(out)), logits(shared.by_hand()))


def test_the_card(shared: Parts, tmp_path: Path) -> None:
    """Provenance through merges, measured fidelity, and text that cannot be Markdown."""
    evil = tmp_path / "a|b`c"
    shutil.copytree(shared.checkpoint, evil)
    described = json.loads((evil / "npt_config.json").read_text())
    text = {"tokens": 70, "kl": 0.0123, "perplexity_ratio": None}
    described["layers"]["1"] |= {
        "step": 500,
        "certificate": {"layers": [1], "step": 500, "data": "se|f", **text, "texts": {"C": text}},
    }
    (evil / "npt_config.json").write_text(json.dumps(described))
    npt.merge(evil, tmp_path / "merged")
    npt.export(tmp_path / "merged", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    row = next(line for line in card.splitlines() if line.startswith("|     1 |"))
    assert "| triple" in row and "| 500 " in row and f"`{tmp_path}/a/b'c`" in row
    assert row.count("|") == 9
    assert "| `se/f` |     70 | 0.0123 | not finite |" in card
    assert "| `C`    |     70 | 0.0123 | not finite |" in card
    assert "Nobody has measured all layers of this folder, [1, 2], together." in card
    assert f"The base model is `{shared.base}`. Its weights are in this folder." in card
    assert "pip install 'npt_fast[hf]'" in card and "npt_fast-llama" in card


def test_layers_without_a_residual_are_probed_when_they_are_loaded(tmp_path: Path) -> None:
    """As by `npt.load`: untrained layers tell nothing, and are refused in a line."""
    base = tiny.save(tmp_path / "base")
    dual = write_checkpoint(tmp_path / "np", layer_weights(1, modulation="dual", **SIZES))
    npt.export(dual, tmp_path / "out", model_name=str(base))
    with pytest.raises(npt.ModelError, match="give the residual, removed or kept"):
        load(tmp_path / "out")


def test_float16_weights_have_no_fingerprint(shared: Parts, tmp_path: Path) -> None:
    base = shutil.copytree(shared.base, tmp_path / "base")
    halves = {k: v.half() for k, v in load_file(base / "model.safetensors").items()}
    save_file(halves, base / "model.safetensors", {"format": "pt"})
    npt.export(shared.checkpoint, tmp_path / "out", model_name=str(base))


def test_fingerprints_of_folders(tmp_path: Path) -> None:
    for family in models.FAMILIES:
        parts = write_parts(tmp_path / family, family, max_shard_size="40KB")
        assert stored_fingerprint(parts.base) == fingerprint(load(parts.base)) is not None


def test_layers_are_named_once(shared: Parts, tmp_path: Path) -> None:
    with pytest.raises(npt.ModelError, match="names layers itself"):
        npt.export(f"{shared.checkpoint}:1", tmp_path / "out", layers="2")
    assert not (tmp_path / "out").exists()


def test_a_reference_is_found_through_links(
    shared: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deep").mkdir()
    base = shutil.copytree(shared.base, tmp_path / "deep" / "base")
    (tmp_path / "way").symlink_to(tmp_path / "deep")
    monkeypatch.chdir(tmp_path / "deep")
    npt.export(shared.checkpoint, tmp_path / "way" / "out", model_name="base", reference=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "out")
    for folder in (tmp_path / "way" / "out", tmp_path / "link"):
        assert logits(load(folder)).equal(logits(npt.load(load(base), shared.checkpoint)))


def test_newer_layers_over_an_export_are_not_mixed_up(shared: Parts, tmp_path: Path) -> None:
    npt.export(shared.checkpoint, tmp_path / "out")
    load(tmp_path / "out").save_pretrained(tmp_path / "out")
    with pytest.raises(npt.CheckpointError, match="is of an older export"):
        load(tmp_path / "out")
