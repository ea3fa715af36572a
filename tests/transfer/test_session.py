"""Sessions: shelf, arithmetic as users write it, undo, files, logs."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import npt_fast as npt
from npt_fast.checkpoint import strict_json
from npt_fast.errors import CheckpointError, ModelError, NPTError, TransferError
from npt_fast.schema import is_text
from npt_fast.transfer import journal
from npt_fast.transfer.compare import compare
from npt_fast.transfer.expression import evaluate
from npt_fast.transfer.generate import Sampling
from npt_fast.transfer.modulation import Modulation
from npt_fast.transfer.session import Session, fingerprint
from tests.checkpoints import layer_weights, write_checkpoint
from tests.training import tiny

SIZES: dict[str, Any] = {"d": 32, "f": 48, "rank": 3, "num_ranks": 2}


def new_session(folder: Path, *layers: int, **changes: Any) -> Session:
    weights: dict[str, Tensor] = {}
    for layer in layers or (1, 2):
        found = layer_weights(layer, **SIZES)
        weights |= {name: tensor * 0.5 for name, tensor in found.items()}
    model = tiny.model(**changes)
    npt.load(model, write_checkpoint(folder, weights))
    return Session(model, tiny.tokenizer())


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return new_session(tmp_path / "checkpoint")


@pytest.fixture
def two(session: Session) -> Session:
    """With modulations a and b."""
    session.extract("a", "first")
    session.extract("b", "second thing", position=2)
    return session


def dense(modulation: Modulation) -> dict[tuple[int, str], Tensor]:
    """dW by layer and projection, float64."""
    return {
        (layer, name): terms.v_b.double().t() @ terms.v_a.double()
        for layer, name, terms in modulation.walk()
    }


def weights(session: Session) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in session.model.state_dict().items()}


def test_needs_np_layers() -> None:
    with pytest.raises(ModelError, match="no NPT layers"):
        Session(tiny.model(), tiny.tokenizer())


def test_operations_are_those_of_the_library(session: Session) -> None:
    one = session.extract("a", "first", position=-2)
    sequence = session.extract("s", "first", sequence=True)
    model, tokenizer = session.model, session.tokenizer
    assert fingerprint(one) == fingerprint(npt.extract(model, tokenizer, "first", position=3))
    whole = npt.extract(model, tokenizer, "first", position="all", reduce="mean")
    assert fingerprint(sequence) == fingerprint(whole)
    session.track(["x"])
    sampling = Sampling(tokens=3)
    found = session.inject("a", "other", sampling=sampling).comparison
    expected = compare(model, tokenizer, one, "other", sampling=sampling, tracked=["x"])
    for name in ("base", "injected", "top", "top_base", "tracked", "kl", "kls", "positions"):
        assert getattr(found, name) == getattr(expected, name), name
    assert session.predict("other").top == [(t.text, t.before) for t in expected.top_base]


@pytest.mark.parametrize(
    ("text", "truth"),
    [
        ("a", lambda a, b: a),
        ("0.7*a - b", lambda a, b: 0.7 * a - b),
        ("-(a - 2*b) * 3", lambda a, b: -3 * a + 6 * b),
        ("mean(a, b, +a)", lambda a, b: (2 * a + b) / 3),
        ("(1 - 0.25) * mean(a, b) + 1e-1*b", lambda a, b: 0.375 * a + 0.475 * b),
    ],
)
def test_calculated_exactly(
    two: Session, text: str, truth: Callable[[Tensor, Tensor], Tensor]
) -> None:
    names = {name: two.modulation(name).to("cpu", torch.float64) for name in ("a", "b")}
    found = dense(evaluate(text, names.__getitem__))
    a, b = dense(names["a"]), dense(names["b"])
    for key, value in found.items():
        torch.testing.assert_close(value, truth(a[key], b[key]), rtol=1e-12, atol=1e-12)
    assert two.calculate("c", f" {text} ").layers.keys() == {1, 2}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a + c", "no modulation is called 'c'"),
        ("a +", "cannot be read"),
        ("", "cannot be read"),
        ("a + 1", "a number cannot be added"),
        ("a * b", "not by each other"),
        ("a / 2", "only names, numbers"),
        ("a ** 2", "only names, numbers"),
        ("2 * 3", "is a number"),
        ("True * a", "only names, numbers"),
        ("1j * a", "only names, numbers"),
        ("1e999 * a", "cannot be multiplied by inf"),
        ("mean()", "only names, numbers"),
        ("mean(a, 2)", "no numbers"),
        ("mean(*a)", "only names, numbers"),
        ("max(a, b)", "only names, numbers"),
        ("a.layers", "only names, numbers"),
        ("a[0]", "only names, numbers"),
        ("__import__('os').system('x')", "only names, numbers"),
        ("(lambda: a)()", "only names, numbers"),
        ("(b := a)", "only names, numbers"),
        ("a; b", "cannot be read"),
        ("a\0", "cannot be read"),
        ("(" * 300 + "a" + ")" * 300, "cannot be read"),
        ("-" * 2000 + "a", "too long"),
    ],
)
def test_what_is_no_expression(two: Session, text: str, problem: str) -> None:
    with pytest.raises(TransferError, match=problem):
        two.calculate("new", text)
    assert "new" not in two.state.shelf


def test_everything_can_be_undone(two: Session) -> None:
    before = two.state
    changes: list[Callable[[], object]] = [
        lambda: two.extract("a", "another"),
        lambda: two.delete("b"),
        lambda: two.calculate("c", "-a"),
        lambda: two.track(["x", "y"]),
        lambda: two.untrack(["x"]),
        lambda: two.activate([2]),
        lambda: two.set(seed=3),
    ]
    states = []
    for change in changes:
        states.append(two.state)
        change()
        assert two.state != states[-1]
    enabled = [status.enabled for status in npt.status(two.model)]
    assert enabled == [False, True]
    for state in reversed(states):
        two.undo()
        assert two.state == state
    assert two.state == before
    assert all(status.enabled for status in npt.status(two.model))


def test_baking_is_undone_bit_for_bit(two: Session) -> None:
    original = weights(two)
    plain = two.predict("text").top
    two.bake("a", 2.0)
    assert two.predict("text").top != plain
    two.bake("b")
    two.track(["x"])
    assert two.bakes == 2
    for _ in range(3):
        two.undo()
    assert all(torch.equal(tensor, original[name]) for name, tensor in weights(two).items())
    assert two.predict("text").top == plain
    two.bake("a")
    two.bake("b")
    shelf = two.state
    two.reset()
    assert two.bakes == 0 and not two.state.shelf
    assert all(torch.equal(tensor, original[name]) for name, tensor in weights(two).items())
    assert two.undo() == "reset"
    assert two.state == shelf
    with pytest.raises(TransferError, match="nothing to undo"):
        two.undo()


def test_layers_that_are_off(two: Session) -> None:
    two.activate([2])
    found = two.inject("a", "text")
    assert found.comparison.layers == [2] and found.left_out == [1]
    part = two.extract("c", "first")
    assert list(part.layers) == [2]
    two.activate([1])
    with pytest.raises(TransferError, match=r"'c' changes layers \[2\], which are off; on are"):
        two.inject("c", "text")
    with pytest.raises(TransferError, match="layer 3 is not loaded; there are 1, 2"):
        two.activate([1, 3])
    assert two.state.layers == (1,)


@pytest.mark.parametrize(
    ("make", "mode", "strength", "reason"),
    [
        ("a", "add", 0.0, "strength is 0"),
        ("own", "replace", 1.0, "has of its own"),
        ("zero", "exact-add", 1.0, "modulation is zero"),
        ("a", "replace", 1.0, ""),
    ],
)
def test_no_effect_is_explained(
    two: Session, make: str, mode: Any, strength: float, reason: str
) -> None:
    two.extract("own", "text")
    two.calculate("zero", "0 * a")
    found = two.inject(make, "text", mode=mode, strength=strength)
    assert (reason in found.no_effect) if reason else found.no_effect == ""


def test_names_are_suggested(two: Session) -> None:
    two.extract("knowledge", "text")
    with pytest.raises(TransferError, match="'knowlege'; did you mean 'knowledge'"):
        two.inject("knowlege", "text")


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
    two.save(folder)  # its own folder is replaced, and what was loaded does not hang on it
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
    wide = new_session(tmp_path / "wide", num_attention_heads=4, vocab_size=300)
    wide.extract("w", "text")
    refused(wide.save(tmp_path / "foreign"), "another base model", ModelError)
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
        if key == "base" or (key, value) == ("npt_shelf", True):  # read by nobody; 1
            continue
        (folder / "session.json").write_bytes(strict_json.dump({**index, key: value}))
        if (key, value) == ("layers", [5]):
            refused(folder, "layer 5 is not loaded", ModelError)
        else:
            refused(folder, "does not hold|no saved session")
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
    with pytest.raises(TransferError, match="is no Unicode text"):
        two.track(["\ud800"])


def test_files_of_any_name_and_any_text_are_loaded(session: Session, tmp_path: Path) -> None:
    """That of a folder or file need not be Unicode, and a name may look like a pickle's."""
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
    with pytest.raises(TransferError, match="no saved session"):
        two.save(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "mine"


def test_a_log_is_written_as_it_goes(tmp_path: Path) -> None:
    path = tmp_path / "new" / "log.jsonl"
    log = journal.Journal(path, {"model_name": "m"})
    log.write({"command": "list", "result": {"é": 1.5}})
    log.write({"command": "load caf\udce9"})  # a path that is not UTF-8
    header, entries = journal.read(path)  # it is still open
    assert header == {"npt_session": 1, "model_name": "m"}
    assert list(entries) == [
        {"command": "list", "result": {"é": 1.5}},
        {"command": "load caf\\udce9"},
    ]
    log.close()
    with path.open("a") as file:
        file.write('{"command": "ext')  # killed in the middle
    assert list(journal.read(path)[1]) == list(entries)
    with pytest.raises(TransferError, match="exists already"):
        journal.Journal(path, {})


HEADER: dict[str, Any] = {
    "npt_session": 1, "model_name": "m", "checkpoint": "c", "layers": [1], "weights": {"1": "ab"}
}  # fmt: skip


@pytest.mark.parametrize("value", [5, [5], {"a": 5}, None, True, [None], ["x"], 1.5])
@pytest.mark.parametrize("key", [*HEADER, "command", "error", "digests", "result", "seed"])
def test_values_of_wrong_types(tmp_path: Path, key: str, value: Any) -> None:
    right = (key, value) in (("layers", [5]), ("seed", 5), ("result", {"a": 5}))
    header, entry = dict(HEADER), {"command": "list"}
    (header if key in header else entry)[key] = value
    (tmp_path / "log").write_text(f"{json.dumps(header)}\n{json.dumps(entry)}\n")
    if right:
        assert len(journal.read(tmp_path / "log")[1]) == 1
        return
    with pytest.raises(CheckpointError, match=rf"log(, line [12]: {key} must be |: is no session)"):
        journal.read(tmp_path / "log")
    if key == "npt_session":
        return  # it is what a log begins with
    with pytest.raises(TransferError, match=rf"new: cannot be written: {key} must be "):
        journal.Journal(tmp_path / "new", header).write(entry)


def test_a_log_that_is_no_file_or_has_no_lines(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(CheckpointError, match=r"not a regular file|is a directory"):
            journal.read(path)
    with (tmp_path / "long").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match=r"more than .* are refused"):
        journal.read(tmp_path / "long")
    (tmp_path / "line").write_bytes(b"a" * (5 << 20) + b"\n")
    with pytest.raises(CheckpointError, match=r"line 1: .* are read"):
        journal.read(tmp_path / "line")


LINE = st.dictionaries(
    st.sampled_from(["command", "seed", "error", "result", "other"]),
    st.text(st.characters()) | st.integers() | st.dictionaries(st.text(), st.floats()),
)


@example({"command": "a" * (5 << 20)})
@example({"command": "\ud800\\\udfff\n\0"})
@example({"command": "list", "seed": 10**400})
@given(LINE)
@settings(deadline=None, derandomize=True)
def test_a_line_is_refused_or_read_back(entry: dict[str, Any]) -> None:
    with TemporaryDirectory() as folder:
        log = journal.Journal(Path(folder, "log"), HEADER)
        try:
            log.write(entry)
        except (TransferError, ValueError):  # not finite
            assert not journal.read(log.path)[1]
        else:
            (found,) = journal.read(log.path)[1]
            assert found.keys() <= entry.keys()
            assert is_text(entry["command"]) <= (found["command"] == entry["command"])


def test_a_full_log_is_written_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_MAX_BYTES", 1000)
    log = journal.Journal(tmp_path / "log", HEADER)
    with pytest.raises(TransferError, match="is full with 1,000 bytes"):
        for _ in range(100):
            log.write({"command": "list"})
    assert len(journal.read(tmp_path / "log")[1]) > 10


@pytest.mark.parametrize("text", ["", "{}\n", "[1]\n", '{"npt_session": 2}\n', "nonsense\n"])
def test_what_is_no_log(tmp_path: Path, text: str) -> None:
    (tmp_path / "log").write_text(text)
    with pytest.raises(CheckpointError, match="log"):
        journal.read(tmp_path / "log")


@pytest.mark.parametrize(
    ("recorded", "now", "expected"),
    [
        ({"kl": 0.5, "seconds": 1.0}, {"kl": 0.50005, "seconds": 9.0}, None),
        ({"kl": 0.5}, {"kl": 0.5002}, "result.kl: 0.5 recorded, 0.5002 now"),
        ({"m": [1, 2000.0]}, {"m": [1, 2000.1]}, None),
        ({"m": [1, 2000.0]}, {"m": [1, 2001.0]}, "result.m[1]: 2000.0 recorded, 2001.0 now"),
        ({"m": [1]}, {"m": [1, 2]}, "result.m: 1 items recorded, 2 now"),
        ({"t": "a"}, {"t": "a "}, "result.t: 'a' recorded, 'a ' now"),
        ({"t": "a"}, {}, "result.t is only in the record"),
        ({}, {"t": "a"}, "result.t is only in this run"),
        ({"t": None}, {"t": 0}, "result.t: None recorded, 0 now"),
        ({"t": True}, {"t": 1}, "result.t: True recorded, 1 now"),
    ],
)
def test_differences(recorded: Any, now: Any, expected: str | None) -> None:
    assert journal.difference(recorded, now) == expected
