"""A real checkpoint in the real model gives the same tokens with kernels and definition."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import npt_fast as npt
from npt_fast import modules
from npt_fast.functional import modulated_mlp
from npt_fast.hf.base_model import load_base_model
from npt_fast.kernels import decode
from npt_fast.kernels import modulated_mlp as kernels
from npt_fast.kernels._launch import INTERPRETED, Tiles
from tests.kernels.cases import DEVICE

pytestmark = pytest.mark.slow
PROMPT = (
    "The capital of France is Paris, and the capital of Germany is Berlin. Both cities lie on "
    "rivers: Paris on the Seine, Berlin on the Spree. Trains between them take about eight hours, "
    "and most travellers change in Cologne or Frankfurt on the way. In winter the days are short "
    "in both places, but the museums are open and the"
)


@pytest.fixture(scope="module")
def model_and_tokenizer(smollm2: Path) -> tuple[Any, Any]:
    model, tokenizer = load_base_model(str(smollm2), dtype="float32", device=DEVICE)
    for parameter in model.parameters():
        # where the file is mapped, rows need not be aligned, and tiles would be small: 6 s more
        parameter.data = parameter.data.clone()
    return model, tokenizer


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths taken, in order."""
    found: list[str] = []
    choose_tiles: Callable[..., str] = kernels.choose_path

    def noting(*sizes: Any, **options: Any) -> str:
        found.append(choose_tiles(*sizes, **options))
        return found[-1]

    monkeypatch.setattr(kernels, "choose_path", noting)
    return found


def test_greedy_tokens(
    model_and_tokenizer: tuple[Any, Any],
    layer11: Path,
    used: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if INTERPRETED:  # with the small tiles of float32 it takes half a minute
        monkeypatch.setattr(decode, "decode_tiles", lambda *sizes: [Tiles(16, 64, 128, 4, 1)])
    base, tokenizer = model_and_tokenizer
    model = npt.load(base, layer11)
    prompt = tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False).to(DEVICE)

    def generate(impl: str) -> torch.Tensor:
        monkeypatch.setattr(modules, "modulated_mlp", partial(modulated_mlp, impl=impl))
        return model.generate(**prompt, max_new_tokens=2, do_sample=False)

    expected = generate("reference")
    assert not used
    assert torch.equal(generate("triton"), expected)
    assert used == ["gemm", "decode"]
