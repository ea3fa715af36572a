"""Find out by a probe whether NP layers keep attention in the residual stream (design.md#layer)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor

from npt_fast.config import Residual
from npt_fast.hf.convert import decoder_layers, disabled
from npt_fast.hf.scaffold import Scaffold
from npt_fast.hf.wrappers import unwrapped

_WINDOWS, _TOKENS = 4, 64
# of beta / alpha; what is between them is weak evidence (design.md#residual-probe)
_KEPT, _REMOVED = 0.15, 0.5


class _Seen(NamedTuple):
    """What a base layer computes, each ``(windows, tokens, D)``."""

    hidden: Tensor
    attention: Tensor
    mlp: Tensor


@torch.no_grad()
def probe_residuals(model: Any, layers: Sequence[int]) -> dict[int, Residual | None]:
    """What the training of NP layers aimed at, on random tokens.

    Training moves the MLP's output by ``y - y0``, from the base MLP's without attention towards
    the layer's target: ``m - y0`` if it keeps attention ``a``, ``a + m - y0`` if not, where ``m``
    is the base layer's MLP output. So ``y - y0`` is fitted by ``alpha (m - y0) + beta a``. Soon
    beta / alpha is about 0 if the layer keeps attention, and 1 if not.

    Args:
        model: model with these NP layers.
        layers: indices of the layers.

    Returns:
        ``"removed"``, ``"kept"``, or None where the evidence is weak, by layer.
    """
    seen = _base_activations(model, layers)
    return {layer: _judged(model, layer, seen[layer]) for layer in layers}


def _base_activations(model: Any, layers: Sequence[int]) -> dict[int, _Seen]:
    decoder = unwrapped(unwrapped(model).get_decoder())
    words = decoder.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(len(words), (_WINDOWS, _TOKENS), generator=generator)
    found: dict[int, dict[str, Tensor]] = {layer: {} for layer in layers}
    with disabled(model), ExitStack() as stack:
        for index in layers:
            layer = unwrapped(decoder_layers(model)[index])

            def hidden(_: Any, args: Any, kwargs: Any, index: int = index) -> None:
                found[index]["hidden"] = args[0] if args else kwargs["hidden_states"]

            def attention(added: Tensor, index: int = index) -> None:
                found[index]["attention"] = added

            def mlp(added: Tensor, index: int = index) -> None:
                found[index]["mlp"] = added

            for hook in (
                layer.register_forward_pre_hook(hidden, with_kwargs=True),
                *layer.np_block.register_hooks(layer, attention, mlp),
            ):
                stack.callback(hook.remove)
        decoder(input_ids=ids.to(words.device), use_cache=False)
    return {layer: _Seen(**parts) for layer, parts in found.items()}


def _judged(model: Any, index: int, seen: _Seen) -> Residual | None:
    outer = decoder_layers(model)[index]
    layer = unwrapped(outer)
    block = layer.np_block
    mlp = getattr(layer, block.mlp)
    start = block.mlp_added(layer, mlp(block.mlp_input(layer, seen.hidden)))
    y = outer(seen.hidden, scaffold=Scaffold(attention=seen.attention)).mlp
    return judge(start, y, seen.attention, seen.mlp)


def judge(start: Tensor, y: Tensor, attention: Tensor, mlp: Tensor) -> Residual | None:
    """What training aimed at; None where the evidence is weak. All are ``(windows, tokens, D)``.

    Args:
        start: output of the base MLP that reads the residual stream without attention.
        y: output of the modulated MLP.
        attention: attention output.
        mlp: output of the base MLP that reads the residual stream with attention.
    """
    start, y, attention, mlp = (part.double() for part in (start, y, attention, mlp))
    change, aims = y - start, torch.stack([mlp - start, attention], -1)
    # each token counts the same: its change grows with the square of its attention output
    size = torch.stack([start, change, attention + mlp]).norm(dim=(0, -1)).clamp_min(1e-30)
    # without the first token, an attention sink
    change = (change / size[..., None])[:, 1:].flatten(1)
    aims = (aims / size[..., None, None])[:, 1:].flatten(1, 2)
    if not (change.isfinite().all() and aims.isfinite().all()):
        return None
    fits = torch.linalg.lstsq(aims, change[..., None]).solution
    explained = (aims @ fits).square().sum() / change.square().sum()
    # two directions explain 2 / D of a random change
    if not explained > 8 / start.shape[-1]:
        return None
    verdicts = {_verdict(*fit) for fit in fits[..., 0].tolist()}
    return verdicts.pop() if len(verdicts) == 1 else None


def _verdict(alpha: float, beta: float) -> Residual | None:
    if alpha <= 0:
        return None
    if abs(beta) < _KEPT * alpha:
        return "kept"
    return "removed" if beta > _REMOVED * alpha else None
