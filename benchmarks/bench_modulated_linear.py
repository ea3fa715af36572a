"""Modulated linear maps in one kernel, beside torch's products one after the other."""

from __future__ import annotations

from typing import Any

import pytest

from npt_fast.benchmarks.kernel_cases import Case
from npt_fast.benchmarks.op_benchmark import compare, entries


@pytest.mark.parametrize(("case", "provider"), entries("modulated_linear"))
def test_modulated_linear(benchmark: Any, case: Case, provider: str) -> None:
    compare(benchmark, case, provider)
