"""Exports: what is refused in one line, and leaves nothing."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import npt_fast as npt
from npt_fast.hf import export as module
from npt_fast.hf.fingerprint import fingerprint
from tests.checkpoints import flip_byte
from tests.hf.exports import (
    Parts,
    change,
    config_of,
    load,
    refuse,
    without_fingerprint,
    write_parts,
)
from tests.training import tiny

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_base_that_is_not_known_or_gone(shared: Parts, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refuse(
        r"np: does not record its base model; give it \(--model_name\)",
        out, without_fingerprint(shared, tmp_path / "np"),
    )  # fmt: skip
    gone = write_parts(tmp_path / "gone")
    shutil.rmtree(gone.base)
    refuse(rf"{gone.base}: no such folder; give the base model", out, gone.checkpoint)
    npt.merge(gone.checkpoint, tmp_path / "merged")
    refuse(rf"{gone.base}: no such folder", out, tmp_path / "merged")


def test_another_base(shared: Parts, tmp_path: Path) -> None:
    out = tmp_path / "out"
    wide = tiny.save(tmp_path / "wide", intermediate_size=64)
    options = {"model_name": str(wide)}
    refuse("intermediate_size 48, the model has 64", out, shared.checkpoint, **options)
    short = tiny.save(tmp_path / "short", layers=2)
    bare = without_fingerprint(shared, tmp_path / "np")
    refuse("has layer 2, the model has 2", out, bare, model_name=str(short))
    other = tiny.save(tmp_path / "other")
    options = {"model_name": str(other)}
    refuse("another base model of the same sizes", out, shared.checkpoint, **options)
    npt.export(shared.checkpoint, out, **options, allow_different_base=True)
    own = fingerprint(load(other))
    about = config_of(out)["npt"]["base_model"]
    assert (about["name"], about["fingerprint"]) == (str(other), own)
    named = f"The base model is `{other}`. Its weights are in this folder. The layers were trained "
    assert f"{named}on `{shared.base}`." in (out / "README.md").read_text()
    assert json.loads((out / "npt_config.json").read_text())["base_model"]["fingerprint"] != own
    with pytest.warns(npt.errors.NPTWarning, match="another base model of the same sizes"):
        load(out)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"model_type": "opt"}, "models of type 'opt' cannot be exported"),
        ({"model_type": ["llama"]}, "models of type a list cannot be exported"),
        ({"hidden_size": 64}, "hidden_size 32, the model has 64"),
        ({"architectures": ["LlamaModel"]}, "architectures must begin with a causal language mod"),
        ({"architectures": None}, "architectures must begin with a causal language model"),
        ({"npt": {}}, r"has NP layers itself; give its base model \(--model_name\)"),
        ({"attn_implementation": "a/b"}, "asks for a kernel from the Hub"),
        ({"rms_norm_eps": math.nan}, "config.json: rms_norm_eps is nan, which JSON does not have"),
        ({"rope": {"long": [1.0, -math.inf]}}, "config.json: long is -inf"),
        ({"vocab_size": None}, "config.json: vocab_size must be a whole number"),
        ({"hidden_size": "32"}, "config.json: hidden_size must be a whole number .* not '32'"),
        ({"vocab_size": 1 << 40}, "vocab_size 1099511627776 does not fit the weights"),
    ],
)
def test_configs_that_are_refused(content: dict[str, Any], problem: str, tmp_path: Path) -> None:
    parts = write_parts(tmp_path / "parts")
    change(parts.base, **content)
    refuse(problem, tmp_path / "out", parts.checkpoint)


@pytest.mark.parametrize("options", [{}, {"reference": True}, {"hardlink": True}], ids=str)
@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1", "short"])
def test_base_weights_that_cannot_be_read(
    content: bytes | str, options: dict[str, Any], tmp_path: Path
) -> None:
    parts = write_parts(tmp_path / "parts")
    weights = parts.base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] if isinstance(content, str) else content)
    options |= {"allow_different_base": True}
    refuse("base/model.safetensors: cannot be read", tmp_path / "out", parts.checkpoint, **options)


def test_base_folders_that_are_refused(tmp_path: Path) -> None:
    parts, out = write_parts(tmp_path / "parts", max_shard_size="40KB"), tmp_path / "out"
    shard = next(parts.base.glob("model-00002*"))
    shard.rename(tmp_path / shard.name)
    refuse(f"{shard.name} is not in the folder", out, parts.checkpoint)
    os.mkfifo(shard)
    refuse(f"{shard.name}: not a regular file", out, parts.checkpoint)
    for path in parts.base.glob("model*"):
        path.unlink()
    for reference in (True, False):
        refuse(
            "holds no model.safetensors or pytorch_model.bin",
            out, parts.checkpoint, reference=reference,
        )  # fmt: skip
    (parts.base / "config.json").unlink()
    refuse("has no config.json: it is no base model", out, parts.checkpoint)


def test_outputs_and_layers_that_are_refused(shared: Parts, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refuse(r"has no layer 3, only \[1, 2\]", out, shared.checkpoint, layers=[3])
    refuse("there is no layer 9, the model has 4", out, shared.checkpoint, layers="9")
    refuse("lies in, the input", shared.checkpoint / "out", shared.checkpoint)
    one = npt.export(f"{shared.checkpoint}:2", tmp_path / "one")
    refuse(r"there are layers \[2\], none of lower_half", out, one.output, layers="lower_half",
           model_name=str(shared.base))  # fmt: skip
    out.mkdir()
    with pytest.raises(npt.ModelError, match="exists already; choose another directory"):
        npt.export(shared.checkpoint, out)


@pytest.mark.parametrize("name", ["npt_weights.safetensors", "model.safetensors"])
def test_a_copy_that_differs_is_not_published(
    name: str, shared: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = module.write_files

    def damage(plan: Any, staged: Any, progress: Any) -> Any:
        moved = write(plan, staged, progress)
        flip_byte(staged.path / name, -5)
        return moved

    monkeypatch.setattr(module, "write_files", damage)
    refuse(f"out: not written: .*{name}", tmp_path / "out", shared.checkpoint, verify=True)


def test_a_full_disk(shared: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "space", lambda plan, target: ({}, 5, 6))
    refuse("out: 6 bytes needed, 5 free on its file system", tmp_path / "out", shared.checkpoint)
