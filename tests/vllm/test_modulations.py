"""Modulations in an engine: adapters of `export_lora`, another one for each request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import npt_fast as npt
from tests.hf.exports import load
from tests.training import tiny
from tests.vllm import engine
from tests.vllm.engine import Answer
from tests.vllm.exports import TOKENS, write_export

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

SOURCES = ["a blue boat on the lake", "the red house", "water boils"]
PROMPT = [5, 9, 77, 12]
STRENGTH = 3  # each of them changes the tokens


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_export(tmp_path_factory.mktemp("modulations"))


@pytest.fixture(scope="module")
def modulations(exported: Path) -> list[npt.Modulation]:
    model, tokenizer = load(exported), tiny.tokenizer()
    return [STRENGTH * npt.extract(model, tokenizer, source) for source in SOURCES]


def baked(model: Any, modulations: Sequence[npt.Modulation]) -> Iterator[Answer]:
    """What a model answers with each modulation in its weights, and then without any."""
    for modulation in modulations:
        change = npt.bake(model, modulation)
        yield from engine.by_hand(model, [PROMPT], TOKENS)
        change.undo()
    yield from engine.by_hand(model, [PROMPT], TOKENS)


@pytest.mark.parametrize("served", ["out", "base"], ids=["NPT model", "base model"])
def test_each_request_has_its_modulation(
    served: str, exported: Path, modulations: list[npt.Modulation], tmp_path: Path
) -> None:
    folder = exported.parent / served
    expected = list(baked(load(folder), modulations))
    assert len({tuple(answer.tokens) for answer in expected}) == len(expected)
    adapters: list[Path | None] = [
        npt.export_lora(modulation, load(folder), tmp_path / str(n))
        for n, modulation in enumerate(modulations)
    ]
    # on a CPU, vLLM 0.32 gives a request without adapter the last place for one: leave that empty
    found = engine.run(
        folder, [PROMPT] * len(expected), TOKENS, adapters=[*adapters, None], enable_lora=True,
        max_loras=len(expected), max_lora_rank=8, enforce_eager=True, max_model_len=128,
    )  # fmt: skip
    engine.assert_same(found.answers, expected)
