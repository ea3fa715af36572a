"""Inject a modulation into a running model, at chosen tokens only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from traceback import walk_stack
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from npt_fast.arguments import check_arguments
from npt_fast.called_mlp import Change
from npt_fast.config import Injection, InjectionMode, InjectionTime, Position
from npt_fast.errors import ModelError, TransferError
from npt_fast.functional import is_shard
from npt_fast.hf.convert import components
from npt_fast.hf.decoder import token_reader
from npt_fast.hf.tokenizer import Tokenizer
from npt_fast.modules import NPComponent
from npt_fast.transfer.extract import enabled_layers, projection_vectors
from npt_fast.transfer.modulation import Modulation
from npt_fast.transfer.positions import find
from npt_fast.transfer.terms import Terms

_CHUNK = 64  # tokens whose vectors exist at a time: k (in + out) numbers per token


_ON_VECTORS = ("blend", "add")
_OWN_UNUSED = ("replace", *_ON_VECTORS)  # the vectors of a token are formed anew

_active: ContextVar[tuple[_Targets, ...]] = ContextVar("injections that are on", default=())


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


@check_arguments
def inject(
    model: nn.Module,
    modulation: Modulation | Sequence[Modulation | None],
    *,
    position: Position = -1,
    mode: InjectionMode = "replace",
    strength: float = 1.0,
    when: InjectionTime = "prefill",
    tokenizer: Tokenizer | None = None,
) -> AbstractContextManager[Hits]:
    """Context in which `modulation` changes the weights for the tokens at `position`.

    Positions are counted on the tokens that the model reads, with BOS and without padding, as
    `npt_fast.extract` counts them. They stay where they are while text is generated, with or
    without a KV cache. An injection into the prompt acts on all later tokens through attention.

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

    Contexts nest. Where two injections meet at one token, the inner one acts on what the outer one
    made, so two of ``exact-add`` add up; an inner mode that would drop the outer one is refused. An
    injection acts on calls of its own thread and `contextvars` context.

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
            layer, is off, or has no such projection.
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
        reader = token_reader(model)
        stack.callback(reader.register_forward_pre_hook(targets.before, with_kwargs=True).remove)
        for layer in layers:
            parts = [None if m is None else m.layers.get(layer) for m in given]
            for name in (name for part in parts for name in part or ()):
                if name not in converted[layer].layout.projections:
                    raise ModelError(f"layer {layer} has no {name}, which the modulation changes")
            device = converted[layer].w_down.device
            terms = [None if p is None else _on(p, device) for p in parts]
            hook = _Hook(layer, terms, injection, targets)
            handle = converted[layer].register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        token = _active.set((*_active.get(), targets))
        stack.callback(_active.reset, token)
        yield hits
    if not hits.count:
        raise TransferError(f"nothing was injected: {_reason(model, targets)}")
    if when != "prefill" and targets.missed:
        raise TransferError(
            f"{targets.missed} generated tokens were not injected into: a compiled model read "
            "them, and torch.compile leaves hooks out; generate without compilation"
        )


def _reason(model: nn.Module, targets: _Targets) -> str:
    """Why an injection reached no token."""
    if targets.passes and not targets.found:
        return f"no token was at {targets.position} when the model ran"
    compiled = ("_compiled_call_impl", "_orig_mod")
    if any(getattr(m, name, None) is not None for m in model.modules() for name in compiled):
        return "the model is compiled, and torch.compile leaves hooks out; inject before compiling"
    return (
        "the model did not run within the context, in its thread and without torch.compile, which "
        "leaves hooks out"
    )


def _check_mode(m: Modulation, mode: InjectionMode, converted: dict[int, NPComponent]) -> None:
    """Check that a mode on vectors finds vectors, as many as the layer has components."""
    if mode not in _ON_VECTORS:
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
        self.found = False  # whether a pass had tokens to inject into
        self.chosen: Tensor | None = None  # mask of this pass, (B, S); None if no token is chosen
        self._prompt: Tensor | None = None
        self._columns: Tensor | None = None  # mask of the prompt, (B, S)
        self._length = 0  # tokens of the last pass without a past
        self._generate: FrameType | None = None  # the call of `generate` that began the prompt
        self._cache: Any = None
        self._cached = 0  # tokens in the cache after the last pass that was seen

    @property
    def acts(self) -> bool:
        """Whether the caller is in the context of this injection, not in another thread."""
        return self in _active.get()

    @property
    def missed(self) -> int:
        """Tokens that were read without this being called, as by a compiled decoding step."""
        return 0 if self._cache is None else max(self._cache.get_seq_length() - self._cached, 0)

    def before(self, _: Any, args: Any, kwargs: Any) -> None:
        """Hook that runs before the decoder: choose the tokens of this pass."""
        if not self.acts:
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise TransferError(
                "an injection needs input_ids; embeddings have no positions to count"
            )
        self.passes += 1
        cache = kwargs.get("past_key_values")
        past = cache.get_seq_length() if cache is not None else 0
        self._cache, self._cached = cache, past + ids.shape[1]
        if past and ids.shape[1] != 1:
            raise TransferError(
                "an injection needs the whole prompt in one pass, then one token at a time: no "
                "prefilled cache, chunks or assisted generation"
            )
        if past:
            chosen = torch.full_like(ids, self.when != "prefill", dtype=torch.bool)
        else:
            chosen = self._whole(ids, kwargs.get("attention_mask"), cache)
        self.chosen = chosen if bool(chosen.any()) else None
        self.found |= self.chosen is not None

    def _whole(self, ids: Tensor, mask: Any, cache: Any) -> Tensor:
        """Choose tokens of a pass without a past, which has the whole text."""
        generate = _generate_frame() if cache is None else None
        goes_on = cache is None and self._goes_on(ids)
        if not goes_on or generate is None or generate is not self._generate:
            continued = self._chosen_of(ids) if goes_on and generate is None else None
            self._begin(ids, mask)
            self._generate = generate
            if continued is not None and not torch.equal(self._chosen_of(ids), continued):
                raise TransferError(
                    "an injection cannot tell whether this is a longer prompt or the last one and "
                    "a generated token: take one context per prompt, and generate with a KV cache "
                    "or model.generate"
                )
        self._length = ids.shape[1]
        return self._chosen_of(ids)

    def _chosen_of(self, ids: Tensor) -> Tensor:
        """Mask of the tokens to inject into, if what is behind the prompt was generated."""
        assert self._columns is not None
        chosen = torch.full_like(ids, self.when != "prefill", dtype=torch.bool)
        prompt = self._columns if self.when != "decode" else torch.zeros_like(self._columns)
        chosen[:, : prompt.shape[1]] = prompt
        return chosen

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
            places = find(self.position, row_ids[columns].tolist(), self.tokenizer)
            self._columns[row, columns[places]] = True
            self.hits.positions.append(places)


def _generate_frame() -> FrameType | None:
    """The running call of transformers' `generate`, if there is one.

    It tells a generated token from a longer prompt. The frame is held, not its id, which Python
    would give to another one.
    """
    for frame, _ in walk_stack(None):
        if (
            frame.f_code.co_name == "generate"
            and frame.f_globals.get("__name__") == "transformers.generation.utils"
        ):
            return frame
    return None


class _Hook:
    """Hook that runs before one layer's NP component, and hands it the edits of this pass."""

    def __init__(
        self,
        layer: int,
        terms: Sequence[Mapping[str, Terms] | None],
        injection: Injection,
        targets: _Targets,
    ) -> None:
        self.layer = layer
        self.terms = terms
        self.injection = injection
        self.targets = targets

    def __call__(self, _: NPComponent, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        chosen = self.targets.chosen if self.targets.acts else None
        if chosen is None:
            return None
        chosen = chosen.to(args[0].device)
        batch = chosen.shape[0]
        if batch % len(self.terms):
            raise TransferError(f"{len(self.terms)} modulations do not fit a batch of {batch} rows")
        earlier = kwargs.get("edits", ())
        edits: list[_Edit] = []
        # a batch of several rows for each modulation, as beams are, is in that order
        rows = torch.arange(batch, device=chosen.device) // (batch // len(self.terms))
        for index, terms in enumerate(self.terms):
            if terms is None:
                continue
            edit = _Edit(chosen & (rows == index)[:, None], terms, self.injection)
            count = int(edit.tokens.sum())
            if not count:
                continue
            for other in earlier:
                edit.check_follows(other, self.layer)
            edits.append(edit)
            hits = self.targets.hits
            hits.count += count
            if self.layer not in hits.layers:
                hits.layers = sorted([*hits.layers, self.layer])
        return args, {**kwargs, "edits": (*earlier, *edits)}


@dataclass(frozen=True, slots=True)
class _Edit:
    """An `npt_fast.called_mlp.Edit`: the weight changes of one modulation at some tokens."""

    tokens: Tensor
    terms: Mapping[str, Terms]
    injection: Injection

    def at(self, rows: tuple[Tensor, ...]) -> _Edit:
        return replace(self, tokens=self.tokens[rows])

    def check_follows(self, other: _Edit, layer: int) -> None:
        """Check that what another injection did to the same tokens is not lost."""
        mode = self.injection.mode
        if mode.startswith("exact") or not self.terms.keys() & other.terms.keys():
            return
        if bool((self.tokens & other.tokens).any()):
            raise TransferError(
                f"two injections meet at one token of layer {layer}, where {mode} would drop what "
                "the outer one did; use exact-add or exact-blend for the inner one"
            )

    def applied(self, change: Change, component: NPComponent, attention: Tensor) -> Change:
        rows = self.tokens.nonzero(as_tuple=True)
        everywhere = len(rows[0]) == self.tokens.numel()

        def edited(name: str, projection: Any, a: Tensor) -> Tensor | None:
            if name not in self.terms:  # the modulation lacks it: keep the token's own change
                return change(name, projection, a)
            if is_shard(getattr(projection, "weight", None)):
                raise ModelError(
                    f"{name}_proj is sharded by tensor parallelism; injections need whole "
                    "projections, so load the model without tp_plan"
                )
            v_a, v_b = (v.to(a.dtype) for v in self.terms[name])
            # where every token's change is replaced, its own need not be computed
            own = (
                None
                if everywhere and self.injection.mode in _OWN_UNUSED
                else change(name, projection, a)
            )
            if own is None:
                own = a.new_zeros(*a.shape[:-1], v_b.shape[1])
            new = self._new(component, name, a[rows], attention[rows], own[rows], v_a, v_b)
            return own.index_put(rows, new.to(own.dtype))

        return edited

    def _new(
        self,
        component: NPComponent,
        name: str,
        a: Tensor,
        attention: Tensor,
        own: Tensor,
        v_a: Tensor,
        v_b: Tensor,
    ) -> Tensor:
        """The new change of tokens ``(n, in)``, ``(n, out)``."""
        mode, strength = self.injection.mode, self.injection.strength
        keep = 1.0 - strength if mode.endswith("blend") else 1.0
        if mode in _ON_VECTORS:
            parts = zip(a.split(_CHUNK), attention.to(a.dtype).split(_CHUNK), strict=True)
            return torch.cat(
                [
                    _change(
                        part,
                        *(
                            keep * own + strength * given
                            for own, given in zip(
                                projection_vectors(component, name, x), (v_a, v_b), strict=True
                            )
                        ),
                    )
                    for part, x in parts
                ]
            )
        # strength acts on dW, not on vectors, where it would act squared
        new = strength * ((a @ v_a.t()) @ v_b)
        return new if mode == "replace" else new + keep * own


def _change(a: Tensor, v_a: Tensor, v_b: Tensor) -> Tensor:
    """``sum_i v_b_i (v_a_i . a)``, with vectors ``(n, k, width)`` of each token."""
    change: Tensor = torch.einsum("nki,ni,nko->no", v_a, a, v_b)
    return change
