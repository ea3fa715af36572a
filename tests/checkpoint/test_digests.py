"""The file of digests: written and read line by line, with little memory for any length."""

from __future__ import annotations

import hashlib
import os
import random
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from npt_fast.checkpoint.digests import DIGESTS, DigestWriter, InOrder, read_digests
from npt_fast.errors import CheckpointError


def recorded(count: int) -> Iterator[tuple[str, str, str]]:
    for number in range(count):
        file = "npt_weights.pt" if number < count // 3 else "training_state.pt"
        yield file, f"tensor.{number}", f"F32[{number}, 2] {number:064x}"


def creator(directory: Path) -> Callable[[str], int]:
    return lambda name: os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)


def write(directory: Path, count: int) -> Path:
    with DigestWriter(creator(directory)) as writer:
        for item in recorded(count):
            writer.add(*item)
    return directory / DIGESTS


@pytest.mark.parametrize("count", [1, 2, 30_000])  # the last is more than one window
def test_what_is_written_is_read_again(tmp_path: Path, count: int) -> None:
    path = write(tmp_path, count)
    assert list(read_digests(tmp_path)) == list(recorded(count))
    lines = path.read_text().splitlines()
    assert [tuple(line.split("\t")) for line in lines] == list(recorded(count))


def test_its_own_digest_is_known(tmp_path: Path) -> None:
    with DigestWriter(creator(tmp_path)) as writer:
        for item in recorded(30_000):
            writer.add(*item)
    assert writer.sha256 == hashlib.sha256((tmp_path / DIGESTS).read_bytes()).hexdigest()


def test_without_digests_there_is_no_file(tmp_path: Path) -> None:
    with DigestWriter(creator(tmp_path)) as writer:
        pass
    assert writer.sha256 == ""
    assert list(tmp_path.iterdir()) == []
    assert list(read_digests(tmp_path)) == []


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    path = write(tmp_path, 2)
    before = path.read_bytes()
    with pytest.raises(FileExistsError):
        write(tmp_path, 3)
    assert path.read_bytes() == before


def test_digests_of_weights_are_at_hand(tmp_path: Path) -> None:
    with DigestWriter(creator(tmp_path)) as writer:
        for item in recorded(9):
            writer.add(*item)
    assert writer.weights == {name: digest for _, name, digest in list(recorded(9))[:3]}


# --- values in order


@pytest.mark.parametrize("shuffled", [False, True])
def test_values_are_found_in_any_order(shuffled: bool) -> None:
    items = [(number, str(number)) for number in range(300)]
    asked = list(items)
    if shuffled:
        random.Random(1).shuffle(asked)
    values = InOrder(items)
    for key, value in asked[:150]:
        assert values.take(key) == value
    assert values.take(999) is None
    assert values.take(asked[0][0]) is None  # each value is taken once
    assert sorted(values.rest()) == sorted(key for key, _ in asked[150:])


def test_memory_does_not_grow_with_their_number(tmp_path: Path) -> None:
    write(tmp_path, 60_000)  # 6 MB
    tracemalloc.start()
    digests = InOrder(((file, name), digest) for file, name, digest in read_digests(tmp_path))
    for file, name, digest in recorded(60_000):
        assert digests.take((file, name)) == digest
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6 << 20


@pytest.mark.parametrize("content", [
    b"npt_weights.pt\ta\n", b"one\ttwo\tthree\tfour\n", b"\xff\t\xff\t\xff\n", b"\n",
    b"npt_weights.pt\ta\tF32[1, 1] 00", b"x" * 3_000_000,
])  # fmt: skip
def test_a_malformed_line_is_one_error(tmp_path: Path, content: bytes) -> None:
    good = b"npt_weights.pt\tb\tF32[1, 1] 00\n"
    (tmp_path / DIGESTS).write_bytes(good + content)
    with pytest.raises(CheckpointError, match=f"{DIGESTS}: line 2 is") as caught:
        list(read_digests(tmp_path))
    assert len(str(caught.value)) < 500
