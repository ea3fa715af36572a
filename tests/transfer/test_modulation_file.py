"""Files of modulations: exact, read lazily, never trusted."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import struct
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import npt_fast as npt
from npt_fast.transfer.modulation import Modulation
from tests.transfer.models import (
    SOURCE,
    TEXT,
    assert_same,
    base,
    converted,
    ids_of,
    logits,
    random_modulation,
    tokenizer,
)

MODULATIONS: dict[str, Callable[[], Modulation]] = {
    "extracted": lambda: npt.extract(converted(), tokenizer, "Zürich \n\t\"'"),
    "mean over positions": lambda: npt.extract(
        converted(modulation="single"), tokenizer, SOURCE, position="all", reduce="mean"
    ),
    "combined": lambda: (
        0.7 * npt.extract(converted(), tokenizer, SOURCE)
        - npt.mean([npt.extract(converted(), tokenizer, text) for text in ("a", "b")])
    ),
    "compressed": lambda: random_modulation(terms=9).compress(tol=0.4)[0],
    "float32": lambda: random_modulation().to("cpu", torch.float32),
    "bfloat16": lambda: random_modulation(layers=(0, 3)).to("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("name", MODULATIONS)
def test_round_trip(name: str, tmp_path: Path) -> None:
    m = MODULATIONS[name]()
    m.save(tmp_path / "m.safetensors")
    assert_same(npt.load_modulation(tmp_path / "m.safetensors"), m)
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_bits_that_compare_equal(tmp_path: Path) -> None:
    m = random_modulation()
    m.layers[1]["up"].v_a[0, :3] = torch.tensor([5e-324, -0.0, 1e308], dtype=torch.float64)
    m.save(tmp_path / "m")
    assert_same(npt.load_modulation(str(tmp_path / "m")), m)


def test_texts_of_every_length(tmp_path: Path) -> None:
    """The first byte of a file, from the header's length, equals that of other kinds of file."""
    begins = set()
    for length in range(300):
        m = replace(random_modulation(), origin={"text": "x" * length})
        path = tmp_path / f"{length}.any"
        m.save(path)
        assert_same(npt.load_modulation(path), m)
        begins.add(path.read_bytes()[0])
    assert begins == {*range(0, 256, 8)}


def test_what_was_loaded_does_what_was_saved(tmp_path: Path) -> None:
    model = converted()
    m = npt.extract(model, tokenizer, SOURCE)
    m.save(tmp_path / "m.safetensors")
    again = npt.load_modulation(tmp_path / "m.safetensors")
    for mode in ("replace", "blend"):
        found = []
        for one in (m, again):
            with npt.inject(model, one, mode=mode, strength=0.5):
                found.append(logits(model, ids_of(TEXT)))
        assert torch.equal(*found)
    assert torch.equal((again - m).dense(1, "gate"), (m - m).dense(1, "gate"))


def test_the_file_is_safetensors_with_everything_in_its_header(tmp_path: Path) -> None:
    """The file as safetensors itself reads it."""
    m = npt.extract(converted(), tokenizer, SOURCE)
    m.save(tmp_path / "m.safetensors")
    tensors = load_file(tmp_path / "m.safetensors")
    assert torch.equal(tensors["layer.2.down.v_b"], m.layers[2]["down"].v_b)
    assert len(tensors) == 12
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        description = json.loads(file.metadata()["npt_modulation"])
    assert description["version"] == 1 and description["base"] == asdict(m.base)
    assert description["origin"] == m.origin and description["vectors"] is True
    assert description["origin"]["text"] == SOURCE and "weights" in description["origin"]
    assert description["layers"] == {layer: ["gate", "up", "down"] for layer in ("1", "2")}


def test_tensors_are_read_when_they_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    npt.extract(converted(), tokenizer, SOURCE).save(tmp_path / "m.safetensors")
    read: list[str] = []

    class Noting:
        def __init__(self, *args: Any, **options: Any) -> None:
            self.file: Any = safe_open(*args, **options)

        def get_tensor(self, name: str) -> Any:
            read.append(name)
            return self.file.get_tensor(name)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    monkeypatch.setattr("npt_fast.transfer.modulation_file.safe_open", Noting)
    m = npt.load_modulation(tmp_path / "m.safetensors")
    assert list(m.layers) == [1, 2] and len(m.layers) == 2 and m.description and m.base.sizes
    assert not read
    m.dense(2, "up")
    assert read and all(name.startswith("layer.2.") for name in read)
    with pytest.raises(KeyError):
        m.layers[3]


def test_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.safetensors"
    first, second = random_modulation(1), random_modulation(2, layers=(0,))
    first.save(path)
    loaded = npt.load_modulation(path)
    second.save(path)
    assert_same(npt.load_modulation(path), second)
    assert_same(loaded, first)  # a file opened before keeps its content
    loaded.save(path)
    assert_same(npt.load_modulation(path), first)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(npt.TransferError, match=r"cannot be written: .*No space left"):
        second.save(path)
    assert_same(npt.load_modulation(path), first)
    assert [left.name for left in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_planted_link_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if somebody guesses the name of the temporary file."""
    monkeypatch.setattr("npt_fast.checkpoint.replaced_file.token_hex", lambda count: "foreseen")
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / ".foreseen.npt-fast").symlink_to("victim")
    with pytest.raises(npt.TransferError, match=r"cannot be written: .*exists"):
        random_modulation().save(tmp_path / "m")
    assert (tmp_path / "victim").read_bytes() == b"precious"
    assert not (tmp_path / "m").exists()


def test_a_file_that_is_gone_is_no_loss(tmp_path: Path) -> None:
    m = random_modulation()
    m.save(tmp_path / "m")
    loaded = npt.load_modulation(tmp_path / "m")
    (tmp_path / "m").unlink()
    assert_same(loaded, m)


def test_another_base_is_found_at_injection(tmp_path: Path) -> None:
    random_modulation(sizes=(16, 48)).save(tmp_path / "m")
    m, model = npt.load_modulation(tmp_path / "m"), converted()
    with pytest.raises(npt.ModelError, match="hidden_size 16, the model has 32"):
        with npt.inject(model, m):
            pass
    with pytest.raises(npt.ModelError, match="hidden_size 16, the model has 32"):
        npt.bake(base(), m)
    with pytest.raises(npt.TransferError, match="different base models"):
        m + random_modulation()


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "none" / "m", tmp_path / "file" / "m", tmp_path):
        with pytest.raises(npt.TransferError, match="cannot be written: "):
            random_modulation().save(path)
    if os.geteuid():
        tmp_path.chmod(0o500)
        with pytest.raises(npt.TransferError, match="cannot be written: "):
            random_modulation().save(tmp_path / "m")
        tmp_path.chmod(0o700)
    assert [left.name for left in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("problem", ["not finite", "another type", "not of the base"])
def test_terms_that_could_not_be_read_back_are_not_saved(problem: str, tmp_path: Path) -> None:
    m = random_modulation()
    m.save(tmp_path / "m")
    changed = {
        "not finite": lambda: 1e308 * (1e308 * m),
        "another type": lambda: m.to("cpu", torch.complex128),
        "not of the base": lambda: replace(m, base=replace(m.base, hidden_size=31)),
    }[problem]()
    with pytest.raises(npt.TransferError, match=f"^{tmp_path}/m: cannot be written: ") as caught:
        changed.save(tmp_path / "m")
    assert ".npt-fast" not in str(caught.value)
    assert_same(npt.load_modulation(tmp_path / "m"), m)
    assert [left.name for left in tmp_path.iterdir()] == ["m"]


def test_a_planted_link_is_not_written_through(tmp_path: Path) -> None:
    """A link at a guessable temporary name would be written through."""
    names = set()
    for _ in range(2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "replace", lambda self, _: names.add(self.name))
            random_modulation().save(tmp_path / "m")
    assert len(names) == 2 and all(len(name) > 32 for name in names)


def test_a_name_as_long_as_it_may_be(tmp_path: Path) -> None:
    path = tmp_path / ("é" * 127)
    random_modulation().save(path)
    assert_same(npt.load_modulation(path), random_modulation())


# --- what is refused


NO_PICKLE = r"a pickle, which can run code .*; extract .* again and save it as \.safetensors"


def refuse(path: Path, message: str) -> None:
    with pytest.raises(npt.CheckpointError, match=message) as caught:
        npt.load_modulation(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".pkl", ".pickle", ".pt"])
def test_pickles_are_not_opened(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"session{suffix}"
    path.write_bytes(b"cos\nsystem\n(S'touch canary'\ntR.")
    refuse(path, NO_PICKLE)


@pytest.mark.parametrize("suffix", [".pkl", ".pickle", ".pt", ".bin", ".safetensors", ""])
@pytest.mark.parametrize("protocol", range(6))
def test_nor_are_pickles_of_any_name(suffix: str, protocol: int, tmp_path: Path) -> None:
    path = tmp_path / f"session{suffix}"
    path.write_bytes(pickle.dumps({"modulation_bank": {}}, protocol))
    refuse(path, NO_PICKLE)
    for zipped in (True, False):
        torch.save({"a": torch.ones(1)}, path, _use_new_zipfile_serialization=zipped)
        refuse(path, NO_PICKLE)


@pytest.mark.parametrize("suffix", [".pkl", ".pt", ".bin", ""])
def test_a_modulation_of_any_name_is_read(suffix: str, tmp_path: Path) -> None:
    m = random_modulation()
    m.save(tmp_path / f"m{suffix}")
    assert_same(npt.load_modulation(tmp_path / f"m{suffix}"), m)


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    refuse(tmp_path / "pipe", "not a regular file")
    refuse(Path("/dev/zero"), "not a regular file")
    random_modulation().save(tmp_path / "m")
    (tmp_path / "link").symlink_to("m")
    assert_same(npt.load_modulation(tmp_path / "link"), random_modulation())


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", struct.pack("<Q", 1 << 60) + b"{}", b"\0" * 64],
    ids=["empty", "text", "a huge header", "zeros"],
)
def test_no_safetensors(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(content)
    refuse(tmp_path / "m", "not a safetensors file")


def test_no_file(tmp_path: Path) -> None:
    refuse(tmp_path / "none", "cannot be opened: No such file")
    refuse(tmp_path, "is a directory")


@pytest.mark.parametrize("part", [4, 100, -1, -1000])
def test_truncated(part: int, tmp_path: Path) -> None:
    random_modulation().save(tmp_path / "m")
    whole = (tmp_path / "m").read_bytes()
    (tmp_path / "m").write_bytes(whole[:part])
    refuse(tmp_path / "m", "not a safetensors file|truncated")


def test_what_a_file_is_instead(tmp_path: Path) -> None:
    m = random_modulation()
    m.save(tmp_path / "m")
    for content, says in (
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0a", "git lfs pull"),
        (gzip.compress((tmp_path / "m").read_bytes()), "it is compressed with gzip"),
        (b"", "it is empty"),
    ):
        (tmp_path / "other").write_bytes(content)
        refuse(tmp_path / "other", f"not a safetensors file: .*{says}")


def test_too_long(tmp_path: Path) -> None:
    random_modulation().save(tmp_path / "m")
    with (tmp_path / "m").open("ab") as file:
        file.write(b"x")
    refuse(tmp_path / "m", "truncated or extended")
