"""Extract the modulation of a text from a model with NP layers."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from npt_fast.arguments import check_arguments
from npt_fast.config import Position
from npt_fast.errors import ModelError, TransferError
from npt_fast.functional import heads_of
from npt_fast.hf.convert import components, decoder_layers
from npt_fast.hf.tokenizer import Reading, Tokenizer, read
from npt_fast.hf.wrappers import unwrapped
from npt_fast.layer_names import LayerList, chosen_layers
from npt_fast.modules import NPComponent
from npt_fast.transfer.base_model import BaseModel
from npt_fast.transfer.modulation import Modulation
from npt_fast.transfer.positions import find
from npt_fast.transfer.terms import Terms


@check_arguments
@torch.no_grad()
def extract(
    model: nn.Module,
    tokenizer: Tokenizer,
    text: str,
    *,
    position: Position = -1,
    layers: LayerList | None = None,
    reduce: Literal["none", "mean"] = "none",
    special_tokens: bool = True,
    chat: bool = False,
) -> Modulation:
    """Extract the modulation of a text, at one position or as the mean over several.

    Args:
        model: Model with NP layers that are on.
        tokenizer: Tokenizer of the model.
        text: Text that the model reads.
        position: Token whose modulation is taken, counted on what the model reads, BOS included;
            several need ``reduce="mean"``.
        layers: Layers to extract from, as for `npt_fast.disabled`; None for all NP layers that are
            on.
        reduce: ``"mean"`` averages each vector over the positions, as the original's
            ``extract-seq`` does. That is not the mean of dW.
        special_tokens: Put the tokenizer's special tokens, such as BOS, in front of the text; one
            that begins with them gets no second ones. An EOS that it would put behind is left out.
        chat: Make the text one user message of the tokenizer's chat template, as `Reading` says.

    Returns:
        v_a and v_b of all components, k terms per projection, in the model's dtype.

    Raises:
        ModelError: the model has no NP layer, or one of `layers` is off; the tokenizer has no chat
            template.
        TransferError: the text is empty, the position is outside it, or several positions are
            given without ``reduce="mean"``.
        OptionError: a chat is to have no special tokens.
    """
    reading = Reading(special_tokens=special_tokens, chat=chat)
    ids, tokens = read(tokenizer, text, reading)
    places = find(position, ids, tokenizer)
    if reduce == "none" and len(places) > 1:
        raise TransferError(
            f"{len(places)} positions have a modulation each; take one position or their mean"
        )
    converted = components(model)
    on = enabled_layers(converted)
    chosen = chosen_layers(layers, on, len(decoder_layers(model)))
    for layer in chosen:
        if layer not in on:
            raise ModelError(f"layer {layer} is not an NP layer that is on; on are {on}")
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
        decoder = unwrapped(model).get_decoder()
        # the decoder alone: no logits are needed
        decoder(input_ids=torch.tensor([ids], device=device), use_cache=False)
    if len(seen) < len(chosen):
        raise ModelError(
            "the layers are compiled, and torch.compile leaves hooks out; extract before compiling"
        )
    found = {}
    for layer in chosen:
        vectors = component_vectors(converted[layer], seen[layer])
        found[layer] = {name: Terms(*map(_mean, pair)) for name, pair in vectors.items()}
    origin = {
        "text": text,
        "tokens": tokens,
        "positions": places,
        **asdict(reading),
        "weights": {str(layer): digest(converted[layer]) for layer in chosen},
    }
    return Modulation(found, BaseModel.of(model, chosen), origin, vectors=True)


def _mean(vectors: Tensor) -> Tensor:
    """The mean over positions, ``(positions, k, width)`` -> ``(k, width)``, in float32 at least."""
    if len(vectors) == 1:
        return vectors[0]
    wide = torch.promote_types(vectors.dtype, torch.float32)
    return vectors.to(wide).mean(0).to(vectors.dtype)


def enabled_layers(converted: dict[int, NPComponent]) -> list[int]:
    """Indices of the layers that are on."""
    return [layer for layer, component in converted.items() if component.enabled]


def component_vectors(
    component: NPComponent, attention: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Form v_a and v_b of each projection for some tokens; see `projection_vectors`."""
    return {name: projection_vectors(component, name, attention) for name in component.projections}


def projection_vectors(
    component: NPComponent, projection: str, attention: Tensor
) -> tuple[Tensor, Tensor]:
    """Form v_a and v_b of one projection for some tokens (design.md#definition).

    Args:
        component: NP component of a layer, which changes the projection.
        projection: ``"gate"``, ``"up"`` or ``"down"``.
        attention: Attention outputs of the tokens, ``(n, D)``.

    Returns:
        Vectors ``(n, k, in)`` and ``(n, k, out)``, in the dtype of `attention`.
    """
    m, index = component.factors, component.projections.index(projection)
    size, k = component.rank * component.num_ranks, component.num_ranks
    w_down = m.w_down.narrow(1, index * size, size).to(attention.dtype)
    u = (attention @ w_down).unflatten(1, (k, -1))
    v_a, v_b = (
        torch.einsum("nkr,kri->nki", u, torch.unflatten(w.to(attention.dtype), 0, (k, -1)))
        for w in heads_of(m)[index]
    )
    return v_a, v_b


_digests: WeakKeyDictionary[NPComponent, tuple[tuple[Any, ...], str]] = WeakKeyDictionary()


def digest(component: NPComponent) -> str:
    """SHA-256 of a component's weights, cached until they change."""
    parameters = [*component.parameters(), *component.buffers()]
    # torch counts changes of a tensor in place, but those of fused optimizers and of `.data`
    versions = tuple((p.data_ptr(), p.dtype, p._version) for p in parameters)
    known = _digests.get(component)
    if known is None or known[0] != versions:
        found = hashlib.sha256()
        for parameter in parameters:
            found.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        known = _digests[component] = (versions, found.hexdigest())
    return known[1]
