"""Which way NP layers were computed, seen from inside, where every way has its own code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from npt_fast import functional
from npt_fast.kernels import factored, reference
from npt_fast.kernels import modulated_mlp as kernels


def record(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that gets the name of the way with every call of an NP layer from now on."""
    found: list[str] = []

    def watch(module: Any, function: str, name: Callable[[dict[str, Any]], str]) -> None:
        original = getattr(module, function)

        def watching(*arguments: Any, **options: Any) -> Any:
            found.append(name(options))
            return original(*arguments, **options)

        monkeypatch.setattr(module, function, watching)

    def steps(options: dict[str, Any]) -> str:
        taken = options.get("steps")
        return "factored" if taken is None else "gemm" if taken is kernels.GEMM_STEPS else "fused"

    assert functional.factored is kernels.factored is factored
    watch(factored, "modulated_mlp", steps)
    watch(reference, "modulated_mlp", lambda _: "reference")
    watch(kernels, "decode_mlp", lambda _: "decode")
    return found
