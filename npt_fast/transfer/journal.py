"""A session as a file: one JSON object per line, written as it goes, that can be run again."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from secrets import token_hex
from typing import Any

from npt_fast.checkpoint import strict_json
from npt_fast.errors import CheckpointError, TransferError
from npt_fast.paths import user_path

FORMAT = "npt_session"
VERSION = 1
TOLERANCE = 1e-4
"""Numbers are equal that differ by this much, times the larger one where that is over 1."""
_VOLATILE = {"seconds", "base_seconds", "created"}


def state_folder() -> Path:
    """Where logs and the history of lines are kept: ``$XDG_STATE_HOME/npt_fast``."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "npt_fast"


def default_path() -> Path:
    """A log that no other session has."""
    moment = time.strftime("%Y-%m-%dT%H-%M-%S")
    return state_folder() / "sessions" / f"{moment}-{token_hex(4)}.jsonl"


class Journal:
    """Log of a session; every line is on its way to the disk before the next command runs.

    Args:
        path: of the file; must not exist, its folder is made.
        header: what the session runs on.

    Raises:
        TransferError: the file exists, or cannot be written.
    """

    def __init__(self, path: str | Path, header: Mapping[str, Any]) -> None:
        self.path = path = user_path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("x", encoding="utf-8", errors="backslashreplace")
        except FileExistsError:
            raise TransferError(f"{path}: exists already; choose another file") from None
        except OSError as error:
            raise TransferError(f"{path}: cannot be written: {error.strerror}") from None
        self.write({FORMAT: VERSION, **header})

    def write(self, entry: Mapping[str, Any]) -> None:
        """Append a line; numbers must be finite."""
        try:
            self._file.write(json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise TransferError(f"{self.path}: cannot be written: {error.strerror}") from None

    def close(self) -> None:
        """Nothing more will come."""
        self._file.close()


def read(path: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A log's header and entries; a last line that was cut off does not count.

    Raises:
        CheckpointError: the file is no log, or is broken.
    """
    try:
        *lines, _ = user_path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    found = [
        strict_json.parse_object(line, f"{path}, line {number}")
        for number, line in enumerate(lines, 1)
    ]
    if not found or found[0].get(FORMAT) != VERSION:
        raise CheckpointError(f"{path}: is no session log of version {VERSION}")
    for number, entry in enumerate(found[1:], 2):
        if not isinstance(entry.get("command"), str):
            raise CheckpointError(f"{path}, line {number}: there is no command")
    return found[0], found[1:]


def difference(recorded: Any, now: Any, where: str = "result") -> str | None:
    """The first place where two results differ, None if nowhere.

    Texts and structure must be the same, numbers within `TOLERANCE`; times are not looked at.
    """
    if isinstance(recorded, dict) and isinstance(now, dict):
        for key in sorted({*recorded, *now} - _VOLATILE):
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
        same = type(recorded) is type(now) and recorded == now
    return None if same else f"{where}: {recorded!r} recorded, {now!r} now"


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
