"""Sampled texts on the disk: found again, refused if they are not what their name says."""

from __future__ import annotations

import os
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import npt_fast as npt
from npt_fast.training import self_text as module
from npt_fast.training.sampling import sample_text
from npt_fast.training.self_text import SelfText, self_text
from tests.doors import EVERY_FILE, SAFETENSORS, Attack
from tests.training import tiny
from tests.training.runs import umask

OPTIONS: dict[str, Any] = {"tokens": 90, "max_length": 10}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.model(initializer_range=0.2)


def kept(model: Any, **changes: Any) -> SelfText:
    return self_text(model, tiny.tokenizer(), **{**OPTIONS, **changes})


def untouchable(*args: Any, **options: Any) -> Any:
    raise AssertionError("sampled")


def test_a_text_is_sampled_once(model: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    with umask(0o027):
        first = kept(model, say=said.append)
    assert torch.equal(first.ids, sample_text(model, tiny.tokenizer(), **OPTIONS).int())
    assert list(cache.iterdir()) == [first.path] and str(first.path) in said[0]
    assert stat.S_IMODE(first.path.stat().st_mode) == 0o640
    assert torch.equal(load_file(first.path)["ids"], first.ids)  # the library's reader
    monkeypatch.setattr(module, "sample_text", untouchable)
    again = kept(model, say=said.append)
    assert torch.equal(again.ids, first.ids) and again[1:] == first[1:] and len(said) == 1


def test_all_that_decides_a_text_is_in_its_name(model: Any) -> None:
    trained = tiny.model(initializer_range=0.2)
    with torch.no_grad():  # norms and embeddings stay, of which fingerprints are made
        trained.model.layers[3].mlp.up_proj.weight += 1e-3
    rope = {"rope_type": "default", "rope_theta": 500.0}
    models = (
        model,
        trained,
        tiny.model(initializer_range=0.2, layers=3),
        tiny.model(initializer_range=0.2, rope_parameters=rope),
        tiny.model(initializer_range=0.2).bfloat16(),
    )
    changes = ({}, {"seed": 7}, {"tokens": 100}, {"max_length": 9}, {"first_tokens": ["a"]})
    keys = {kept(m).key for m in models} | {kept(model, **change).key for change in changes}
    assert len(keys) == len(models) + len(changes) - 1
    assert kept(model, tokens=81).key == kept(model).key  # as many rows
    npt.convert(model, npt.NPTConfig(layers=[1], rank=2))
    assert kept(model).key in keys
    npt.unload(model)


def damaged(change: Callable[[bytes], bytes]) -> Attack:
    def attack(path: Path) -> None:
        path.write_bytes(change(path.read_bytes()))

    return attack


def rewritten(change: Callable[[dict[str, Any], dict[str, str]], None]) -> Attack:
    def attack(path: Path) -> None:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        change(tensors, metadata)
        save_file(tensors, path, metadata)

    return attack


def unknown_tokens(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    tensors["ids"][0, 0] = 257
    metadata["sha256"] = module._sha256(tensors["ids"])


ATTACKS: dict[str, Attack] = {
    **EVERY_FILE,
    **SAFETENSORS,
    "truncated": damaged(lambda data: data[:-5]),
    "extended": damaged(lambda data: data + b"0"),
    "one bit": damaged(lambda data: data[:-7] + bytes([data[-7] ^ 1]) + data[-6:]),
    "empty": damaged(lambda data: b""),
    "folder": lambda path: (path.unlink(), path.mkdir()) and None,
    "shape": rewritten(lambda tensors, _: tensors.update(ids=tensors["ids"].T.contiguous())),
    "dtype": rewritten(lambda tensors, _: tensors.update(ids=tensors["ids"].long())),
    "more": rewritten(lambda tensors, _: tensors.update(more=tensors["ids"].clone())),
    "no sum": rewritten(lambda _, metadata: metadata.update(sha256="")),
    "unknown tokens": rewritten(unknown_tokens),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_file_that_is_not_the_text(model: Any, attack: str) -> None:
    path = kept(model).path
    ATTACKS[attack](path)
    with pytest.raises(npt.DataError) as caught:
        kept(model)
    line = str(caught.value)
    assert line.startswith(f"{path}: ") and line.endswith("remove it, and the text is sampled anew")


def test_the_text_of_another_model(model: Any) -> None:
    other = kept(tiny.model()).path
    other.replace(kept(model).path)
    with pytest.raises(npt.DataError, match="is not the text of this model that its name says"):
        kept(model)


def test_places_where_nothing_can_be_written(
    model: Any, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = kept(model).path
    part = path.with_suffix(".part")
    path.unlink()
    for plant, problem in (
        (lambda: os.mkfifo(part), "not a regular file; remove it"),
        (lambda: part.symlink_to(tmp_path / "elsewhere"), "symbolic links"),
        (part.mkdir, "directory"),
    ):
        plant()
        with pytest.raises(npt.DataError, match=problem):
            kept(model)
        part.rmdir() if part.is_dir() else part.unlink()
    assert not (tmp_path / "elsewhere").exists()
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(npt.DataError, match="Not a directory"):
        kept(model)


def test_a_failure_leaves_nothing(model: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "sample_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        kept(model)
    assert list(cache.iterdir()) == []


def fork(work: Callable[[], object]) -> int:
    child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return child


def test_one_process_samples_and_the_others_wait(
    model: Any, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def noted(*args: Any, **options: Any) -> Any:
        with (tmp_path / "samplers").open("a") as file:
            file.write("x")
        time.sleep(0.3)  # the others come meanwhile
        return sample_text(*args, **options)

    monkeypatch.setattr(module, "sample_text", noted)
    children = [fork(lambda: kept(model)) for _ in range(4)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert (tmp_path / "samplers").read_text() == "x"
    assert [path.suffix for path in cache.iterdir()] == [".safetensors"]


def test_a_process_that_comes_when_the_text_is_there(
    model: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looked for the text before the other one had published it."""
    found = kept(model)
    seen = iter([False])
    monkeypatch.setattr(module, "exists", lambda path: next(seen, True))
    monkeypatch.setattr(module, "sample_text", untouchable)
    assert torch.equal(kept(model).ids, found.ids)
    assert list(cache.iterdir()) == [found.path]


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    own = tmp_path / ".cache" / "npt_fast"
    for given, expected in (("/a", Path("/a/npt_fast")), ("a", own), ("", own), ("../a", own)):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        assert module.cache_folder() == expected
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert module.cache_folder() == own


def test_a_killed_process_keeps_nobody_waiting(
    model: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stuck(*args: Any, **options: Any) -> Any:
        signal.pause()

    with monkeypatch.context() as patch:
        patch.setattr(module, "sample_text", stuck)
        child = fork(lambda: kept(model))
        while not list(cache.glob("*.part")):
            time.sleep(0.01)
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if line.startswith("Another process"):
            os.kill(child, signal.SIGKILL)

    found = kept(model, say=say)
    os.waitpid(child, 0)
    assert torch.equal(found.ids, sample_text(model, tiny.tokenizer(), **OPTIONS).int())
    assert list(cache.iterdir()) == [found.path]
