"""``npt-fast models``: the table of model types, and of one model's layers."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from npt_fast.hf.model_types import MODEL_TYPES, model_type_rows
from tests.checkpoints import run
from tests.hf.small_models import build


def folder(path: Path, model_type: str, **changes: Any) -> Path:
    """A folder with nothing but a config.json, as that of a model that is not downloaded."""
    build(model_type, **changes).config.save_pretrained(path)
    return path


def test_model_types(capsys: Any) -> None:
    code, out, err = run(capsys, "models")
    assert (code, err) == (0, "")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()]
    assert rows[2:-1] == [list(row) for row in model_type_rows()]
    found = json.loads(run(capsys, "models", "--json")[1])
    assert found == {name: asdict(about) for name, about in MODEL_TYPES.items()}
    # the table was made with 5.23, and older versions lack some types
    old = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23)
    assert old or set(MODEL_TYPES) <= set(CONFIG_MAPPING)


def test_layers_of_a_model(capsys: Any, tmp_path: Path) -> None:
    model = folder(tmp_path / "base", "axk1")
    code, out, err = run(capsys, "models", model)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[2].split()[1:4] == ["0", "|", "yes"]
    assert lines[3].split("|")[1].strip() == "1-3"
    assert lines[3].split("|")[2].startswith(" no: has a mixture of experts")
    assert lines[4] == f"1 of 4 layers of {model} can be NP layers"
    found = json.loads(run(capsys, "models", model, "--json")[1])
    assert found["model"] == str(model)
    assert [layer for layer, line in found["layers"].items() if line is None] == ["0"]


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("doge", "0-3 | no: has an MLP that does not read post_attention_layernorm(h + a)"),
        ("bitnet", "0-3 | no: has an MLP (BitNetMLP) that does not compute"),
        ("lfm2", "0-3 | no: has no mlp.gate_proj (Lfm2DecoderLayer has self_attn, feed_forward"),
    ],
)
def test_what_is_in_the_way(model_type: str, words: str, capsys: Any, tmp_path: Path) -> None:
    code, out, _ = run(capsys, "models", folder(tmp_path / "base", model_type))
    assert code == 0 and words in out
    assert out.splitlines()[-1].startswith("0 of 4 layers")


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neo", "gemma4_text"])
def test_decoders_that_embed_more_than_words(model_type: str, capsys: Any, tmp_path: Path) -> None:
    code, out, _ = run(capsys, "models", folder(tmp_path / "base", model_type))
    assert code == 0 and out.splitlines()[-1].startswith("4 of 4 layers")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"num_hidden_layers": 1001}, "num_hidden_layers 1001 is too large"),
        ({"intermediate_size": 10**13}, "the base model cannot be loaded"),
    ],
)
def test_sizes_that_are_too_large(
    changes: dict[str, int], problem: str, capsys: Any, tmp_path: Path
) -> None:
    file = folder(tmp_path / "base", "llama") / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    code, out, err = run(capsys, "models", file.parent)
    assert (code, out) == (1, "")
    assert problem in err and err.count("\n") == 1


def test_a_model_without_layers(capsys: Any, tmp_path: Path) -> None:
    code, out, err = run(capsys, "models", folder(tmp_path / "base", "mpt"))
    assert (code, out) == (1, "")
    assert err == "Error: MptModel: has no list of decoder layers; not supported\n"
