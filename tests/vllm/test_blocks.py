"""NP layers of vLLM's blocks that are not Llama's are as defined, in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu

from npt_fast.functional import modulated_mlp
from npt_fast.vllm.factors import ShardedFactors
from npt_fast.vllm.layer import AddingLayer, DeferringLayer, NPLayer, TransformersLayer
from tests.vllm.test_layer import CASES, D, Layer, Norm, component, make_np_layer, seeded

POSITIONS = torch.arange(5)
SCALE = 0.22


class ParallelNorm(Norm):
    """Cohere's, which adds nothing and returns a second thing that is no part of it."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        return super().forward(x), residual


def geglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return gelu(gate, approximate="tanh") * up


Modulated = Callable[[Tensor, Tensor], Tensor]  # of what attention adds, and the MLP's input
Definition = Callable[[Any, Tensor, Modulated, bool], Tensor]  # of the layer, its input, `kept`


def attention(layer: Any, read: Tensor) -> Tensor:
    found: Tensor = layer.self_attn(POSITIONS, read)
    return found


def sandwich(layer: Any, h: Tensor, modulated: Modulated, kept: bool) -> Tensor:
    """Gemma 2 and 3."""
    a = layer.post_attention_layernorm(attention(layer, layer.input_layernorm(h)))
    m = modulated(a, layer.pre_feedforward_layernorm(h))
    return h + a + layer.post_feedforward_layernorm(m) if kept else h + m


def glm(layer: Any, h: Tensor, modulated: Modulated, kept: bool) -> Tensor:
    a = layer.post_self_attn_layernorm(attention(layer, layer.input_layernorm(h)))
    m = modulated(a, layer.post_attention_layernorm(h))
    return h + a + layer.post_mlp_layernorm(m) if kept else h + m


def granite(layer: Any, h: Tensor, modulated: Modulated, kept: bool) -> Tensor:
    a = SCALE * attention(layer, layer.input_layernorm(h))
    m = SCALE * modulated(a, layer.post_attention_layernorm(h))
    return h + a + m if kept else h + m


def post_norm(layer: Any, h: Tensor, modulated: Modulated, kept: bool) -> Tensor:
    """Exaone 4, OLMo 2 and 3."""
    a = layer.post_attention_layernorm(attention(layer, h))
    m = modulated(a, h)
    return h + a + layer.post_feedforward_layernorm(m) if kept else h + m


def cohere(layer: Any, h: Tensor, modulated: Modulated, kept: bool) -> Tensor:
    read, _ = layer.input_layernorm(h)
    a = attention(layer, read)
    m = modulated(a, read)
    return h + a + m if kept else h + m


class Family(NamedTuple):
    """A block of vLLM's.

    Attributes:
        definition: what an NP layer of it returns.
        norms: names of its norms.
        norm: their class.
        own: how it gets and returns the residual stream.
        geglu: whether its activation is gelu.
        scale: whether it scales what it adds.
    """

    definition: Definition
    norms: tuple[str, ...]
    norm: type[Norm] = Norm
    own: type[NPLayer] = AddingLayer
    geglu: bool = False
    scale: bool = False


_PRE, _POST = "input_layernorm", "post_attention_layernorm"
FAMILIES = {
    "gemma": Family(
        sandwich,
        (_PRE, _POST, "pre_feedforward_layernorm", "post_feedforward_layernorm"),
        own=DeferringLayer,
        geglu=True,
    ),
    "glm": Family(
        glm,
        (_PRE, _POST, "post_self_attn_layernorm", "post_mlp_layernorm"),
        own=DeferringLayer,
    ),
    "granite": Family(granite, (_PRE, _POST), scale=True),
    "exaone": Family(post_norm, (_POST, "post_feedforward_layernorm")),
    "olmo": Family(post_norm, (_POST, "post_feedforward_layernorm"), own=TransformersLayer),
    "cohere": Family(cohere, (_PRE,), ParallelNorm),
}


def build(family: Family) -> Any:
    layer: Any = Layer(0, 1)
    del layer.input_layernorm, layer.post_attention_layernorm
    for number, name in enumerate(family.norms):
        weight = torch.rand(D, dtype=torch.float64, generator=seeded(20 + number))
        setattr(layer, name, family.norm(weight))
    if family.geglu:
        layer.mlp.act_fn = geglu
    if family.scale:
        layer.residual_multiplier = SCALE
    return layer


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("modulation", "residual"), CASES)
@torch.no_grad()
def test_a_layer_is_as_defined(name: str, modulation: str, residual: str) -> None:
    family = FAMILIES[name]
    layer, part = build(family), component(modulation, residual)
    gate, up = layer.mlp.gate_up_proj.weight.chunk(2)
    modulated = partial(
        modulated_mlp, gate_weight=gate, up_weight=up, down_weight=layer.mlp.down_proj.weight,
        factors=part.factors, impl="reference",
        activation="gelu_pytorch_tanh" if family.geglu else "silu",
    )  # fmt: skip
    states, before = torch.randn(2, 5, D, dtype=torch.float64, generator=seeded(4))
    h = states + before if family.own is DeferringLayer else states
    expected = family.definition(layer, h, modulated, residual == "kept")

    layer.np_factors = ShardedFactors(part, device="cpu", dtype=torch.float64)
    make_np_layer(layer, family.own)
    if family.own is DeferringLayer:
        added, stream = layer(POSITIONS, states, before)
        torch.testing.assert_close(stream, h, rtol=0, atol=0)
        found = added + stream
    elif family.own is AddingLayer:  # Granite's layers get and return the residual stream alone
        found, _ = layer(POSITIONS, states, before)
        assert torch.equal(layer(POSITIONS, states), found)
    else:
        found = layer(states[None], positions=POSITIONS)[0]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
