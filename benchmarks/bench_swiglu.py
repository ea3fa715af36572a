"""SwiGLU, forward and backward, beside torch's, torch.compile's and Liger's."""

from __future__ import annotations

from typing import Any

import pytest

from npt_fast.benchmarks.kernel_cases import Case
from npt_fast.benchmarks.op_benchmark import compare, entries


@pytest.mark.parametrize(("case", "provider"), entries("swiglu"))
def test_swiglu(benchmark: Any, case: Case, provider: str) -> None:
    compare(benchmark, case, provider)
