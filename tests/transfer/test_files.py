"""Files of modulations: bit for bit, read when needed, and never trusted."""

from __future__ import annotations

import gzip
import json
import math
import os
import pickle
import struct
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
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


def test_bits_that_compare_equal(tmp_path: Path) -> None:
    m = random_modulation()
    m.layers[1]["up"].v_a[0, :3] = torch.tensor([5e-324, -0.0, 1e308], dtype=torch.float64)
    m.save(tmp_path / "m")
    assert_same(npt.load_modulation(str(tmp_path / "m")), m)


def test_texts_of_every_length(tmp_path: Path) -> None:
    """The header's length has every byte that a file of another kind begins with."""
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
    monkeypatch.setattr("npt_fast.transfer.files.token_hex", lambda count: "foreseen")
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
    """Where the name of the temporary file could be guessed, somebody would be there first."""
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


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@example({"text": "caf\udce9"})
@example({"text": "\ud800"})
@example({"\ud800": 1})
@example({"text": 'a\n"漢"\\\0\x1b😀'})
@example({"error": math.nan})
@example({"factor": 1e308, "of": {"factor": -5e-324, "of": {}}})
@example({"factor": 10**400})
@example({"text": "😀\0" * 100_000})
@example({"text": "\0" * 1_500_000})
@given(st.dictionaries(st.text(st.characters()), PLAIN))
@settings(deadline=None, derandomize=True)
def test_an_origin_is_refused_or_read_back(origin: dict[str, Any]) -> None:
    m = replace(random_modulation(layers=(1,), projections=("up",)), origin=origin)
    with TemporaryDirectory() as folder:
        path = Path(folder, "m")
        try:
            m.save(path)
        except npt.TransferError as error:
            assert str(error).startswith(f"{path}: cannot be written: ") and len(str(error)) < 500
            assert not list(path.parent.iterdir())
        else:
            assert_same(npt.load_modulation(path), m)


def nested(depth: int) -> dict[str, Any]:
    """Mappings in one another."""
    found: dict[str, Any] = {}
    for _ in range(depth - 1):
        found = {"of": found}
    return found


def shared(doublings: int) -> dict[str, Any]:
    """A tree of 2 ** doublings leaves that takes no memory."""
    found: dict[str, Any] = {}
    for _ in range(doublings):
        found = {"sum": [found, found]}
    return found


def cyclic() -> dict[str, Any]:
    found: dict[str, Any] = {}
    found["of"] = found
    return found


@pytest.mark.parametrize(
    "origin",
    [
        nested(65), nested(850), nested(100_000), shared(30), cyclic(), {"a": object()}, {1: "a"},
        {"a": b"bytes"}, {"a": {1, 2}}, {"a": math.inf}, {"a": 1 << 63}, {"a": 1j}, [1], None,
    ],
)  # fmt: skip
def test_what_could_not_be_read_back_is_not_saved(origin: Any, tmp_path: Path) -> None:
    with pytest.raises(npt.TransferError, match="m: cannot be written: its origin must be a mapp"):
        replace(random_modulation(), origin=origin).save(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_as_deep_as_an_origin_may_be(tmp_path: Path) -> None:
    m = replace(random_modulation(), origin=nested(64))
    m.save(tmp_path / "m")
    assert_same(npt.load_modulation(tmp_path / "m"), m)


def test_too_long(tmp_path: Path) -> None:
    random_modulation().save(tmp_path / "m")
    with (tmp_path / "m").open("ab") as file:
        file.write(b"x")
    refuse(tmp_path / "m", "truncated or extended")


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
    "no terms": {"layer.1.gate.v_a": torch.zeros(0, 32), "layer.1.gate.v_b": torch.zeros(0, 48)},
    "one of less precision": {"layer.1.gate.v_a": torch.zeros(2, 32)},
    **{
        f"of {dtype}": {
            f"layer.1.gate.v_{letter}": torch.zeros(2, width).to(dtype)
            for letter, width in (("a", 32), ("b", 48))
        }
        for dtype in (torch.bool, torch.int64, torch.complex64, torch.float8_e4m3fn)
    },
}


@pytest.mark.parametrize("what", TENSORS)
def test_tensors_that_are_not_those_of_the_description(what: str, tmp_path: Path) -> None:
    changed = {**tensors(), **TENSORS[what]}
    kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
    path = written(tmp_path / "m", json.dumps(description()), kept)
    refuse(path, "its description does not hold: ")


def test_the_tensor_is_named(tmp_path: Path) -> None:
    changed = {**tensors(), "layer.1.gate.v_a": torch.zeros(2, 31).double()}
    path = written(tmp_path / "m", json.dumps(description()), changed)
    refuse(path, r"'layer.1.gate.v_a' is \[2, 31\], \[2, 32\] expected$")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_terms_that_are_not_finite(value: float, tmp_path: Path) -> None:
    changed = tensors()
    changed["layer.1.gate.v_b"][1, 3] = value
    m = npt.load_modulation(written(tmp_path / "m", json.dumps(description()), changed))
    with pytest.raises(npt.CheckpointError, match=r"m: layer\.1\.gate\.v_b holds NaN or infinity"):
        m.magnitude(1)


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
    "size of 400 digits": {"base": {**BASE, "hidden_size": 10**400}},
    "name no text": {"base": {**BASE, "name": 5}},
    "layer of 5,000 digits": {"layers": {"9" * 5000: ["gate", "down"]}},
    "layer in another script": {"layers": {"\u0661": ["gate", "down"]}},
    "layer with a zero before it": {"layers": {"01": ["gate", "down"]}},
    "layer negative": {"layers": {"-1": ["gate", "down"]}},
    "layer no number": {"layers": {"one": ["gate", "down"]}},
    "layer fails to name projections": {"layers": {"1": []}},
    "layers a list": {"layers": [1]},
    "no layers": {"layers": {}},
    "layers nothing": {"layers": None},
    "projection unknown": {"layers": {"1": ["gate", "../../etc"]}},
    "projection no text": {"layers": {"1": [7, "down"]}},
    "projection twice": {"layers": {"1": ["gate", "gate", "down"]}},
    "projections no list": {"layers": {"1": 7}},
    "origin no object": {"origin": 7},
    "origin nothing": {"origin": None},
    "origin 65 deep": {"origin": nested(65)},
    "origin with a number of 400 digits": {"origin": {"factor": 10**400, "of": {}}},
    "vectors a number": {"vectors": 1},
}


@pytest.mark.parametrize("what", DESCRIPTIONS)
def test_descriptions_that_do_not_hold(what: str, tmp_path: Path) -> None:
    text = json.dumps({**description(), **DESCRIPTIONS[what]})
    refuse(written(tmp_path / "m", text, tensors()), "its description does not hold|number")


@pytest.mark.parametrize("name", ["base", "origin", "vectors", "layers"])
def test_a_description_that_lacks_something(name: str, tmp_path: Path) -> None:
    text = json.dumps({key: value for key, value in description().items() if key != name})
    refuse(written(tmp_path / "m", text, tensors()), f"does not hold: {name} is missing")


@pytest.mark.parametrize("version", [0, 2, "1", None, [1], True, 1.0])
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
