"""Logs of sessions: written at once, read back, compared."""

from __future__ import annotations

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from npt_fast.errors import CheckpointError, TransferError
from npt_fast.schema import is_text
from npt_fast.transfer import journal


def test_a_log_is_written_as_it_goes(tmp_path: Path) -> None:
    path = tmp_path / "new" / "log.jsonl"
    log = journal.Journal(path, {"model_name": "m"})
    log.write({"command": "list", "result": {"é": 1.5}})
    log.write({"command": "load caf\udce9"})  # a path that is not UTF-8
    header, entries = journal.read(path)  # while the log is still open
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


def test_logs_keep_the_keys_of_version_1(tmp_path: Path) -> None:
    """Four keys of reports have older names in logs; reading gives those of reports."""
    report = {
        "no_injection": ["a"],
        "injected": ["b"],
        "no_injection_text": "a",
        "no_injection_top": [],
        "kl": 0.5,
        "no_injection_seconds": 0.1,
    }
    kept = (
        '{"command": "inject m t", "result": {"base": ["a"], "injected": ["b"], "base_text": "a", '
        '"top_base": [], "kl": 0.5, "base_seconds": 0.1}}'
    )
    path = tmp_path / "log.jsonl"
    log = journal.Journal(path, {})
    log.write({"command": "inject m t", "result": report})
    log.close()
    assert path.read_text().splitlines()[1] == kept
    (entry,) = journal.read(path)[1]
    assert list(entry["result"].items()) == list(report.items())


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
    with pytest.raises(CheckpointError, match=rf"log(, line [12]: {key} must be |: is not a)"):
        journal.read(tmp_path / "log")
    if key == "npt_session":
        return  # Journal writes its own version
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
    with pytest.raises(TransferError, match="is full: a log has at most 1,000 bytes"):
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
