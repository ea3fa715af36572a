"""Probes with coefficients in one kernel, compared with torch's product and a second kernel."""

from __future__ import annotations

from typing import Any

import pytest

from npt_fast.benchmarks.kernel_cases import Case
from npt_fast.benchmarks.op_benchmark import compare, entries


@pytest.mark.parametrize(("case", "provider"), entries("probe"))
def test_probe(benchmark: Any, case: Case, provider: str) -> None:
    compare(benchmark, case, provider)
