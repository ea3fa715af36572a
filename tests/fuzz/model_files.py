"""Files of base models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from npt_fast.hf.base_model import load_base_model
from tests.fuzz import mutations
from tests.fuzz.target import Target
from tests.second_readers import as_bytes
from tests.training import tiny


def _model_file(name: str) -> Callable[[Path], list[bytes]]:
    def prepare(folder: Path) -> list[bytes]:
        tiny.save(folder, layers=1)
        return [(folder / name).read_bytes()]

    return prepare


def _base_model(path: Path) -> Any:
    return load_base_model(str(path.parent))[0]


def _same_weights(path: Path, found: Any) -> None:
    """Every parameter equals that in the file, unless the config ties it to another."""
    weights = load_file(path.parent / "model.safetensors")
    tied = {"lm_head.weight"} if found.config.tie_word_embeddings else set()
    for name, tensor in found.state_dict().items():
        assert name in tied or as_bytes(tensor) == as_bytes(weights[name].float()), name


TARGETS = [
    Target("model_config", "config.json", mutations.JSON, _model_file("config.json"), _base_model,
           _same_weights),
    Target("tokenizer_config", "tokenizer_config.json", mutations.JSON,
           _model_file("tokenizer_config.json"), _base_model, _same_weights),
]  # fmt: skip
