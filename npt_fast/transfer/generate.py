"""Continue a text token by token, by id and with a KV cache (design.md#sampling)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from npt_fast.config import SamplingStrategy
from npt_fast.errors import TransferError
from npt_fast.schema import LARGEST, shown

MOST_TOKENS = 10_000
"""Largest length of a continuation; logs and facts from others may ask for any."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        tokens: Largest number of tokens, up to 10,000; an end-of-text token ends earlier.
        strategy: ``greedy``, ``top_k`` (also called ``sample``) or ``top_p``.
        temperature: Divisor of the logits; ``greedy`` ignores it.
        top_k: Number of likeliest tokens to choose from.
        top_p: Choose from the fewest tokens that together have at least this probability.
        seed: Seed of the random choice.

    Raises:
        TransferError: a value is out of range.
    """

    tokens: int = 1
    strategy: SamplingStrategy = "greedy"
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.top_k < 1:
            raise TransferError(
                f"tokens and top_k must be at least 1, got {self.tokens} and {self.top_k}"
            )
        if self.tokens > MOST_TOKENS:
            raise TransferError(f"tokens must be at most {MOST_TOKENS:,}, got {shown(self.tokens)}")
        if max(self.top_k, abs(self.seed)) >= LARGEST:
            raise TransferError("top_k and seed must fit 64 bits")
        if not 0 < self.temperature < float("inf") or not 0 < self.top_p <= 1:
            raise TransferError(
                "temperature must be positive and finite and top_p in (0, 1], "
                f"got {self.temperature} and {self.top_p}"
            )
        strategies = get_args(SamplingStrategy)
        if self.strategy not in strategies:
            raise TransferError(
                f"strategy must be one of {', '.join(strategies)}, got {shown(self.strategy)}"
            )

    def choose(self, logits: Tensor, generator: torch.Generator) -> int:
        """Choose one token from logits ``(vocab,)``."""
        if self.strategy == "greedy":
            return int(logits.argmax())
        probabilities = (logits.float() / self.temperature).softmax(-1)
        # stable: of equal probabilities the lower id comes first, every time
        kept, order = probabilities.sort(descending=True, stable=True)
        if self.strategy == "top_p":
            before = kept.cumsum(-1) - kept  # a token is dropped if those before it reach top_p
            kept = kept.where(before < self.top_p, 0.0)
        else:
            kept[self.top_k :] = 0.0
        # on the CPU: a seed gives the same tokens on every device
        drawn = torch.multinomial(kept.cpu(), 1, generator=generator)
        return int(order[drawn])


@torch.no_grad()
def continue_ids(
    model: Any,
    ids: list[int],
    sampling: Sampling,
    *,
    on_token: Callable[[int, Tensor], None] | None = None,
) -> tuple[list[int], Tensor]:
    """Continue a text.

    Args:
        model: Causal language model; an injection into it takes effect.
        ids: Token ids of the text.
        sampling: How tokens are chosen.
        on_token: Called with each new token and the logits it was chosen from.

    Returns:
        New tokens, and the logits they were chosen from, ``(tokens, vocab)``, float32 on the CPU.
    """
    generator = torch.Generator().manual_seed(sampling.seed)
    eos = model.generation_config.eos_token_id
    ends = {eos} if isinstance(eos, int) else set(eos or ())
    found: list[int] = []
    rows = []
    cache = None
    step = torch.tensor([ids], device=model.device)
    while len(found) < sampling.tokens:
        # logits_to_keep: a prompt needs the logits of its last token only
        out = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        logits = out.logits[0, -1].float().cpu()
        token = sampling.choose(logits, generator)
        found.append(token)
        rows.append(logits)
        if on_token is not None:
            on_token(token, logits)
        if token in ends:
            break
        step = torch.tensor([[token]], device=model.device)
    return found, torch.stack(rows)
