"""Files of modulations: bit for bit, read when needed, and never trusted."""

from __future__ import annotations

import gzip
import json
import os
import struct
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import npt_fast as npt
from npt_fast.transfer.modulation import Modulation
from tests.transfer.models import (
    SOURCE,
    TEXT,
    base,
    converted,
    ids_of,
    logits,
    random_modulation,
    tokenizer,
)


def tensors_of(m: Modulation) -> dict[tuple[int, str, int], Tensor]:
    return {(layer, p, i): v for layer, p, terms in m.walk() for i, v in enumerate(terms)}


def assert_same(actual: Modulation, expected: Modulation) -> None:
    """Everything, tensors bit for bit."""
    assert (actual.base, actual.vectors) == (expected.base, expected.vectors)
    assert actual.origin == expected.origin and actual.description == expected.description
    found, wanted = tensors_of(actual), tensors_of(expected)
    assert list(found) == list(wanted)
    for key, v in wanted.items():
        assert found[key].dtype == v.dtype and found[key].shape == v.shape
        assert torch.equal(found[key].view(torch.uint8), v.contiguous().view(torch.uint8))


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


def test_bits_that_compare_unequal(tmp_path: Path) -> None:
    m = random_modulation()
    m.layers[1]["up"].v_a[0, :3] = torch.tensor([torch.nan, -0.0, torch.inf])
    m.save(tmp_path / "m")
    assert_same(npt.load_modulation(str(tmp_path / "m")), m)


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
    """Read by another reader."""
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

    monkeypatch.setattr("npt_fast.transfer.files.safe_open", Noting)
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
    assert_same(loaded, first)  # what was opened before stays what it was
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
    """Even if somebody foresees the hidden name under which the file is written."""
    monkeypatch.setattr("secrets.token_hex", lambda count: "foreseen")
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


def test_an_origin_that_is_too_long(tmp_path: Path) -> None:
    m = random_modulation()
    for _ in range(3000):
        m = 1.0 * m
    assert m.description == "unknown"
    with pytest.raises(npt.TransferError, match="cannot be written: maximum recursion depth"):
        m.save(tmp_path / "m")
    assert not list(tmp_path.iterdir())


# --- what is refused


def refuse(path: Path, message: str) -> None:
    with pytest.raises(npt.CheckpointError, match=message) as caught:
        npt.load_modulation(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".pkl", ".pickle", ".pt"])
def test_pickles_are_not_opened(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"session{suffix}"
    path.write_bytes(b"cos\nsystem\n(S'touch canary'\ntR.")
    refuse(path, r"pickles can run code and are not read; extract .* again and save it as \.safet")


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"cos\nsystem\n(S'x'\ntR.", struct.pack("<Q", 1 << 60) + b"{}", b"\0" * 64],
    ids=["empty", "text", "a pickle of another name", "a huge header", "zeros"],
)
def test_no_safetensors(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(content)
    refuse(tmp_path / "m", "cannot be read")


def test_no_file(tmp_path: Path) -> None:
    refuse(tmp_path / "none", "cannot be read")
    refuse(tmp_path, "cannot be read")


@pytest.mark.parametrize("part", [4, 100, -1, -1000])
def test_truncated(part: int, tmp_path: Path) -> None:
    random_modulation().save(tmp_path / "m")
    whole = (tmp_path / "m").read_bytes()
    (tmp_path / "m").write_bytes(whole[:part])
    refuse(tmp_path / "m", "cannot be read")


def test_what_a_file_is_instead(tmp_path: Path) -> None:
    m = random_modulation()
    m.save(tmp_path / "m")
    for content, says in (
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0a", "git lfs pull"),
        (gzip.compress((tmp_path / "m").read_bytes()), "it is compressed with gzip"),
        (b"", "it is empty"),
    ):
        (tmp_path / "other").write_bytes(content)
        refuse(tmp_path / "other", f"cannot be read: .*{says}")


@pytest.mark.parametrize("text", ["caf\udce9", "\ud800", 'a\n"漢"\\'])
def test_any_text_that_is_saved_is_read_back(text: str, tmp_path: Path) -> None:
    m = replace(random_modulation(), origin={"text": text})
    m.save(tmp_path / "m")
    assert npt.load_modulation(tmp_path / "m").origin == {"text": text}


@pytest.mark.parametrize("error", [float("nan"), float("inf")])
def test_what_could_not_be_read_back_is_not_saved(error: float, tmp_path: Path) -> None:
    with pytest.raises(npt.TransferError, match="m: cannot be written: Out of range float"):
        replace(random_modulation(), origin={"error": error}).save(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_too_long(tmp_path: Path) -> None:
    random_modulation().save(tmp_path / "m")
    with (tmp_path / "m").open("ab") as file:
        file.write(b"x")
    refuse(tmp_path / "m", "cannot be read")


def test_other_safetensors(tmp_path: Path) -> None:
    save_file({"layer.1.up.v_a": torch.zeros(1, 32)}, tmp_path / "m")
    refuse(tmp_path / "m", "is no modulation: its header has no npt_modulation")


def description() -> dict[str, Any]:
    return {
        "version": 1,
        "base": asdict(random_modulation().base),
        "origin": {},
        "vectors": False,
        "layers": {"1": ["gate", "down"]},
    }


def tensors() -> dict[str, Tensor]:
    m = random_modulation(layers=(1,), projections=("gate", "down"))
    return {f"layer.1.{p}.v_{'ab'[i]}": v for (_, p, i), v in tensors_of(m).items()}


def written(path: Path, text: str, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, path, {"npt_modulation": text})
    return path


def test_the_cases_below_are_fine_but_for_one_thing(tmp_path: Path) -> None:
    m = npt.load_modulation(written(tmp_path / "m", json.dumps(description()), tensors()))
    assert [(layer, p) for layer, p, _ in m.walk()] == [(1, "gate"), (1, "down")]


TENSORS: dict[str, dict[str, Tensor | None]] = {
    "missing": {"layer.1.down.v_b": None},
    "a projection too many": {
        "layer.1.up.v_a": torch.zeros(2, 32),
        "layer.1.up.v_b": torch.zeros(2, 48),
    },
    "a layer too many": {"layer.2.gate.v_a": torch.zeros(2, 32)},
    "another name": {"layer.1.gate.v_c": torch.zeros(2, 32)},
    "too narrow": {"layer.1.gate.v_a": torch.zeros(2, 31)},
    "sides swapped": {
        "layer.1.down.v_a": torch.zeros(2, 32),
        "layer.1.down.v_b": torch.zeros(2, 48),
    },
    "other number of terms": {"layer.1.gate.v_b": torch.zeros(3, 48)},
    "flat": {"layer.1.gate.v_a": torch.zeros(64)},
    "no dimension": {"layer.1.gate.v_a": torch.tensor(0.0)},
    "three dimensions": {"layer.1.gate.v_a": torch.zeros(2, 32, 1)},
}


@pytest.mark.parametrize("what", TENSORS)
def test_tensors_that_are_not_those_of_the_description(what: str, tmp_path: Path) -> None:
    changed = {**tensors(), **TENSORS[what]}
    kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
    path = written(tmp_path / "m", json.dumps(description()), kept)
    refuse(path, "its description does not hold: ")


def test_the_tensor_is_named(tmp_path: Path) -> None:
    changed = {**tensors(), "layer.1.gate.v_a": torch.zeros(2, 31)}
    path = written(tmp_path / "m", json.dumps(description()), changed)
    refuse(path, r"'layer.1.gate.v_a' is \[2, 31\], \[2, 32\] expected")


BASE = asdict(random_modulation().base)
DESCRIPTIONS: dict[str, dict[str, Any]] = {
    "no base": {"base": None},
    "base of other names": {"base": {"width": 3}},
    "base with more": {"base": {**BASE, "extra": 1}},
    "size zero": {"base": {**BASE, "hidden_size": 0}},
    "size negative": {"base": {**BASE, "hidden_size": -32}},
    "size a truth": {"base": {**BASE, "num_hidden_layers": True}},
    "size a text": {"base": {**BASE, "hidden_size": "32"}},
    "size a fraction": {"base": {**BASE, "hidden_size": 32.0}},
    "layer outside": {"layers": {"4": ["gate", "down"]}},
    "layer negative": {"layers": {"-1": ["gate", "down"]}},
    "layer no number": {"layers": {"one": ["gate", "down"]}},
    "layer fails to name projections": {"layers": {"1": []}},
    "layers a list": {"layers": [1]},
    "no layers": {"layers": {}},
    "layers nothing": {"layers": None},
    "projection unknown": {"layers": {"1": ["gate", "../../etc"]}},
    "projection no text": {"layers": {"1": [7, "down"]}},
    "projections no list": {"layers": {"1": 7}},
    "origin no object": {"origin": 7},
    "origin nothing": {"origin": None},
}


@pytest.mark.parametrize("what", DESCRIPTIONS)
def test_descriptions_that_do_not_hold(what: str, tmp_path: Path) -> None:
    text = json.dumps({**description(), **DESCRIPTIONS[what]})
    refuse(written(tmp_path / "m", text, tensors()), "its description does not hold: ")


@pytest.mark.parametrize("name", ["base", "origin", "vectors", "layers"])
def test_a_description_that_lacks_something(name: str, tmp_path: Path) -> None:
    text = json.dumps({key: value for key, value in description().items() if key != name})
    refuse(written(tmp_path / "m", text, tensors()), f"does not hold: '{name}'")


@pytest.mark.parametrize("version", [0, 2, "1", None, [1]])
def test_versions(version: Any, tmp_path: Path) -> None:
    text = json.dumps({**description(), "version": version})
    refuse(written(tmp_path / "m", text, tensors()), "version .*, this program reads 1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ('{"version": 1, "version": 1}', "occurs twice"),
        ('{"version": NaN}', "not allowed here"),
        ('{"version": 1, "origin": ' + '{"of": ' * 100_000 + "1" + "}" * 100_001, "not valid JSON"),
        ('{"version": 1, "origin": [' + "[]," * 500_000 + "[]]}", "too many"),
    ],
    ids=["empty", "open", "a list", "twice", "NaN", "deep", "wide"],
)
def test_hostile_json(text: str, message: str, tmp_path: Path) -> None:
    refuse(written(tmp_path / "m", text, tensors()), message)


def test_an_origin_that_says_anything_still_loads(tmp_path: Path) -> None:
    """It is only shown; control characters do not reach the terminal."""
    origin = {"sum": [{"factor": "\x1b[2J"}]}
    text = json.dumps({**description(), "origin": origin})
    m = npt.load_modulation(written(tmp_path / "m", text, tensors()))
    assert m.description == "unknown" and m.origin == origin
    for control in ("\x1b[2J", "\x9b2J", "\x7f"):
        text = json.dumps({**description(), "origin": {"text": control}})
        shown = npt.load_modulation(written(tmp_path / "n", text, tensors())).description
        assert shown.isprintable()
