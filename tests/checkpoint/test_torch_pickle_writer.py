"""Pickles that we write: torch and our reader read them back, and their size is linear."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from npt_fast.checkpoint import torch_pickle, torch_pickle_writer
from npt_fast.checkpoint.layout import OutputFile, TorchZipLayout
from npt_fast.checkpoint.torch_pickle import decode
from npt_fast.checkpoint.torch_pickle_writer import encode
from npt_fast.errors import CheckpointError

_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 120), 1 << 120)
    | st.floats(allow_nan=False)
    | st.text(max_size=20)
    | st.sampled_from(["storage", "cpu", "torch.FloatStorage", "collections.OrderedDict"])
)
_DATA = st.recursive(
    _SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=8) | st.integers(-300, 1 << 33), inner, max_size=4)
    ),
    max_leaves=30,
)


def pickled(value: Any) -> bytes:
    return encode(value, lambda item: None)


def written(path: Path, layout: OutputFile) -> Path:
    with path.open("wb") as file:
        for offset, data in layout.frame({}):
            file.seek(offset)
            file.write(data)
    return path


@settings(max_examples=150, deadline=None)
@given(_DATA)
def test_what_is_written_is_read_again(value: Any) -> None:
    assert decode(pickled(value), "here") == value


@pytest.mark.parametrize("integer", [
    0, 255, 256, 65535, 65536, (1 << 31) - 1, 1 << 31, -1, -(1 << 31), -(1 << 31) - 1, 1 << 63,
])  # fmt: skip
def test_integers_of_every_width(tmp_path: Path, integer: int) -> None:
    path = written(tmp_path / "x.pt", TorchZipLayout.seal("x.pt", {"n": integer, integer: "n"}))
    assert torch.load(path, weights_only=True) == {"n": integer, integer: "n"}
    assert decode(pickled(integer), "here") == integer


def test_a_string_is_never_taken_for_the_symbol_of_its_name(tmp_path: Path) -> None:
    names = ["storage", "cpu", "torch.FloatStorage", "torch._utils._rebuild_tensor_v2"]
    path = written(tmp_path / "x.pt", TorchZipLayout.seal("x.pt", {name: name for name in names}))
    assert torch.load(path, weights_only=True) == {name: name for name in names}


@pytest.mark.parametrize("kind", [list, tuple])
def test_what_stands_twice_is_written_once(kind: type, tmp_path: Path) -> None:
    value: Any = kind([1, 2])
    for _ in range(16):
        value = kind([value, value])  # 65,536 times the same
    data = pickled(value)
    assert len(data) < 300
    again = decode(data, "here")
    assert again[0] is again[1]
    path = written(tmp_path / "x.pt", TorchZipLayout.seal("x.pt", [value]))
    loaded = torch.load(path, weights_only=True)[0]
    assert loaded[0] is loaded[1]


def test_the_milestones_of_a_schedule_stay_a_counter(tmp_path: Path) -> None:
    shared = Counter({3: 1, 5: 2})
    value = {"milestones": shared, "again": shared, "none": Counter(), "last_epoch": 4}
    path = written(tmp_path / "x.pt", TorchZipLayout.seal("x.pt", value))
    for found in (torch.load(path, weights_only=True), decode(pickled(value), "here")):
        assert found == value
        assert type(found["milestones"]) is type(found["none"]) is Counter
        assert found["again"] is found["milestones"]


@pytest.mark.parametrize("counts", [b"]", b"N", b"}X\x01\0\0\0aNs", b"}(K\x01X\x01\0\0\0au"])
def test_a_counter_of_something_else_is_refused(counts: bytes) -> None:
    with pytest.raises(CheckpointError, match="a Counter of something that is not counts"):
        decode(b"\x80\x02ccollections\nCounter\n" + counts + b"\x85R.", "here")


def test_equal_but_different_containers_stay_different() -> None:
    first, second = decode(pickled([[1], [1]]), "here")
    assert first == second and first is not second


def test_what_a_reader_would_refuse_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    nested: list[Any] = []
    for _ in range(70):
        nested = [nested]
    with pytest.raises(CheckpointError, match="nested more than 64 deep"):
        pickled(nested)
    while True:  # the deepest that is written is the deepest that is read
        (nested,) = nested
        with suppress(CheckpointError):
            assert decode(pickled(nested), "here") == nested
            break
    with pytest.raises(CheckpointError, match="nested more than 64 deep"):
        decode(pickled(nested)[:2] + b"](" + pickled(nested)[2:-1] + b"e.", "here")
    with pytest.raises(CheckpointError, match=r"a string of 1,048,577 bytes .* 1,048,576 are the"):
        pickled("a" * ((1 << 20) + 1))
    assert decode(pickled("a" * (1 << 20)), "here") == "a" * (1 << 20)
    for module in (torch_pickle, torch_pickle_writer):
        monkeypatch.setattr(module, "MAX_PICKLE_BYTES", 100)
    with pytest.raises(CheckpointError, match=r"a pickle of .* cannot be read again; 100 are the"):
        pickled(list(range(50)))


@pytest.mark.parametrize("value", [{1, 2}, b"bytes", 1j, object()])
def test_other_types_are_refused_by_name(value: Any) -> None:
    with pytest.raises(CheckpointError, match=f"cannot write a {type(value).__name__} into"):
        pickled({"key": value})
