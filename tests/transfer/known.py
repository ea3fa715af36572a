"""Relations that a random model knows: its own likeliest next tokens are the objects."""

from __future__ import annotations

from string import ascii_letters
from typing import Any

import torch

import npt_fast as npt


@torch.no_grad()
def known_relation(
    model: Any, tokenizer: Any, *, name: str = "n", prompt: str = "{}", subjects: int = 4
) -> dict[str, Any]:
    """A relation as a suite file has it, of two-letter subjects with objects that all differ."""
    found: dict[str, str] = {}
    names = [a + b for a in ascii_letters[:20] for b in ascii_letters[:20]]
    ids = tokenizer([prompt.replace("{}", subject) for subject in names])["input_ids"]
    with npt.disabled(model):
        tops = model(torch.tensor(ids)).logits[:, -1].argmax(-1).tolist()
    for subject, top in zip(names, tops, strict=True):
        text = tokenizer.decode([top])
        plain = text.isascii() and text.isprintable() and text.strip()
        if plain and tokenizer(text)["input_ids"] == [top] and text not in found.values():
            found[subject] = text
    pairs = dict(list(found.items())[:subjects])
    return {"name": name, "prompt": prompt, "separator": "", "pairs": pairs}
