"""README's code runs as it is printed, here on a tiny model in the place of the real one.

Its counts are recomputed.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import npt_fast as npt
from npt_fast.kernels import roofline
from tests.training import tiny

README = Path(__file__).parents[2] / "README.md"


def test_the_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.save(tmp_path / "base", layers=24)
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    assert code.count("smollm2-135m") == 1
    names: dict[str, Any] = {}
    exec(code.replace("smollm2-135m", str(tmp_path / "base")), names)
    assert [status.layer for status in npt.status(names["model"])] == [23]
    injected, plain = capsys.readouterr().out.strip().split("The capital of Germany is")[1:]
    assert injected and plain


def test_memory_and_time_of_a_layer() -> None:
    rows = re.findall(r"^\| ([\w.-]+) \| ([\d.]+) M \| (.*) \|$", README.read_text(), re.M)
    assert [name for name, *_ in rows] == [
        "smollm2-135m",
        "llama-3.2-1b",
        "llama-3.1-8b",
        "llama-3.1-70b",
    ]
    gpu = roofline.gpu_of("h100")
    for name, parameters, figures in rows:
        shape = replace(roofline.MODELS[name], num_ranks=4, rank=64)
        size = shape.joined * (6 * shape.hidden + 3 * shape.intermediate)
        assert size == roofline.factor_parameters(shape)
        kept = 4 * shape.hidden + 12 * shape.joined + 4 * shape.intermediate + 12 * 4
        assert kept == roofline.saved_bytes(shape)
        flops = roofline.forward_flops(shape), roofline.backward_flops(shape)
        times = [8192 * each / (gpu.tflops * 1e9) for each in flops]
        counted = (
            f"{4 * size / 1e6:.0f} MB | {16 * size / 1e6:.0f} MB | {8192 * kept / 1e6:.0f} MB | "
            f"{times[0]:.1f} ms | {times[1]:.1f} ms"
        )
        assert (parameters, figures) == (f"{size / 1e6:.1f}", counted)
