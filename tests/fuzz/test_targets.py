"""Every reader handles a few random inputs right; ``make fuzz`` runs many more."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from npt_fast.errors import CheckpointError
from tests.fuzz import mutations, watch
from tests.fuzz.run import InputError, run
from tests.fuzz.target import Place, Target
from tests.fuzz.targets import TARGETS

EXAMPLES = 150


@pytest.mark.parametrize("name", TARGETS)
def test_a_reader(name: str, tmp_path: Path) -> None:
    place = Place(TARGETS[name], tmp_path)
    assert all(map(place.run, place.valid))
    run(place, EXAMPLES)
    assert place.refused > 0


def test_the_same_inputs_every_time(tmp_path: Path) -> None:
    found: list[list[bytes]] = [[], []]
    for number, inputs in enumerate(found):
        folder = tmp_path / str(number)
        folder.mkdir()
        run(Place(_target(lambda path, into=inputs: into.append(path.read_bytes())), folder), 20)
    assert found[0] == found[1]
    assert len(set(found[0])) > 10


# --- a reader with a fault is found


def _target(
    read: Callable[[Path], Any], compare: Callable[[Path, Any], None] | None = None
) -> Target:
    return Target(
        "x", "x.txt", mutations.TEXT, lambda folder: [b"a few words"], read,
        compare or (lambda path, found: None),
    )  # fmt: skip


def _refuse(message: str) -> None:
    raise CheckpointError(message)


def _hang() -> None:
    while True:
        try:
            sum(range(1000))
        except Exception:
            continue


READERS: dict[str, Callable[[Path], Any]] = {
    "another exception": lambda path: {}["key"],
    "no message": lambda path: _refuse(""),
    "a long message": lambda path: _refuse("x" * 500),
    "a program": lambda path: subprocess.run(["true"], check=True),
    "a shell": lambda path: os.system("true"),
    "a pickle": lambda path: __import__("pickle").loads(b"cposix\ngetpid\n."),
    "code in a file": lambda path: exec("1 + 1"),
    "an expression": lambda path: eval("1 + 1"),
    "a loop": lambda path: _hang(),
    "memory": lambda path: bytearray(300 << 20),
}


@pytest.mark.parametrize("name", READERS)
def test_a_fault_is_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "MAX_SECONDS", 0.2)
    with pytest.raises((AssertionError, KeyError)):
        Place(_target(READERS[name]), tmp_path).run(b"a")


def test_a_reader_that_differs_from_the_second_is_found(tmp_path: Path) -> None:
    def compare(path: Path, found: bytes) -> None:
        assert found == path.read_bytes()

    target = _target(lambda path: path.read_bytes().replace(b"\0", b" "), compare)
    with pytest.raises(InputError) as caught:
        run(Place(target, tmp_path), 1000)
    assert b"\0" in caught.value.data
