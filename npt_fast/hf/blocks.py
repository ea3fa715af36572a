"""Decoder blocks as code: what attention and the MLP add to the residual stream.

An NP layer computes by the block of its base layer, so a layer that is none of these would be wrong
in silence. `probe` proves that a layer is one of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


class Block:
    """A decoder block: ``out = h + a + mlp(mlp_input(h + a))`` with ``a = attention(h)``.

    This one is Llama's: each part reads the residual stream through its norm, and its output is
    added as it is. A block of another kind is a subclass, and an entry of `BLOCKS`.

    Attributes:
        formula: the block, for messages.
        parts: submodules that the layer must have.
    """

    formula = "Llama's block, h + a + mlp(post_attention_layernorm(h + a))"
    parts: tuple[str, ...] = ("input_layernorm", "self_attn", "post_attention_layernorm", *_MLP)

    def attention(self, layer: Any, h: Tensor, call: Mapping[str, Any]) -> Tensor:
        """Attention's output, which the residual stream gets and NP components read.

        Args:
            layer: decoder layer.
            h: input of the layer, ``(B, S, D)``.
            call: keyword arguments that the model calls the layer with.

        Returns:
            ``(B, S, D)``.
        """
        output: Tensor
        output, _ = layer.self_attn(hidden_states=layer.input_layernorm(h), **call)
        return output

    def mlp_input(self, layer: Any, state: Tensor) -> Tensor:
        """What the MLP reads where the residual stream is `state`, ``(B, S, D)``."""
        read: Tensor = layer.post_attention_layernorm(state)
        return read


BLOCKS: tuple[Block, ...] = (Block(),)


def has_parts(layer: nn.Module, block: Block) -> bool:
    """Whether a layer has the parts of a block."""
    return not _missing(layer, block)


def obstacle(layer: nn.Module) -> str:
    """What a layer that has the parts of no block has in their place."""
    missing = _missing(layer, BLOCKS[0])
    parts = dict(layer.named_children())
    problems = []
    if "self_attn" in missing:
        others = [
            f"{name} ({type(part).__name__})"
            for name, part in parts.items()
            if name not in ("mlp", "feed_forward") and list(part.children())
        ]
        problems.append(f"no self_attn, but {', '.join(others) or 'no attention at all'}")
    routed = [part for part in parts.values() if hasattr(part, "experts")]
    if routed:
        problems.append(f"a mixture of experts as its MLP ({type(routed[0]).__name__})")
    elif absent := [part for part in missing if part in _MLP]:
        owner = parts.get("mlp", layer)
        problems.append(f"no {absent[0]} ({type(owner).__name__} has {_names(owner)})")
    elif absent := [part for part in missing if part != "self_attn"]:
        problems.append(f"no {absent[0]} ({type(layer).__name__} has {_names(layer)})")
    return f"has {' and '.join(problems)}"


def _missing(layer: nn.Module, block: Block) -> list[str]:
    names = {name for name, _ in layer.named_modules()}
    return [part for part in block.parts if part not in names]


def _names(module: nn.Module) -> str:
    return ", ".join(name for name, _ in module.named_children()) or "no parts"
