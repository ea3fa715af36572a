"""Selections whose jobs fail, for tests of what survives; worker processes import them."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any


@dataclass
class Crashing:
    """A day whose timings end the process."""

    tiny: bool = True

    def cases(self, *ops: str) -> Any:
        os.abort()


@dataclass
class Stuck:
    """A day whose timings never answer."""

    tiny: bool = True

    def cases(self, *ops: str) -> Any:
        time.sleep(600)


@dataclass
class Failing:
    """A day whose timings break the device."""

    tiny: bool = True

    def cases(self, *ops: str) -> Any:
        import npt_fast.benchmarks.device as device

        def broken() -> None:
            raise RuntimeError("an illegal memory access was encountered")

        device.synchronize = broken
        return []
