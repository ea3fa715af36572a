"""The log of a session: one JSON object per line, written at once, that can be replayed."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from secrets import token_hex
from typing import Any

from npt_fast.checkpoint import strict_json
from npt_fast.checkpoint.source_file import read_file
from npt_fast.errors import CheckpointError, TransferError
from npt_fast.paths import user_path
from npt_fast.schema import (
    COUNT,
    FLAG,
    MAPPING,
    TEXT,
    WHOLE,
    Kind,
    checked,
    list_of,
    mapping_of,
    shown,
)

FORMAT = "npt_session"
VERSION = 1
TOLERANCE = 1e-4
"""Largest difference of numbers that count as equal; relative for numbers above 1."""
_MAX_BYTES = 16 << 20  # of a file
_MAX_LINE = 4 << 20
_HEADER = {
    FORMAT: COUNT,
    "npt_fast": TEXT,
    "model_name": TEXT,
    "checkpoint": TEXT,
    "torch": TEXT,
    "base": MAPPING,
    "dtype": TEXT,
    "device": TEXT,
    "layers": list_of(COUNT),
    "special_tokens": FLAG,
    "chat": FLAG,
    "weights": mapping_of(TEXT, TEXT),
}
_ENTRY = {
    "command": TEXT,
    "seed": WHOLE,
    "error": TEXT,
    "digests": mapping_of(TEXT, TEXT),
    "result": MAPPING,
}
"""Only the first key of each of these two is required."""
_LOG_KEYS = {
    "no_injection": "base",
    "no_injection_text": "base_text",
    "no_injection_top": "top_base",
    "no_injection_seconds": "base_seconds",
}
"""Keys of results that have older names in logs, so that logs of all versions can be replayed."""
_REPORT_KEYS = {log: report for report, log in _LOG_KEYS.items()}
_VOLATILE = {"seconds", "no_injection_seconds", "created", "source"}
"""Times, and what is described in other words by other versions; never compared."""
_NEWER = {"special_tokens", "chat", "tokens", "positions"}
"""Keys that logs of before lack in some results; compared where they are recorded."""


def state_folder() -> Path:
    """Folder of the logs and of the command history: ``$XDG_STATE_HOME/npt_fast``."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "npt_fast"


def default_path() -> Path:
    """A new path for a log, unique to this session."""
    moment = time.strftime("%Y-%m-%dT%H-%M-%S")
    return state_folder() / "sessions" / f"{moment}-{token_hex(4)}.jsonl"


class Journal:
    """The log of a running session; each line is flushed before the next command runs.

    Args:
        path: File to create; its folder is made if necessary.
        header: Description of the model and the program.

    Raises:
        TransferError: the file exists, cannot be written, or could not be read back.
    """

    def __init__(self, path: str | Path, header: Mapping[str, Any]) -> None:
        self.path = path = user_path(path)
        first = _line({**header, FORMAT: VERSION}, _HEADER, path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("xb")
        except FileExistsError:
            raise TransferError(f"{path}: exists already; choose another file") from None
        except OSError as error:
            raise TransferError(f"{path}: cannot be written: {error.strerror}") from None
        self._append(first)

    def write(self, entry: Mapping[str, Any]) -> None:
        """Append a line; all numbers must be finite.

        Raises:
            TransferError: the line cannot be written, or could not be read back.
        """
        self._append(_line(_renamed(entry, _LOG_KEYS), _ENTRY, self.path))

    def _append(self, line: bytes) -> None:
        try:
            if self._file.tell() + len(line) > _MAX_BYTES:
                raise TransferError(f"{self.path}: is full: a log has at most {_MAX_BYTES:,} bytes")
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise TransferError(f"{self.path}: cannot be written: {error.strerror}") from None

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read(path: str | Path) -> tuple[dict[str, Any], Sequence[dict[str, Any]]]:
    """Read a log's header and entries, leaving out a last line that was cut off.

    Raises:
        CheckpointError: the file is not a log, or is damaged.
    """
    path = user_path(path)
    *lines, _ = read_file(path, _MAX_BYTES, follow_links=True).split(b"\n")
    if not lines:
        raise CheckpointError(f"{path}: is not a session log of version {VERSION}")
    header = _parsed(lines[0], _HEADER, f"{path}, line 1")
    if header[FORMAT] != VERSION:
        raise CheckpointError(f"{path}: is not a session log of version {VERSION}")
    entries = _Entries(lines[1:], path)
    for _ in entries:  # a damaged entry is reported before the first command runs
        pass
    return header, entries


class _Entries(Sequence[dict[str, Any]]):
    """Entries that are parsed when they are used; parsed together they take 20 times the memory."""

    def __init__(self, lines: list[bytes], path: Path) -> None:
        self._lines = lines
        self._path = path

    def __getitem__(self, index: Any) -> Any:
        entry = _parsed(self._lines[index], _ENTRY, f"{self._path}, line {index + 2}")
        return _renamed(entry, _REPORT_KEYS)

    def __len__(self) -> int:
        return len(self._lines)


def _renamed(entry: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """An entry with other keys in its result."""
    result = entry.get("result")
    if not isinstance(result, Mapping):  # the check that follows says what is wrong with it
        return dict(entry)
    return {**entry, "result": {names.get(key, key): value for key, value in result.items()}}


def _parsed(line: bytes, kinds: Mapping[str, Kind], where: str) -> dict[str, Any]:
    if len(line) > _MAX_LINE:
        raise CheckpointError(f"{where}: {len(line):,} bytes; at most {_MAX_LINE:,} are read")
    required = list(kinds)[:1]
    return checked(strict_json.parse_object(line, where), kinds, required, where, CheckpointError)


def _line(entry: Mapping[str, Any], kinds: Mapping[str, Kind], path: Path) -> bytes:
    """The bytes of a line, after a check that the reader accepts them."""
    text = json.dumps(entry, ensure_ascii=False, allow_nan=False)
    # lone surrogates, from names of files that are not UTF-8, become texts like \udce9
    text = re.sub("[\ud800-\udfff]", lambda found: f"\\\\u{ord(found[0]):x}", text)
    try:
        _parsed(text.encode(), kinds, f"{path}: cannot be written")
    except CheckpointError as error:
        raise TransferError(str(error)) from None
    return f"{text}\n".encode()


def difference(recorded: Any, now: Any, where: str = "result") -> str | None:
    """Describe the first difference of two results; None if there is none.

    Texts and structure must be equal, numbers equal within `TOLERANCE`; times are ignored.
    """
    if isinstance(recorded, dict) and isinstance(now, dict):
        for key in sorted({*recorded, *now} - _VOLATILE - (_NEWER - recorded.keys())):
            if key not in recorded or key not in now:
                return f"{where}.{key} is only in {'this run' if key in now else 'the record'}"
            if found := difference(recorded[key], now[key], f"{where}.{key}"):
                return found
        return None
    if isinstance(recorded, list) and isinstance(now, list):
        if len(recorded) != len(now):
            return f"{where}: {len(recorded)} items recorded, {len(now)} now"
        for index, (a, b) in enumerate(zip(recorded, now, strict=True)):
            if found := difference(a, b, f"{where}[{index}]"):
                return found
        return None
    if _number(recorded) and _number(now):
        same = abs(recorded - now) <= TOLERANCE * max(1.0, abs(recorded), abs(now))
    else:
        # the type too: True equals 1
        same = type(recorded) is type(now) and recorded == now
    return None if same else f"{where}: {shown(recorded)} recorded, {shown(now)} now"


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
