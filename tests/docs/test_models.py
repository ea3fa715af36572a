"""The page of the most used models is the one that its script writes from what is supported."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from docs import models
from npt_fast.hf.model_types import MODEL_TYPES, ModelType

ROW = re.compile(r"^\| +(\d+) \| (\S+) +\| +([\d.]+) \| `(\w+)` +\| (.*?) +\| (.*?) *\|$", re.M)


def test_the_page_is_up_to_date() -> None:
    assert models.PAGE.read_text(encoding="utf-8") == models.page(), "python -m docs.models"


def test_rows_follow_the_rules_of_the_page() -> None:
    rows = models.MODELS
    assert len({row.name for row in rows}) == len(rows) == 40
    assert all(above.downloads > below.downloads for above, below in pairwise(rows))
    for row in rows:
        assert row.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, row
        assert not re.search("FP8|FP4|AWQ|GPTQ|GGUF|w8a8|Embedding|tiny-random", row.name), row


def test_ticks_are_those_of_the_table_of_types(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODEL_TYPES, "gpt2", ModelType("all, with `kept`"))
    monkeypatch.setitem(MODEL_TYPES, "opt", ModelType("those that are odd"))
    monkeypatch.delitem(MODEL_TYPES, "qwen3")
    rows = {name: (layers, tick) for _, name, _, _, layers, tick in ROW.findall(models.page())}
    assert len(rows) == 40
    assert rows["openai-community/gpt2"] == ("all, with `kept`", "✓")
    assert rows["facebook/opt-125m"] == ("those that are odd", "in part")
    assert rows["Qwen/Qwen3-8B"] == ("none", "")
    assert rows["google/gemma-4-31B-it"] == ("all", "✓")
    assert rows["google/gemma-4-26B-A4B-it"] == ("none", "")


def test_at_least_30_are_covered() -> None:
    page = models.PAGE.read_text(encoding="utf-8")
    ticks = [tick for *_, tick in ROW.findall(page)].count("✓")
    assert f"all layers of {ticks} of them" in page
    assert ticks >= 30
