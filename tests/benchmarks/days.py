"""Days that go wrong, for processes that must survive them; importable in such a process."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any


@dataclass
class Crashing:
    """Its timings end the process."""

    tiny: bool = True

    def cases(self, *ops: str) -> Any:
        os.abort()


@dataclass
class Stuck:
    """Its timings never answer."""

    tiny: bool = True

    def cases(self, *ops: str) -> Any:
        time.sleep(600)


@dataclass
class Failing:
    """Its timings break the device."""

    tiny: bool = True

    def cases(self, *ops: str) -> Any:
        import npt_fast.benchmarks.device as device

        def broken() -> None:
            raise RuntimeError("an illegal memory access was encountered")

        device.synchronize = broken
        return []
