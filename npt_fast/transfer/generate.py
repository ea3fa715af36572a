"""Continue a text token by token, with a KV cache and nothing decoded and tokenized again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from npt_fast.config import SamplingStrategy
from npt_fast.errors import TransferError
from npt_fast.schema import LARGEST, shown

MOST_TOKENS = 10_000
"""Of a continuation: logs and facts ask for them, and nobody waits for a billion."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        tokens: how many at most, up to 10,000; it ends earlier with an end-of-text token.
        strategy: ``greedy``; ``top_k`` (``sample`` is another word for it); ``top_p``.
        temperature: of the distribution; greedy has no use for it.
        top_k: likeliest tokens that are left.
        top_p: smallest set of tokens of at least this probability.
        seed: of the choice.
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
        if self.strategy not in ("greedy", "top_k", "top_p", "sample"):
            raise TransferError(
                f"strategy must be greedy, top_k, top_p or sample, got {shown(self.strategy)}"
            )

    def choose(self, logits: Tensor, generator: torch.Generator) -> int:
        """One token from logits ``(vocab,)``."""
        if self.strategy == "greedy":
            return int(logits.argmax())
        probabilities = (logits.float() / self.temperature).softmax(-1)
        kept, order = probabilities.sort(descending=True, stable=True)
        if self.strategy == "top_p":
            before = kept.cumsum(-1) - kept  # a token stays unless those before it are enough
            kept = kept.where(before < self.top_p, 0.0)
        else:
            kept[self.top_k :] = 0.0
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
    """What follows a text.

    Args:
        model: a causal language model; what is injected into it acts.
        ids: the text.
        sampling: how.
        on_token: called with every new token and the logits it was chosen from.

    Returns:
        new tokens, and the logits each was chosen from, ``(tokens, vocab)`` in float32 on the CPU.
    """
    generator = torch.Generator().manual_seed(sampling.seed)
    eos = model.generation_config.eos_token_id
    ends = {eos} if isinstance(eos, int) else set(eos or ())
    found: list[int] = []
    rows = []
    cache = None
    step = torch.tensor([ids], device=model.device)
    while len(found) < sampling.tokens:
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
