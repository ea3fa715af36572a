"""Listed model types, and others that are much used, are right or refused, and never wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import transformers

from npt_fast.hf.model_types import MODEL_TYPES
from tests.hf.small_models import TYPES
from tests.hf.survey import survey

pytestmark = pytest.mark.usefixtures("one_thread")

ALL = [0, 1, 2, 3]
RIGHT: dict[str, list[int]] = {
    **{model_type: ALL for model_type, layers in MODEL_TYPES.items() if layers == "all"},
    **{t: [0] for t, layers in MODEL_TYPES.items() if layers == "those without experts"},
    **{t: [3] for t, layers in MODEL_TYPES.items() if layers == "those with full attention"},
    "flint": [0, 1],
}
"""Layers of a small model that can be converted."""
VARIANTS: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"mlp_only_layers": [0]},
    "qwen3_moe": {"mlp_only_layers": [0]},
}
"""Options that a type needs for a layer to be one of those above."""

REFUSED = {
    "gemma2": r"does not read post_attention_layernorm\(h \+ a\) .*pre_feedforward_layernorm",
    "granite": "scales attention's output by 0.22 and the MLP's output by 0.22",
    "minicpm3": "scales attention's output by 0.7 and the MLP's output by 0.7",
    "phi3": r"no mlp.gate_proj \(Phi3MLP has gate_up_proj, down_proj",
    "cohere2": "no post_attention_layernorm",
    "olmo2": "no input_layernorm",
    "gpt_oss": r"a mixture of experts as its MLP \(GptOssMLP\)",
    "qwen3_next": r"no self_attn, but linear_attn .* and a mixture of experts",
    "gpt2": "no list of decoder layers",
}
"""What is in the way of the other types' first layer."""


@pytest.mark.parametrize("model_type", [*RIGHT, *REFUSED])
def test_right_or_refused(model_type: str) -> None:
    if model_type not in TYPES:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    found = survey(model_type, **VARIANTS.get(model_type, {}))
    assert not [outcome for outcome in found.values() if outcome.outcome == "wrong"]
    right = [layer for layer, outcome in found.items() if outcome.outcome == "right"]
    assert right == RIGHT.get(model_type, [])
    words = next(iter(found.values())).words
    assert re.search(REFUSED.get(model_type, ""), words), words
    assert "\n" not in words


OTHERS: dict[str, tuple[str, dict[str, Any], list[int]]] = {
    "granite that scales nothing": ("granite", {"residual_multiplier": 1.0}, ALL),
    "dense layers between experts": ("qwen3_next", {"mlp_only_layers": [1, 3]}, [3]),
    "stablelm, side by side": ("stablelm", {"use_parallel_residual": True}, []),
    "another activation": ("llama", {"hidden_act": "gelu_pytorch_tanh"}, ALL),
}


@pytest.mark.parametrize("name", OTHERS)
def test_layers_of_other_configs(name: str) -> None:
    model_type, changes, right = OTHERS[name]
    found = survey(model_type, **changes)
    outcomes = {layer: outcome.outcome for layer, outcome in found.items()}
    assert outcomes == {layer: "right" if layer in right else "refused" for layer in found}


def test_the_table_is_complete() -> None:
    tried = {*RIGHT, "granite", "qwen3_next"}
    assert tried == set(MODEL_TYPES)


def test_the_table_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    for layers in dict.fromkeys(MODEL_TYPES.values()):
        types = ", ".join(f"`{t}`" for t, which in MODEL_TYPES.items() if which == layers)
        assert f"| {layers} | {types} |" in text
