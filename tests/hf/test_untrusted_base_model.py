"""Base models in somebody else's folder: no code runs, and what is broken is one error."""

from __future__ import annotations

import io
import json
import os
import re
import socket
import sys
from collections.abc import Callable
from contextlib import nullcontext
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, LlamaForCausalLM, dynamic_module_utils

import npt_fast as npt
from npt_fast.hf import model_folder
from npt_fast.hf.base_model import load_base_model
from npt_fast.hf.tokenizer import encode
from tests import hostile_models
from tests.checkpoints import assert_same_tensors
from tests.training import tiny


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that planted code would write; every question is answered with yes."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 99))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "ran"


@pytest.mark.parametrize("name", hostile_models.REFUSED)
def test_code_is_refused_in_one_line(tmp_path: Path, canary: Path, name: str) -> None:
    spoil, file, key = hostile_models.REFUSED[name]
    base = hostile_models.plant(tmp_path / "base", canary)
    spoil(base, canary)
    with pytest.raises(npt.ModelError) as caught:
        load_base_model(str(base))
    message = str(caught.value)
    assert message.startswith(f"{base}: {file}: {key} ")
    assert message.endswith("--trust_remote_code would run it with all your rights")
    assert not canary.exists()


@pytest.mark.parametrize("fetching", [True, False])
@pytest.mark.parametrize(
    "content",
    [
        {"attn_implementation": "flash_attention_2"},
        {"_experts_implementation": "sonicmoe"},
        {"quantization_config": {"quant_method": "fp8"}},
    ],
)
def test_names_for_which_kernels_are_fetched_where_that_is_possible(
    content: dict[str, Any], fetching: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a folder `kernels` in the current directory is not the package
    spec = ModuleSpec("kernels", None, origin="kernels/__init__.py" if fetching else None)
    monkeypatch.setattr(model_folder, "find_spec", lambda name: spec)
    told = "asks for a kernel from the Hub; no such code was run"
    with pytest.raises(npt.ModelError, match=told) if fetching else nullcontext():
        model_folder.check_keys(content, "config.json", "base")


@pytest.mark.parametrize("name", hostile_models.UNREADABLE)
def test_pickles_do_not_run(tmp_path: Path, canary: Path, name: str) -> None:
    base = hostile_models.plant(tmp_path / "base", canary)
    hostile_models.UNREADABLE[name](base, canary)
    for trusted in (False, True):  # trusting its code does not mean trusting its pickles
        with pytest.raises(npt.ModelError, match="a pickle that holds more than tensors"):
            load_base_model(str(base), trust_remote_code=trusted)
    assert not canary.exists()


@pytest.mark.parametrize("name", hostile_models.HARMLESS)
def test_a_class_of_transformers_is_used(tmp_path: Path, canary: Path, name: str) -> None:
    base = hostile_models.plant(tmp_path / "base", canary)
    hostile_models.HARMLESS[name](base, canary)
    model, tokenizer = load_base_model(str(base))
    assert type(model) is LlamaForCausalLM
    assert tokenizer.decode(tokenizer("text").input_ids) == "text"
    assert not canary.exists()


@pytest.mark.parametrize("name", ["config", "slow-tokenizer"])
def test_code_runs_where_it_is_trusted(tmp_path: Path, canary: Path, name: str) -> None:
    """This shows that the tests above can fail."""
    base = hostile_models.plant(tmp_path / "base", canary)
    hostile_models.REFUSED[name][0](base, canary)
    with pytest.raises(npt.ModelError, match=r"has no attribute '(Own|generate)'"):
        load_base_model(str(base), trust_remote_code=True)
    assert canary.exists()


def test_nobody_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that reads stdin while a model loads finds it empty; later its lines are there."""
    base = tiny.save(tmp_path / "base")
    monkeypatch.setattr("sys.stdin", io.StringIO("mine\n"))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: input())
    with pytest.raises(npt.ModelError, match="EOF"):
        load_base_model(str(base))
    assert sys.stdin.readline() == "mine\n"


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def bound_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))  # a socket's path must be short


@pytest.mark.parametrize("make", [pipe, device, bound_socket])
@pytest.mark.parametrize("name", [
    "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
    "special_tokens_map.json", "adapter_config.json", "chat_template.jinja", "model.safetensors",
    "pytorch_model.bin", "additional_chat_templates/a.jinja", "lone.gguf",
])  # fmt: skip
def test_not_every_path_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, make: Callable[[Path], None]
) -> None:
    """Reading a pipe would wait forever, and reading a device would never end."""
    base = tiny.save(tmp_path / "base")
    monkeypatch.chdir(base)
    file = base / name
    file.unlink(missing_ok=True)
    file.parent.mkdir(exist_ok=True)
    make(file)
    given = str(file if name.endswith(".gguf") else base)
    with pytest.raises(npt.ModelError, match=rf"^{re.escape(str(file))}: not a regular file"):
        load_base_model(given)


@pytest.mark.parametrize(
    ("target", "problem"),
    [("nowhere", "No such file"), ("config.json", "Too many levels of symbolic links")],
)
def test_links_that_lead_nowhere(tmp_path: Path, target: str, problem: str) -> None:
    base = tiny.save(tmp_path / "base")
    (base / "config.json").unlink()
    (base / "config.json").symlink_to(target)
    with pytest.raises(npt.ModelError, match=rf"config\.json: {problem}"):
        load_base_model(str(base))


def test_links_to_files_are_what_the_hubs_cache_is_made_of(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "blobs")
    snapshot = tmp_path / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    for file in base.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    model, _ = load_base_model(str(snapshot))
    assert_same_tensors(model.state_dict(), tiny.model().state_dict())


@pytest.mark.parametrize("name", ["/elsewhere/x.safetensors", "../x.safetensors", "a/../../x"])
def test_an_index_that_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    base = tiny.save(tmp_path / "base")
    (base / "model.safetensors").unlink()
    hostile_models.change(base, "model.safetensors.index.json", weight_map={"x": name})
    with pytest.raises(npt.ModelError, match=r"weight_map: .* leads out of the folder"):
        load_base_model(str(base))


def test_shards(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "base")
    (base / "model.safetensors").unlink()
    tiny.model().save_pretrained(base, max_shard_size="50KB")
    assert len(list(base.glob("model-*.safetensors"))) > 1
    assert_same_tensors(load_base_model(str(base))[0].state_dict(), tiny.model().state_dict())


DEEP = "[" * 3000 + "]" * 3000


@pytest.mark.parametrize("file", [
    "config.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json",
    "added_tokens.json", "model.safetensors.index.json", "tokenizer.json",
])  # fmt: skip
@pytest.mark.parametrize("text", ["", "[1, 2]", DEEP, f'{{"a": {DEEP}}}', "\x00\x01"])
def test_small_files_that_are_none(tmp_path: Path, file: str, text: str) -> None:
    base = tiny.save(tmp_path / "base")
    (base / file).write_text(text)
    with pytest.raises(npt.ModelError) as caught:
        load_base_model(str(base))
    assert str(caught.value).startswith((f"{base}: ", f"{base}/{file}: "))


@pytest.mark.parametrize(
    ("file", "size", "limit"),
    [("config.json", 8 << 20, "8,388,608"), ("tokenizer.json", 100_000_000, "100,000,000")],
)
def test_long_files(tmp_path: Path, file: str, size: int, limit: str) -> None:
    base = tiny.save(tmp_path / "base")
    os.truncate(base / file, size + 1)
    with pytest.raises(npt.ModelError, match=f"{file}: {size + 1:,} bytes; more than {limit} are"):
        load_base_model(str(base))


@pytest.mark.parametrize("value", [10**6, 2**40, 10**38])
@pytest.mark.parametrize("key", [
    "num_hidden_layers", "hidden_size", "vocab_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "num_labels",
])  # fmt: skip
def test_a_config_that_is_too_large_for_its_weights(tmp_path: Path, key: str, value: int) -> None:
    """No model is built: a million layers would take an hour, a width of a million 6 GB."""
    base = tiny.save(tmp_path / "base")
    hostile_models.change(base, "config.json", **{key: value})
    with pytest.raises(npt.ModelError, match=rf"config\.json: {key} .*does not fit"):
        load_base_model(str(base))


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"model_type": "llama"}, "num_hidden_layers"),
        ({"model_type": "llama", "num_hidden_layers": 1}, "vocab_size"),
        ({"model_type": "deepseek_v3"}, "num_hidden_layers"),
        ({"model_type": "gemma3", "text_config": {"num_hidden_layers": 1}}, "vocab_size"),
    ],
    ids=str,
)
def test_what_a_config_leaves_out_is_large(
    tmp_path: Path, config: dict[str, Any], key: str
) -> None:
    folder = tiny.save(tmp_path / "model", layers=1)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(npt.ModelError, match=rf"config\.json: {key} .*does not fit"):
        load_base_model(str(folder))


ODD: list[Any] = [None, True, -1, 0, "x", "\ud800", 1e308, [], {}, [[1]], {"a": {"b": 1}}]


@pytest.mark.parametrize("key", [
    "model_type", "architectures", "num_hidden_layers", "hidden_size", "rope_parameters", "dtype",
    "hidden_act", "quantization_config", "auto_map", "text_config", "transformers_weights",
    "attn_implementation", "per_layer_config", "id2label", "head_dim", "eos_token_id",
])  # fmt: skip
def test_odd_types(tmp_path: Path, key: str) -> None:
    """Each value loads, or is refused in one line."""
    base = tiny.save(tmp_path / "base")
    for file in ("config.json", "tokenizer_config.json"):
        before = (base / file).read_text()
        for value in ODD:
            hostile_models.change(base, file, **{key: value})
            try:
                load_base_model(str(base))
            except npt.ModelError as error:
                assert "\n" not in str(error) and str(error).startswith(str(base))
        (base / file).write_text(before)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", {"model_max_length": "x"}),
        ("generation_config.json", {"eos_token_id": [["x"]]}),
        ("generation_config.json", {"eos_token_id": "x"}),
        ("config.json", {"pad_token_id": {"a": 1}}),
    ],
)
def test_what_transformers_uses_unchecked(
    tmp_path: Path, file: str, content: dict[str, Any]
) -> None:
    base = tiny.save(tmp_path / "base")
    hostile_models.change(base, file, **content)
    (key,) = content
    with pytest.raises(npt.ModelError, match=rf"{file}: {key} must be "):
        load_base_model(str(base))


def test_what_lies_beside_a_model_is_nobodys_business(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "base")
    (base / "notes.txt").symlink_to("gone")
    (base / "consolidated.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    os.mkfifo(base / "control")
    (base / "corpus.txt").touch()
    os.truncate(base / "corpus.txt", 200_000_000)
    vision = {"num_hidden_layers": 48, "hidden_size": 1 << 20, "intermediate_size": 1 << 20}
    hostile_models.change(base, "config.json", vision_config=vision)
    hostile_models.change(base, "tokenizer_config.json", model_max_length=int(1e30))
    load_base_model(str(base))


@pytest.mark.parametrize("part", [
    {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    {"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}},
    {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "BAAAAP////8="}},
])  # fmt: skip
def test_a_tokenizer_that_panics_is_an_error(tmp_path: Path, part: dict[str, Any]) -> None:
    base = tiny.save(tmp_path / "base")
    hostile_models.change(base, "tokenizer.json", **part)
    with pytest.raises(npt.ModelError, match=rf"^{base}: the tokenizer cannot "):
        encode(load_base_model(str(base))[1], "some text")


def test_nothing_beside_a_gguf_file_is_read(tmp_path: Path, canary: Path) -> None:
    hostile_models.plant(tmp_path / "base", canary)
    base = tmp_path / "base"
    hostile_models.REFUSED["tokenizer"][0](base, canary)
    os.mkfifo(base / "generation_config.json.d")
    (base / "y.gguf").write_bytes(b"GGUF and nothing else")
    with pytest.raises(npt.ModelError, match=r"y\.gguf: the base model cannot be loaded: "):
        load_base_model(str(base / "y.gguf"))
    assert not canary.exists()
