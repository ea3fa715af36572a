"""Inject a modulation into a running model, at chosen tokens only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from npt_fast.checkpoint.keys import PROJECTIONS
from npt_fast.config import Injection, InjectionMode, InjectionTime, Match, Position
from npt_fast.errors import ModelError, TransferError
from npt_fast.functional import ACTIVATIONS
from npt_fast.hf.convert import components
from npt_fast.modules import NPComponent
from npt_fast.transfer.extract import component_vectors, enabled_layers
from npt_fast.transfer.modulation import Modulation
from npt_fast.transfer.positions import resolve
from npt_fast.transfer.terms import Terms

_CHUNK = (
    64  # tokens computed at a time; each needs its own vectors: k (in + out) numbers per projection
)


@dataclass(slots=True)
class Hits:
    """Tokens and layers that an injection reached.

    Attributes:
        positions: Positions in the prompt, one list per row of the batch.
        layers: Layers whose output was changed.
        count: Number of (layer, token) pairs over all passes.
    """

    positions: list[list[int]] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    count: int = 0


def inject(
    model: nn.Module,
    modulation: Modulation | Sequence[Modulation | None],
    *,
    position: Position = -1,
    mode: InjectionMode = "replace",
    strength: float = 1.0,
    when: InjectionTime = "prefill",
    tokenizer: Any = None,
) -> AbstractContextManager[Hits]:
    """Context in which `modulation` changes the weights for the tokens at `position`.

    Positions are counted on the tokens of a prompt without padding. They stay where they are while
    text is generated, with or without a KV cache. An injection into the prompt acts on all later
    tokens through attention.

    ===============  ===================================================
    mode             weight change of an injected token
    ===============  ===================================================
    ``replace``      ``strength * dW_source``
    ``blend``        from ``strength * v_source + (1 - strength) * v``
    ``add``          from ``v + strength * v_source``
    ``exact-blend``  ``strength * dW_source + (1 - strength) * dW``
    ``exact-add``    ``dW + strength * dW_source``
    ===============  ===================================================

    ``blend`` and ``add`` mix the vectors v_a and v_b, as the original does; the product of two
    mixed vectors has cross terms, so strength does not act linearly.

    Args:
        model: Model with NP layers.
        modulation: Modulation for all rows of a batch, or a list with one per row; None in the
            list leaves a row unchanged.
        position: Tokens of the prompt; see `npt_fast.transfer.positions`.
        mode: How the modulation and the token's own weight change combine, as in the table.
        strength: Factor of the modulation, as in the table.
        when: ``"prefill"`` changes tokens of the prompt, ``"decode"`` all generated tokens,
            ``"both"`` both.
        tokenizer: Tokenizer of the model; needed for positions given by text.

    Yields:
        The tokens and layers reached so far; updated while the model runs.

    Raises:
        ModelError: the modulation belongs to another base model, or one of its layers is not an NP
            layer or is off.
        TransferError: the modulation does not fit the mode, a position is outside a prompt, or
            nothing was reached by the end of the context.
    """
    injection = Injection(position=position, mode=mode, strength=strength, when=when)
    return injecting(model, modulation, injection, tokenizer)


@contextmanager
def injecting(
    model: nn.Module,
    modulation: Modulation | Sequence[Modulation | None],
    injection: Injection,
    tokenizer: Any = None,
) -> Iterator[Hits]:
    """Like `inject`, with position, mode, strength and time as one value."""
    mode, when = injection.mode, injection.when
    if mode not in get_args(InjectionMode) or when not in get_args(InjectionTime):
        raise TransferError(
            f"mode must be one of {', '.join(get_args(InjectionMode))} and when one of "
            f"{', '.join(get_args(InjectionTime))}, got {mode!r} and {when!r}"
        )
    given = [modulation] if isinstance(modulation, Modulation) else list(modulation)
    converted = components(model)
    layers = sorted({layer for m in given if m is not None for layer in m.layers})
    for m in given:
        if m is not None:
            m.check_base_model(model)
            _check_mode(m, mode, converted)
    for layer in layers:
        if layer not in converted or not converted[layer].enabled:
            raise ModelError(
                f"layer {layer} of the modulation is not an NP layer that is on; on are "
                f"{enabled_layers(converted)}"
            )
    if not layers:
        raise TransferError("the modulations change no layer")
    hits = Hits()
    targets = _Targets(injection, tokenizer, hits)
    with ExitStack() as stack:
        decoder: Any = model.get_decoder()  # type: ignore[operator]
        stack.callback(decoder.register_forward_pre_hook(targets.before, with_kwargs=True).remove)
        for layer in layers:
            parts = [None if m is None else m.layers.get(layer) for m in given]
            device = converted[layer].w_down.device
            terms = [None if p is None else _on(p, device) for p in parts]
            hook = _Hook(layer, terms, injection, targets)
            stack.callback(converted[layer].register_forward_hook(hook).remove)
        yield hits
    if not hits.count:
        raise TransferError(
            f"nothing was injected: no token was at {injection.position} when the model ran"
            if targets.passes
            else "nothing was injected: the model did not run within the context"
        )


def _check_mode(m: Modulation, mode: InjectionMode, converted: dict[int, NPComponent]) -> None:
    """Check that a mode on vectors finds vectors, as many as the layer has components."""
    if mode not in ("blend", "add"):
        return
    if not m.vectors:
        raise TransferError(
            f"{mode} mixes vectors, which a combined modulation does not have; use exact-{mode}"
        )
    for layer, projection, terms in m.walk():
        component = converted.get(layer)
        if component is None:
            continue
        if getattr(component, f"w_b_{projection}") is None:
            raise TransferError(
                f"layer {layer} does not change {projection}: {mode} has nothing to mix with; "
                f"use exact-{mode}"
            )
        if len(terms.v_a) != component.num_ranks:
            raise TransferError(
                f"layer {layer}, {projection}: {len(terms.v_a)} vectors for a layer with "
                f"{component.num_ranks}; use exact-{mode}"
            )


def _on(terms: Any, device: torch.device) -> dict[str, Terms]:
    return {name: Terms(*(v.to(device) for v in pair)) for name, pair in terms.items()}


class _Targets:
    """Finds, in each pass of the model, the tokens to inject into."""

    def __init__(self, injection: Injection, tokenizer: Any, hits: Hits) -> None:
        self.position = injection.position
        self.when = injection.when
        self.tokenizer = tokenizer
        self.hits = hits
        self.passes = 0
        self.chosen: Tensor | None = None  # mask of this pass, (B, S); None if no token is chosen
        self._prompt: Tensor | None = None
        self._columns: Tensor | None = None  # mask of the prompt, (B, S)
        self._length = 0  # tokens of the last pass without a past

    def before(self, _: Any, args: Any, kwargs: Any) -> None:
        """Hook that runs before the decoder: choose the tokens of this pass."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise TransferError(
                "an injection needs input_ids; embeddings have no positions to count"
            )
        self.passes += 1
        cache = kwargs.get("past_key_values")
        past = cache.get_seq_length() if cache is not None else 0
        if past and ids.shape[1] != 1:
            raise TransferError(
                "an injection needs the whole prompt in one pass, then one token at a time: no "
                "prefilled cache, chunks or assisted generation"
            )
        if past:
            chosen = torch.full_like(ids, self.when != "prefill", dtype=torch.bool)
        else:
            if cache is not None or not self._goes_on(ids):
                self._begin(ids, kwargs.get("attention_mask"))
            assert self._columns is not None
            self._length = ids.shape[1]
            chosen = torch.full_like(ids, self.when != "prefill", dtype=torch.bool)
            prompt = self._columns if self.when != "decode" else torch.zeros_like(self._columns)
            # without a cache the prompt comes again in every pass, and what is behind it was
            # generated
            chosen[:, : prompt.shape[1]] = prompt
        self.chosen = chosen if bool(chosen.any()) else None

    def _goes_on(self, ids: Tensor) -> bool:
        """Whether this is the last text plus one token, as in generation without a cache."""
        prompt = self._prompt
        if prompt is None or ids.shape[0] != prompt.shape[0] or ids.shape[1] != self._length + 1:
            return False
        return torch.equal(ids[:, : prompt.shape[1]], prompt)

    def _begin(self, ids: Tensor, mask: Any) -> None:
        """Find the positions in a new prompt."""
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise TransferError("an injection needs an attention mask of (batch, tokens), or none")
        self._prompt = ids.clone()
        self._columns = torch.zeros_like(ids, dtype=torch.bool)
        self.hits.positions = []
        for row, row_ids in enumerate(ids):
            real = row_ids.new_ones(row_ids.shape) if mask is None else mask[row]
            columns = real.nonzero().flatten()
            places = resolve(self.position, self._texts(row_ids[columns].tolist()))
            self._columns[row, columns[places]] = True
            self.hits.positions.append(places)

    def _texts(self, ids: list[int]) -> list[str]:
        by_text = isinstance(self.position, Match) or (
            isinstance(self.position, str) and self.position.startswith(("at:", "after:"))
        )
        if not by_text:
            return [""] * len(ids)
        if self.tokenizer is None:
            raise TransferError(f"the position {self.position} needs a tokenizer")
        return [self.tokenizer.decode([i]) for i in ids]


class _Hook:
    """Hook of one layer's NP component: computes the output of the chosen tokens again."""

    def __init__(
        self,
        layer: int,
        terms: Sequence[dict[str, Terms] | None],
        injection: Injection,
        targets: _Targets,
    ) -> None:
        self.layer = layer
        self.terms = terms
        self.mode = injection.mode
        self.strength = injection.strength
        self.targets = targets

    def __call__(self, component: NPComponent, args: Any, output: Tensor) -> Tensor | None:
        chosen = self.targets.chosen
        if chosen is None:
            return None
        attention, h, mlp = args
        batch = chosen.shape[0]
        if batch % len(self.terms):
            raise TransferError(f"{len(self.terms)} modulations do not fit a batch of {batch} rows")
        # not in place: autograd, or another hook, may hold what the component returned
        output = output.clone()
        # a batch of several rows for each modulation, as beams are, is in that order
        rows = torch.arange(batch, device=chosen.device) // (batch // len(self.terms))
        for index, terms in enumerate(self.terms):
            if terms is None:
                continue
            meant = (chosen & (rows == index)[:, None]).to(output.device)
            if not bool(meant.any()):
                continue
            parts = zip(attention[meant].split(_CHUNK), h[meant].split(_CHUNK), strict=True)
            output[meant] = torch.cat(
                [self._compute(component, a, x, mlp, terms) for a, x in parts]
            )
            hits = self.targets.hits
            hits.count += int(meant.sum())
            if self.layer not in hits.layers:
                hits.layers = sorted([*hits.layers, self.layer])
        return output

    def _compute(
        self, component: NPComponent, attention: Tensor, h: Tensor, mlp: Any, source: Any
    ) -> Tensor:
        """The layer's MLP for tokens ``(n, D)``, with the injected weight changes."""
        own: dict[str, tuple[Tensor, Tensor]] = {}
        if self.mode != "replace" or len(source) < len(PROJECTIONS):
            own = component_vectors(component, attention.to(h.dtype))

        def projected(a: Tensor, name: str) -> Tensor:
            module = mlp.get_submodule(f"{name}_proj")
            y: Tensor = linear(a, module.weight, module.bias)
            if (
                name not in source
            ):  # the modulation lacks this projection: keep the token's own change
                return y + _change(a, *own[name]) if name in own else y
            v_a, v_b = (v.to(a.dtype) for v in source[name])
            keep = 1.0 - self.strength if self.mode.endswith("blend") else 1.0
            if self.mode in ("blend", "add"):
                mixed = (
                    keep * v + self.strength * w for v, w in zip(own[name], (v_a, v_b), strict=True)
                )
                return y + _change(a, *mixed)
            # strength acts on dW, not on vectors, where it would act squared
            y = y + self.strength * ((a @ v_a.t()) @ v_b)
            if self.mode != "replace" and name in own:
                y = y + keep * _change(a, *own[name])
            return y

        inner = ACTIVATIONS[component.activation][0](projected(h, "gate")) * projected(h, "up")
        return projected(inner, "down")


def _change(a: Tensor, v_a: Tensor, v_b: Tensor) -> Tensor:
    """``sum_i v_b_i (v_a_i . a)``, with vectors ``(n, k, width)`` of each token."""
    change: Tensor = torch.einsum("nki,ni,nko->no", v_a, a, v_b)
    return change
