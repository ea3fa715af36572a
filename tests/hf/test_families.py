"""Listed model types, and others that are much used, are right or refused, and never wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import transformers

from npt_fast.hf.model_types import MODEL_TYPES, ModelType
from tests.hf.small_models import TYPES
from tests.hf.survey import survey

pytestmark = pytest.mark.usefixtures("one_thread")

TRIED = [0, 3]
"""Layers that are tried: of a mixture of experts, the first has none."""
RIGHT: dict[str, list[int]] = {
    **{name: TRIED for name, about in MODEL_TYPES.items() if about.layers == "all"},
    **{name: TRIED for name in MODEL_TYPES if name.startswith("gemma4")},  # small ones have none
    "axk1": [0],
}
"""Those of them that can be converted."""

REFUSED = {
    "apertus": "no input_layernorm",
    "axk1": r"a mixture of experts \(AXK1MoE\) whose output is no sum",
    "bitnet": r"an MLP \(BitNetMLP\) that does not compute",
    "bloom": "an MLP that cannot be run",
    "doge": r"does not read post_attention_layernorm\(h \+ a\) .*post_attention_residual",
    "gemma3n_text": "hidden states",
    "mpt": "no list of decoder layers",
    "opt": r"no mlp.gate_proj \(OPTDecoderLayer has self_attn, .*fc1",
}
"""What is in the way of other types' last layer."""


@pytest.mark.parametrize("model_type", {**RIGHT, **REFUSED})
def test_right_or_refused(model_type: str) -> None:
    if model_type not in TYPES:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    found = survey(model_type, TRIED)
    assert not [outcome for outcome in found.values() if outcome.outcome == "wrong"]
    right = [layer for layer, outcome in found.items() if outcome.outcome == "right"]
    assert right == RIGHT.get(model_type, [])
    words = list(found.values())[-1].words
    assert re.search(REFUSED.get(model_type, ""), words), words
    assert "\n" not in words


OTHERS: dict[str, tuple[str, dict[str, Any], list[int]]] = {
    "granite that scales nothing": ("granite", {"residual_multiplier": 1.0}, [0, 1, 2, 3]),
    "dense layers between experts": ("qwen3_next", {"mlp_only_layers": [1, 3]}, [0, 1, 2, 3]),
    "stablelm, side by side": ("stablelm", {"use_parallel_residual": True}, [0, 1, 2, 3]),
    "gemma 4 whose layers share keys": (
        "gemma4_text",
        {
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        [0, 1, 2, 3],
    ),
    "another activation": ("llama", {"hidden_act": "gelu_pytorch_tanh"}, [0, 1, 2, 3]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_layers_of_other_configs(name: str) -> None:
    model_type, changes, right = OTHERS[name]
    found = survey(model_type, **changes)
    outcomes = {layer: outcome.outcome for layer, outcome in found.items()}
    assert outcomes == {layer: "right" if layer in right else "refused" for layer in found}


def model_type_table() -> str:
    """The table of docs/training.md: a row for all types that are alike."""
    alike: dict[ModelType, list[str]] = {}
    for name, about in sorted(MODEL_TYPES.items()):
        alike.setdefault(about, []).append(f"`{name}`")
    rows = [
        (of.layers, of.residuals, of.kernels, "yes" if of.vllm else "no", ", ".join(names))
        for of, names in alike.items()
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def test_the_table_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    assert model_type_table() in text
    readme = " ".join((Path(__file__).parents[2] / "README.md").read_text().split())
    assert f"{len(MODEL_TYPES)} model types of transformers" in readme
