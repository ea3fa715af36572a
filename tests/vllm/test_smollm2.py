"""A real model with two trained layers in vLLM, with its ways to batch and to cache on and off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import npt_fast as npt
from tests.hf.exports import load
from tests.vllm import engine
from tests.vllm.engine import Answer

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

TEXTS = engine.ROOT / "examples" / "smollm2_self_text.jsonl"
TOKENS = 12
BLOCK = 32  # tokens that prefix caching finds together
ON = {
    "max_num_seqs": 32, "max_num_batched_tokens": 2 * BLOCK, "block_size": BLOCK,
    "enable_prefix_caching": True, "enable_chunked_prefill": True,
}  # fmt: skip
OFF = {"max_num_seqs": 1, "enable_prefix_caching": False, "enable_chunked_prefill": False}


@pytest.fixture(scope="module")
def prompts(smollm2: Path) -> list[list[int]]:
    """50 prompts of 3 to 150 tokens; every second one begins as the others of these do."""
    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2)
    lines = TEXTS.read_text().splitlines()[:51]
    shared, *texts = (tokenizer(json.loads(line)["text"])["input_ids"] for line in lines)
    return [shared[: n % 2 * 3 * BLOCK // 2] + ids[: 3 + 2 * n] for n, ids in enumerate(texts)]


@pytest.fixture(scope="module")
def exported(
    smollm2: Path, layer11: Path, layer13: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("smollm2_np")
    npt.merge([layer11, layer13], folder / "merged")
    npt.export(folder / "merged", folder / "out", model_name=str(smollm2))
    return folder / "out"


@pytest.fixture(scope="module")
def expected(exported: Path, smollm2: Path, prompts: list[list[int]]) -> list[Answer]:
    return engine.by_hand(load(exported), prompts, TOKENS)


@pytest.mark.parametrize("options", [ON, OFF], ids=["on", "off"])
def test_tokens_are_those_of_generate(
    exported: Path, prompts: list[list[int]], expected: list[Answer], options: dict[str, Any]
) -> None:
    found = engine.run(exported, prompts, TOKENS, max_model_len=256, enforce_eager=True, **options)
    assert (found.cached > 0) is options["enable_prefix_caching"]
    engine.assert_same(found.answers, expected)
