"""What a training step asks of an NP layer, and what the layer returns then."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from npt_fast.functional import VectorNorms


class VirtualTokens(NamedTuple):
    """Tokens of no text, for a training step: any hidden state with any attention output.

    Attributes:
        hidden: hidden states before the layer, ``(B, V, D)``.
        attention: attention outputs, ``(B, V, D)``.
    """

    hidden: Tensor
    attention: Tensor


class Scaffold(NamedTuple):
    """Options of a training step for one NP layer: other inputs than its own, and more outputs.

    A layer that is called with ``scaffold=`` returns `Parts`. All use of the layer's weights is
    within this one call, while FSDP has them gathered.

    Attributes:
        attention_input: hidden states for attention, ``(..., D)``; None for the layer's input.
        attention: what attention adds, ``(..., D)``, if it is already known; else None.
        norms: whether to measure norms of v_a and v_b, without gradients.
        squares: weights of the tokens in a sum of mean squares of v_a and v_b, ``(...)``; None
            for no sum.
        virtual: more tokens for the MLPs, modulated and base; None for no more.
        state: residual stream that the parts are added to for the layer's output, ``(..., D)``;
            None for no output.
    """

    attention_input: Tensor | None = None
    attention: Tensor | None = None
    norms: bool = False
    squares: Tensor | None = None
    virtual: VirtualTokens | None = None
    state: Tensor | None = None


class Parts(NamedTuple):
    """The parts of an NP layer's output.

    Attributes:
        attention: what attention adds to the residual stream, ``(..., D)``.
        mlp: what the modulated MLP adds, ``(..., D)``.
        norms: norms of v_a and v_b, without gradients; None unless asked for.
        squares: sum over tokens of the mean squares of v_a and v_b; None unless asked for.
        virtual: what the modulated MLP adds for the virtual tokens, ``(B, V, D)``; None without.
        virtual_base: what the base MLP adds for them, without gradients, ``(B, V, D)``.
        output: output of the layer, ``(..., D)``; None unless asked for.
    """

    attention: Tensor
    mlp: Tensor
    norms: VectorNorms | None = None
    squares: Tensor | None = None
    virtual: Tensor | None = None
    virtual_base: Tensor | None = None
    output: Tensor | None = None
