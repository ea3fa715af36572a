"""Samples of text, which show during training how a model writes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from npt_fast.hf.tokenizer import Reading
from npt_fast.training.evaluation import prompt_inputs

PROMPTS = ("The future of artificial intelligence", "Hi")


def samples(model: Any, tokenizer: Any, reading: Reading, seed: int) -> Iterator[str]:
    """Continuations of `PROMPTS`, each on one line; training's random numbers are untouched."""
    device = model.device
    for prompt in PROMPTS:
        inputs = prompt_inputs(tokenizer, prompt, reading, device)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            tokens = model.generate(
                **inputs,
                max_length=50,
                do_sample=True,
                temperature=0.8,
                top_p=0.9,
                pad_token_id=tokenizer.pad_token_id,
            )
        yield " ".join(tokenizer.decode(tokens[0], skip_special_tokens=True).split())
