"""What an injection does to a prompt: continuations, likeliest tokens, divergence."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from npt_fast.config import Injection
from npt_fast.transfer.extract import tokenize
from npt_fast.transfer.generate import Sampling, continue_ids
from npt_fast.transfer.inject import injecting
from npt_fast.transfer.modulation import Modulation
from npt_fast.transfer.positions import resolve


@dataclass(frozen=True, slots=True)
class Token:
    """A token's probability, nothing injected and injected.

    Attributes:
        text: of the token.
        before: nothing injected.
        after: injected.
    """

    text: str
    before: float
    after: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """A prompt's next tokens, nothing injected and injected.

    Attributes:
        prompt: tokens of the prompt, as texts.
        no_injection: continuation, nothing injected, as texts of tokens.
        injected: continuation, injected.
        no_injection_text: `no_injection` decoded as a whole: a letter may take several tokens.
        injected_text: likewise.
        top: likeliest next tokens after the injection.
        no_injection_top: likeliest next tokens before it.
        tracked: of the tokens that are followed.
        paths: their probability before every generated token, injected.
        kl: KL(base, injected) of the next token, nats.
        kls: of every generated token, both models reading the injected continuation so far.
        generated: likewise, the probability of each token of the injected continuation.
        positions: where it was injected.
        layers: into which layers.
        seconds: that the injected continuation took.
        no_injection_seconds: that the other took.
    """

    prompt: list[str]
    no_injection: list[str]
    injected: list[str]
    no_injection_text: str
    injected_text: str
    top: list[Token]
    no_injection_top: list[Token]
    tracked: list[Token]
    paths: list[list[float]]
    kl: float
    kls: list[float]
    generated: list[Token]
    positions: list[int]
    layers: list[int]
    seconds: float
    no_injection_seconds: float


@torch.no_grad()
def compare(
    model: Any,
    tokenizer: Any,
    modulation: Modulation,
    prompt: str,
    injection: Injection,
    *,
    sampling: Sampling | None = None,
    tracked: Sequence[str] = (),
    top: int = 5,
) -> Comparison:
    """Continue a prompt with and without an injection.

    Args:
        model: with NP layers.
        tokenizer: of the model; no special tokens are added.
        modulation: what is injected.
        prompt: the text.
        injection: how.
        sampling: how it goes on; one greedy token if None.
        tracked: texts whose first token's probability is followed.
        top: how many of the likeliest tokens.

    Raises:
        TransferError, ModelError: as `inject`.
    """
    sampling = sampling or Sampling()
    ids, tokens = tokenize(tokenizer, prompt)
    begun = time.perf_counter()
    plain_ids, plain_logits = continue_ids(model, ids, sampling)
    between = time.perf_counter()
    with injecting(model, modulation, injection, tokenizer) as hits:
        new_ids, new_logits = continue_ids(model, ids, sampling)
    seconds = time.perf_counter() - between
    same_text = plain_logits[:1]
    if len(new_ids) > 1:  # what the base model makes of the injected text
        whole = torch.tensor([[*ids, *new_ids[:-1]]], device=model.device)
        read = model(input_ids=whole, use_cache=False, logits_to_keep=len(new_ids))
        same_text = read.logits[0].float().cpu()
    kls = divergences(same_text, new_logits)
    before, after = plain_logits[0].softmax(-1), new_logits[0].softmax(-1)
    followed = [tokenize(tokenizer, text)[0][0] for text in tracked]

    def token(index: int) -> Token:
        return Token(tokenizer.decode([index]), before[index].item(), after[index].item())

    return Comparison(
        prompt=tokens,
        no_injection=[tokenizer.decode([i]) for i in plain_ids],
        injected=[tokenizer.decode([i]) for i in new_ids],
        no_injection_text=tokenizer.decode(plain_ids),
        injected_text=tokenizer.decode(new_ids),
        top=[token(i) for i in after.topk(top).indices.tolist()],
        no_injection_top=[token(i) for i in before.topk(top).indices.tolist()],
        tracked=[token(i) for i in followed],
        paths=[new_logits.softmax(-1)[:, i].tolist() for i in followed],
        kl=kls[0],
        kls=kls,
        generated=[
            Token(tokenizer.decode([i]), p.softmax(-1)[i].item(), q.softmax(-1)[i].item())
            for i, p, q in zip(new_ids, same_text, new_logits, strict=True)
        ],
        positions=hits.positions[0],
        layers=hits.layers,
        seconds=seconds,
        no_injection_seconds=between - begun,
    )


def divergences(base: Tensor, other: Tensor) -> list[float]:
    """KL(base, other) of every row of logits ``(n, vocab)``, nats."""
    p, q = (logits.double().log_softmax(-1) for logits in (base, other))
    found: list[float] = (p.exp() * (p - q)).sum(-1).clamp_min(0).tolist()
    return found


@dataclass(frozen=True, slots=True)
class Sweep:
    """One prompt, many injections.

    Attributes:
        layers: rows: sets of layers that were injected into.
        columns: what each is: a strength, or a token of the prompt.
        strengths: that were used.
        kl: KL(base, injected) of the next token, by row and column.
        tracked: probability by tracked token, row and column.
        no_injection: probability of the tracked tokens, nothing injected.
    """

    layers: list[list[int]]
    columns: list[str]
    strengths: list[float]
    kl: list[list[float]]
    tracked: dict[str, list[list[float]]]
    no_injection: dict[str, float]


def sweep(
    model: Any,
    tokenizer: Any,
    modulation: Modulation,
    prompt: str,
    injection: Injection,
    *,
    strengths: Sequence[float] = (0.25, 0.5, 1.0, 2.0),
    tracked: Sequence[str] = (),
    each_token: bool = False,
) -> Sweep:
    """Inject into every layer of a modulation alone, and into all: a row each.

    A column is one of `strengths`, which take the place of the injection's; with `each_token` one
    of the tokens at its position, at the first strength.
    """
    if each_token:
        strengths = strengths[:1]
        tokens = tokenize(tokenizer, prompt)[1]
        columns = [
            (f"{i} {tokens[i]!r}", replace(injection, position=i, strength=strengths[0]))
            for i in resolve(injection.position, tokens)
        ]
    else:
        columns = [(f"x {s:g}", replace(injection, strength=s)) for s in strengths]
    rows = [[layer] for layer in modulation.layers]
    if len(rows) > 1:
        rows.append(list(modulation.layers))
    ids, once = tokenize(tokenizer, prompt)[0], Sampling()
    followed = {text: tokenize(tokenizer, text)[0][0] for text in tracked}
    nothing = continue_ids(model, ids, once)[1]
    kl: list[list[float]] = []
    after: dict[str, list[list[float]]] = {text: [] for text in followed}
    for layers in rows:
        part = modulation.only(layers)
        cells = []
        for _, each in columns:
            with injecting(model, part, each, tokenizer):
                cells.append(continue_ids(model, ids, once)[1])
        kl.append([divergences(nothing, cell)[0] for cell in cells])
        for text, index in followed.items():
            after[text].append([cell[0].softmax(-1)[index].item() for cell in cells])
    base = {text: nothing[0].softmax(-1)[index].item() for text, index in followed.items()}
    return Sweep(rows, [name for name, _ in columns], list(strengths), kl, after, base)
