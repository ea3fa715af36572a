"""The modulated MLP of 1 to 64 tokens without gradients, by every path, and unmodulated."""

from __future__ import annotations

from typing import Any

import pytest

from npt_fast.benchmarks.kernel_cases import Case
from npt_fast.benchmarks.op_benchmark import compare, entries


@pytest.mark.parametrize(("case", "provider"), entries("decode"))
def test_decode(benchmark: Any, case: Case, provider: str) -> None:
    compare(benchmark, case, provider)
