"""The verb `interact` in this process, on a tiny model, with given lines on stdin."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import run


@dataclass
class Shell:
    """Runs the verb in this process on the tiny model."""

    capsys: Any
    monkeypatch: pytest.MonkeyPatch
    base: Path
    checkpoint: Path

    @property
    def options(self) -> list[object]:
        return ["interact", "--checkpoint", self.checkpoint, "--model_name", self.base]

    def pipe(self, *lines: str, options: list[object] | None = None) -> tuple[int, str, str]:
        text = "".join(f"{line}\n" for line in lines)
        self.monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        more = options or []
        device = [] if "--device" in more else ["--device", "cpu"]
        code, out, err = run(self.capsys, *self.options, *device, *more)
        notice = f"Loading model from {self.base}...\n"
        assert err.startswith(notice)
        return code, out, err.removeprefix(notice)

    def json(
        self, *lines: str, options: list[object] | None = None
    ) -> tuple[int, list[dict[str, Any]]]:
        code, out, err = self.pipe(*lines, options=["--json", *(options or [])])
        assert err == ""
        return code, [json.loads(line) for line in out.splitlines()]
