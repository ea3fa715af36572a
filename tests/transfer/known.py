"""Relations that a random model knows: its own likeliest next tokens are the objects."""

from __future__ import annotations

from string import ascii_letters
from typing import Any

import torch

import npt_fast as npt


@torch.no_grad()
def known_relations(model: Any, tokenizer: Any, **prompts: str) -> list[dict[str, Any]]:
    """Relations as a suite file has them, by name and prompt.

    All have the same four subjects, of two letters, and no object is there twice.
    """
    names = [a + b for a in ascii_letters[:20] for b in ascii_letters[:20]]
    pairs: dict[str, dict[str, str]] = {name: {} for name in prompts}
    tops = []
    for prompt in prompts.values():
        ids = tokenizer([prompt.replace("{}", subject) for subject in names])["input_ids"]
        with npt.disabled(model):
            found = model(torch.tensor(ids)).logits[:, -1].argmax(-1)
        tops.append([tokenizer.decode([top]) for top in found.tolist()])
    seen: set[str] = set()
    for subject, *texts in zip(names, *tops, strict=True):
        plain = all(len(t) == 1 and t.isascii() and t.isprintable() and t != " " for t in texts)
        if plain and len(seen | set(texts)) == len(seen) + len(texts) < 4 * len(prompts) + 1:
            seen |= set(texts)
            for name, text in zip(prompts, texts, strict=True):
                pairs[name][subject] = text
    return [
        {"name": name, "prompt": prompt, "separator": "", "pairs": pairs[name]}
        for name, prompt in prompts.items()
    ]
