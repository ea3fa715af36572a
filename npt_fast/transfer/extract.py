"""Extract the modulation of a text from a model with NP layers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from npt_fast.checkpoint.keys import PROJECTIONS
from npt_fast.config import Position
from npt_fast.errors import ModelError, TransferError
from npt_fast.hf.convert import components, decoder_layers
from npt_fast.hf.tokenizer import encode
from npt_fast.modules import NPComponent
from npt_fast.schema import is_text, shown
from npt_fast.transfer.base_model import BaseModel
from npt_fast.transfer.modulation import Modulation
from npt_fast.transfer.positions import resolve
from npt_fast.transfer.terms import Terms


@torch.no_grad()
def extract(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    *,
    position: Position = -1,
    layers: Sequence[int] | None = None,
    reduce: Literal["none", "mean"] = "none",
) -> Modulation:
    """Extract the modulation of a text, at one position or as the mean over several.

    Args:
        model: Model with NP layers that are on.
        tokenizer: Tokenizer of the model; no special tokens are added, as in the original.
        text: Text that the model reads.
        position: Token whose modulation is taken; several need ``reduce="mean"``.
        layers: Layers to extract from; None for all NP layers that are on.
        reduce: ``"mean"`` averages each vector over the positions, as the original's
            ``extract-seq`` does. That is not the mean of dW.

    Returns:
        v_a and v_b of all components, k terms per projection, in the model's dtype.

    Raises:
        ModelError: the model has no NP layer, or one of `layers` is off.
        TransferError: the text is empty, the position is outside it, or several positions are
            given without ``reduce="mean"``.
    """
    ids, tokens = tokenize(tokenizer, text)
    places = resolve(position, tokens)
    if reduce == "none" and len(places) > 1:
        raise TransferError(
            f"{len(places)} positions have a modulation each; take one position or their mean"
        )
    converted = components(model)
    chosen = sorted(converted) if layers is None else list(layers)
    chosen = [layer for layer in chosen if layers is not None or converted[layer].enabled]
    for layer in chosen:
        if layer not in converted or not converted[layer].enabled:
            raise ModelError(
                f"layer {layer} is not an NP layer that is on; on are {enabled_layers(converted)}"
            )
    if not chosen:
        raise ModelError("the model has no NP layers that are on; load a checkpoint first")
    seen: dict[int, Tensor] = {}
    with ExitStack() as stack:
        for layer in chosen:

            def keep(_: Any, args: Any, kwargs: Any, layer: int = layer) -> None:
                seen[layer] = args[0][0, places]

            hook = converted[layer].register_forward_pre_hook(keep, with_kwargs=True)
            stack.callback(hook.remove)
        device = next(decoder_layers(model).parameters()).device
        decoder: Any = model.get_decoder()  # type: ignore[operator]
        # the decoder alone: no logits are needed
        decoder(input_ids=torch.tensor([ids], device=device), use_cache=False)
    found = {}
    for layer in chosen:
        vectors = component_vectors(converted[layer], seen[layer])
        # (positions, k, width) -> (k, width); the mean is taken in float32
        found[layer] = {
            name: Terms(v_a.float().mean(0).to(v_a.dtype), v_b.float().mean(0).to(v_b.dtype))
            if len(places) > 1
            else Terms(v_a[0], v_b[0])
            for name, (v_a, v_b) in vectors.items()
        }
    origin = {
        "text": text,
        "tokens": tokens,
        "positions": places,
        "weights": {str(layer): digest(converted[layer]) for layer in chosen},
    }
    return Modulation(found, BaseModel.of(model), origin, vectors=True)


def enabled_layers(converted: dict[int, NPComponent]) -> list[int]:
    """Indices of the layers that are on."""
    return [layer for layer, component in converted.items() if component.enabled]


def tokenize(tokenizer: Any, text: str) -> tuple[list[int], list[str]]:
    """Ids and texts of a text's tokens, without special tokens.

    Raises:
        TransferError: the text is empty, or has lone surrogates.
    """
    if not is_text(text):
        raise TransferError(f"{shown(text)} is not valid Unicode text")
    ids = encode(tokenizer, text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise TransferError("the text is empty")
    return list(ids), [tokenizer.decode([i]) for i in ids]


def component_vectors(
    component: NPComponent, attention: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Form v_a and v_b of each projection for some tokens (design.md#definition).

    Args:
        component: NP component of a layer.
        attention: Attention outputs of the tokens, ``(n, D)``.

    Returns:
        Vectors ``(n, k, in)`` and ``(n, k, out)`` by projection, in the dtype of `attention`.
    """
    m = component.factors
    size, k = m.w_b_gate.shape[0], m.num_ranks
    u = (attention @ m.w_down.to(attention.dtype)).unflatten(1, (-1, k, size // k))
    reads = [*torch.split(m.w_a_in, size), m.w_a_mid]
    writes = [m.w_b_gate, m.w_b_up, m.w_b_down]
    found = {}
    for index, name in enumerate(PROJECTIONS[: u.shape[1]]):
        pair = []
        for head in (reads[index], writes[index]):
            assert head is not None
            weight = head.to(attention.dtype).unflatten(0, (k, -1))
            pair.append(torch.einsum("nkr,kri->nki", u[:, index], weight))
        found[name] = (pair[0], pair[1])
    return found


_digests: WeakKeyDictionary[NPComponent, tuple[tuple[int, ...], str]] = WeakKeyDictionary()


def digest(component: NPComponent) -> str:
    """SHA-256 of a component's weights, cached until they change."""
    parameters = list(component.parameters())
    # torch counts every change of a tensor in place
    versions = tuple(parameter._version for parameter in parameters)
    known = _digests.get(component)
    if known is None or known[0] != versions:
        found = hashlib.sha256()
        for parameter in parameters:
            found.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        known = _digests[component] = (versions, found.hexdigest())
    return known[1]
