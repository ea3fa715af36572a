"""The modulated MLP, forward and a training step, by every path, and the bare MLP."""

from __future__ import annotations

from typing import Any

import pytest

from npt_fast.benchmarks.kernel_cases import Case
from npt_fast.benchmarks.op_benchmark import compare, entries


@pytest.mark.parametrize(("case", "provider"), entries("modulated_mlp"))
def test_modulated_mlp(benchmark: Any, case: Case, provider: str) -> None:
    compare(benchmark, case, provider)
