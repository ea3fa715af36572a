"""Compare a prompt with and without an injection: continuations, likeliest tokens, KL."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from npt_fast.config import Injection
from npt_fast.hf.convert import disabled
from npt_fast.hf.tokenizer import DEFAULT_READING, Reading, first_token, read
from npt_fast.transfer.attention import next_logits
from npt_fast.transfer.generate import Sampling, continue_ids
from npt_fast.transfer.inject import injecting
from npt_fast.transfer.modulation import Modulation
from npt_fast.transfer.positions import find, named


@dataclass(frozen=True, slots=True)
class Token:
    """A token and its probability without and with an injection.

    Attributes:
        text: Text of the token.
        before: Probability without injection.
        after: Probability with the injection.
        base: Probability in the base model, with NP layers turned off; None if not measured.
    """

    text: str
    before: float
    after: float
    base: float | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """A prompt continued without and with an injection.

    Attributes:
        prompt: Texts of the prompt's tokens.
        no_injection: Texts of the tokens of the continuation without injection.
        injected: Texts of the tokens of the continuation with the injection.
        no_injection_text: `no_injection` decoded as a whole; one letter may take several tokens.
        injected_text: `injected` decoded as a whole.
        top: Likeliest next tokens with the injection.
        no_injection_top: Likeliest next tokens without injection.
        tracked: Next-token probability of the tracked tokens.
        paths: Probability of each tracked token at every step of the injected continuation.
        kl: KL(no injection || injected) of the next token, in nats.
        kls: The same at every step of the injected continuation, which both passes read.
        generated: Tokens of the injected continuation, with their probability in both passes.
        positions: Positions in the prompt that received the modulation.
        layers: Layers that received it.
        seconds: Duration of the injected continuation.
        no_injection_seconds: Duration of the continuation without injection.
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
    base: bool = False,
    reading: Reading = DEFAULT_READING,
) -> Comparison:
    """Continue a prompt with and without an injection.

    Args:
        model: Model with NP layers.
        tokenizer: Tokenizer of the model.
        modulation: Modulation to inject.
        prompt: Text to continue.
        injection: Position, mode, strength and time of the injection.
        sampling: How tokens are chosen; one greedy token if None.
        tracked: Texts; the probability of each one's first token is reported.
        top: Number of likeliest tokens to report.
        base: Measure the next token in the base model, too, for one more pass of the prompt.
        reading: How the prompt becomes tokens.

    Raises:
        TransferError: the prompt is empty, or the injection is not possible; see `inject`.
        ModelError: the modulation does not fit the model; see `inject`.
    """
    sampling = sampling or Sampling()
    ids, tokens = read(tokenizer, prompt, reading)
    begun = time.perf_counter()
    plain_ids, plain_logits = continue_ids(model, ids, sampling)
    between = time.perf_counter()
    with injecting(model, modulation, injection, tokenizer) as hits:
        new_ids, new_logits = continue_ids(model, ids, sampling)
    seconds = time.perf_counter() - between
    same_text = plain_logits[:1]
    if len(new_ids) > 1:  # the same text without injection: one pass reads all of it
        whole = torch.tensor([[*ids, *new_ids[:-1]]], device=model.device)
        out = model(input_ids=whole, use_cache=False, logits_to_keep=len(new_ids))
        same_text = out.logits[0].float().cpu()
    kls = divergences(same_text, new_logits)
    before, after = plain_logits[0].softmax(-1), new_logits[0].softmax(-1)
    followed = [first_token(tokenizer, text) for text in tracked]
    plain = None
    if base:
        with disabled(model):
            plain = next_logits(model, [ids])[0].softmax(-1)

    def token(index: int) -> Token:
        return Token(
            tokenizer.decode([index]),
            before[index].item(),
            after[index].item(),
            None if plain is None else plain[index].item(),
        )

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


def divergences(reference: Tensor, other: Tensor) -> list[float]:
    """KL(reference || other) for each row of logits ``(n, vocab)``, in nats."""
    p, q = (logits.double().log_softmax(-1) for logits in (reference, other))
    found: list[float] = (p.exp() * (p - q)).sum(-1).clamp_min(0).tolist()
    return found


@dataclass(frozen=True, slots=True)
class Sweep:
    """The effect of many injections on the next token of one prompt.

    Attributes:
        tokens: Texts of the prompt's tokens.
        positions: Positions in the prompt that received the modulation.
        layers: Layers that were injected into, by row.
        columns: Strength or token of the prompt, by column.
        strengths: Strengths that were used.
        kl: KL(no injection || injected) by row and column, in nats.
        tracked: Probability of each tracked token, by row and column.
        no_injection: Probability of each tracked token without injection.
    """

    tokens: list[str]
    positions: list[int]
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
    reading: Reading = DEFAULT_READING,
) -> Sweep:
    """Inject into each layer of a modulation alone and into all of them, at several strengths.

    Args:
        model: Model with NP layers.
        tokenizer: Tokenizer of the model.
        modulation: Modulation to inject; its layers are the rows.
        prompt: Text whose next token is looked at.
        injection: Position, mode and time; `strengths` replace its strength.
        strengths: Strengths to use, one column each.
        tracked: Texts; the probability of each one's first token is reported.
        each_token: Make a column for each token at the position, at the first strength.
        reading: How the prompt becomes tokens.

    Raises:
        TransferError: the prompt is empty, or the injection is not possible; see `inject`.
        ModelError: the modulation does not fit the model; see `inject`.
    """
    ids, tokens = read(tokenizer, prompt, reading)
    places = find(injection.position, ids, tokenizer)
    if each_token:
        strengths = strengths[:1]
        columns = [
            (named([i], tokens), replace(injection, position=i, strength=strengths[0]))
            for i in places
        ]
    else:
        columns = [(f"x {s:g}", replace(injection, strength=s)) for s in strengths]
    rows = [[layer] for layer in modulation.layers]
    if len(rows) > 1:
        rows.append(list(modulation.layers))
    once = Sampling()
    followed = {text: first_token(tokenizer, text) for text in tracked}
    plain = continue_ids(model, ids, once)[1]
    kl: list[list[float]] = []
    after: dict[str, list[list[float]]] = {text: [] for text in followed}
    for layers in rows:
        part = modulation.only(layers)
        cells = []
        for _, each in columns:
            with injecting(model, part, each, tokenizer):
                cells.append(continue_ids(model, ids, once)[1])
        kl.append([divergences(plain, cell)[0] for cell in cells])
        for text, index in followed.items():
            after[text].append([cell[0].softmax(-1)[index].item() for cell in cells])
    before = {text: plain[0].softmax(-1)[index].item() for text, index in followed.items()}
    return Sweep(
        tokens, places, rows, [name for name, _ in columns], list(strengths), kl, after, before
    )
