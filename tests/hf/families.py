"""The definitions of decoder layers of other families, written out, and tiny models of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

import npt_fast as npt
from npt_fast.hf.convert import decoder_layers
from tests.hf.small_models import build
from tests.transfer.models import own_vectors, with_effect


class Family(NamedTuple):
    """What a layer of a family does (design.md#families).

    Attributes:
        attention: what attention adds, from the layer, its input and how it is called.
        reads: what the MLP reads of the residual stream.
        added: what the MLP's output adds, from the layer, the output, and the residual mode.
        weights: weights and biases of gate, up and down, or of up and down.
        activation: the MLP's activation.
        parallel: whether the base MLP reads the layer's input, without attention.
        after: what the layer makes of the residual stream at its end.
    """

    attention: Callable[[Any, Tensor, dict[str, Any]], Tensor]
    reads: Callable[[Any, Tensor], Tensor]
    added: Callable[[Any, Tensor, str], Tensor]
    weights: Callable[[Any], dict[str, tuple[Tensor, Tensor | None]]]
    activation: Callable[[Tensor], Tensor]
    parallel: bool = False
    after: Callable[[Any, Tensor, dict[str, Any]], Tensor] = lambda layer, state, call: state


def _three(mlp: Any) -> dict[str, tuple[Tensor, Tensor | None]]:
    names = ("gate", "up", "down")
    modules = [getattr(mlp, f"{name}_proj") for name in names]
    return {n: (m.weight, m.bias) for n, m in zip(names, modules, strict=True)}


def _joined(mlp: Any) -> dict[str, tuple[Tensor, Tensor | None]]:
    rows = mlp.gate_up_proj.weight.shape[0] // 2
    gate, up = mlp.gate_up_proj.weight[:rows], mlp.gate_up_proj.weight[rows:]
    return {"gate": (gate, None), "up": (up, None), "down": (mlp.down_proj.weight, None)}


def _two(up: str, down: str) -> Callable[[Any], dict[str, tuple[Tensor, Tensor | None]]]:
    """Weights of an MLP without a gate."""

    def weights(mlp: Any) -> dict[str, tuple[Tensor, Tensor | None]]:
        modules = {"up": getattr(mlp, up), "down": getattr(mlp, down)}
        return {name: (module.weight, module.bias) for name, module in modules.items()}

    return weights


def _gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def _tanh_gelu(x: Tensor) -> Tensor:
    inner = (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)
    return 0.5 * x * (1 + torch.tanh(inner))


def _silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def _linear_attention(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    out: Tensor = layer.linear_attn(
        hidden_states=layer.input_layernorm(h),
        cache_params=call["past_key_values"],
        attention_mask=call["attention_mask"],
    )
    return out


_LLAMA = Family(
    lambda layer, h, call: layer.self_attn(hidden_states=layer.input_layernorm(h), **call)[0],
    lambda layer, state: layer.post_attention_layernorm(state),
    lambda layer, y, residual: y,
    _three,
    _silu,
)
_GRANITE = _LLAMA._replace(
    attention=lambda layer, h, call: 0.22 * _LLAMA.attention(layer, h, call),
    added=lambda layer, y, residual: 0.22 * y,
)
_GEMMA = Family(
    lambda layer, h, call: layer.post_attention_layernorm(
        layer.self_attn(hidden_states=layer.input_layernorm(h), **call)[0]
    ),
    lambda layer, state: layer.pre_feedforward_layernorm(state),
    lambda layer, y, residual: layer.post_feedforward_layernorm(y) if residual == "kept" else y,
    _three,
    _tanh_gelu,
)
_GLM4 = Family(
    lambda layer, h, call: layer.post_self_attn_layernorm(
        layer.self_attn(hidden_states=layer.input_layernorm(h), **call)[0]
    ),
    lambda layer, state: layer.post_attention_layernorm(state),
    lambda layer, y, residual: layer.post_mlp_layernorm(y) if residual == "kept" else y,
    _joined,
    _silu,
)
_OLMO2 = Family(
    lambda layer, h, call: layer.post_attention_layernorm(
        layer.self_attn(hidden_states=h, **call)[0]
    ),
    lambda layer, state: state,
    lambda layer, y, residual: layer.post_feedforward_layernorm(y) if residual == "kept" else y,
    _three,
    _silu,
)
_COHERE = _LLAMA._replace(reads=lambda layer, state: layer.input_layernorm(state), parallel=True)
_PHI = _COHERE._replace(weights=_two("fc1", "fc2"), activation=_tanh_gelu)
_NEOX = Family(
    lambda layer, h, call: layer.attention(layer.input_layernorm(h), **call)[0],
    lambda layer, state: layer.post_attention_layernorm(state),
    lambda layer, y, residual: y,
    _two("dense_h_to_4h", "dense_4h_to_h"),
    _gelu,
)
_GPT2 = Family(
    lambda layer, h, call: layer.attn(layer.ln_1(h), attention_mask=call["attention_mask"])[0],
    lambda layer, state: layer.ln_2(state),
    lambda layer, y, residual: y,
    # Conv1D has the weight (in, out)
    lambda mlp: {
        "up": (mlp.c_fc.weight.t(), mlp.c_fc.bias),
        "down": (mlp.c_proj.weight.t(), mlp.c_proj.bias),
    },
    _tanh_gelu,
)
_GPTJ = _GPT2._replace(
    attention=lambda layer, h, call: layer.attn(layer.ln_1(h), **call)[0],
    reads=lambda layer, state: layer.ln_1(state),
    weights=_two("fc_in", "fc_out"),
    parallel=True,
)
_FALCON = _NEOX._replace(
    attention=lambda layer, h, call: layer.self_attention(layer.input_layernorm(h), **call)[0],
    reads=lambda layer, state: layer.input_layernorm(state),
    parallel=True,
)


def _per_layer(layer: Any, state: Tensor, call: dict[str, Any]) -> Tensor:
    """Gemma 4 reads each token id once more, and scales the whole residual stream."""
    gate = _tanh_gelu(layer.per_layer_input_gate(state)) * call["per_layer_input"]
    state = state + layer.post_per_layer_input_norm(layer.per_layer_projection(gate))
    return state * layer.layer_scalar


FAMILIES: dict[str, Family] = {
    "granite": _GRANITE,
    "minicpm3": _GRANITE._replace(
        attention=lambda layer, h, call: 0.7 * _LLAMA.attention(layer, h, call),
        added=lambda layer, y, residual: 0.7 * y,
    ),
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gemma4_text": _GEMMA._replace(
        attention=lambda layer, h, call: _GEMMA.attention(
            layer, h, {name: call[name] for name in call if name != "per_layer_input"}
        ),
        after=_per_layer,
    ),
    "glm4": _GLM4,
    "olmo2": _OLMO2,
    "olmo3": _OLMO2,
    "exaone4": _OLMO2,
    "cohere": _COHERE,
    "cohere2": _COHERE,
    "phi3": _LLAMA._replace(weights=_joined),
    "qwen3_5_text": _LLAMA._replace(attention=_linear_attention),
    "nemotron": _LLAMA._replace(
        weights=_two("up_proj", "down_proj"), activation=lambda x: x.clamp_min(0) ** 2
    ),
    "starcoder2": _LLAMA._replace(weights=_two("c_fc", "c_proj"), activation=_tanh_gelu),
    "phi": _PHI,
    "gpt2": _GPT2,
    "gpt_neo": _GPT2._replace(weights=_two("c_fc", "c_proj")),
    "gptj": _GPTJ,
    "gpt_neox": _NEOX._replace(parallel=True),
    "gpt_neox, one after the other": _NEOX,
    "falcon": _FALCON,
    "falcon, two norms": _FALCON._replace(
        attention=lambda layer, h, call: layer.self_attention(layer.ln_attn(h), **call)[0],
        reads=lambda layer, state: layer.ln_mlp(state),
    ),
    "falcon, one after the other": _FALCON._replace(reads=_NEOX.reads, parallel=False),
}
CHANGES: dict[str, dict[str, Any]] = {
    "gemma4_text": {"vocab_size_per_layer_input": 257},
    "gpt_neox, one after the other": {"use_parallel_residual": False},
    "falcon, two norms": {"new_decoder_architecture": True},
    "falcon, one after the other": {"parallel_attn": False},
}
"""Options of small models, also of families that have the type of another one."""


def base(model_type: str, dtype: torch.dtype = torch.float64) -> Any:
    """A random model of a family, whose norms are not 1."""
    options = {"vocab_size": 257, "max_position_embeddings": 256, **CHANGES.get(model_type, {})}
    model = build(model_type.partition(",")[0], **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.ndim == 1:
                tensor += 0.2 * torch.rand(tensor.shape, generator=generator)
            elif "embed" not in name:  # large enough for one token to affect the logits
                tensor.normal_(std=0.2, generator=generator)
        for name, tensor in model.named_buffers():
            if name.endswith("layer_scalar"):
                tensor.fill_(0.7)
    return model.to(dtype)


def converted(model_type: str, residual: Any, **options: Any) -> Any:
    """A model with NP layers 1 and 2 that have an effect, in float64."""
    model = base(model_type)
    given = {"layers": [1, 2], "rank": 3, "num_ranks": 2, **options}
    npt.convert(model, npt.NPTConfig(residual=residual, **given))
    return with_effect(model, 0.3, seed=2)


def definition(
    family: Family,
    layer: Any,
    h: Tensor,
    call: dict[str, Any],
    residual: str,
    given: dict[str, Tensor] | None = None,
) -> Tensor:
    """Output ``(tokens, D)`` of an NP layer for one row, with dense weights ``W + dW`` per token.

    Args:
        family: the family.
        layer: NP layer, of which only the base's parts and the factors are used.
        h: input ``(1, tokens, D)``.
        call: how the layer is called.
        residual: ``"removed"`` or ``"kept"``.
        given: dW of each projection, for all tokens; the token's own if not given.
    """
    attention = family.attention(layer, h, call)
    read = family.reads(layer, h)
    weights = family.weights(layer.mlp)
    rows = []
    for t in range(h.shape[1]):
        own = own_vectors(layer.np_component, attention[0, t : t + 1])

        def projected(name: str, a: Tensor, own: Any = own) -> Tensor:
            weight, bias = weights[name]
            change = own[name].dense() if given is None else given[name]
            return linear(a, weight + change, bias)

        x = read[0, t]
        inner = (
            family.activation(projected("gate", x)) * projected("up", x)
            if "gate" in weights
            else family.activation(projected("up", x))
        )
        rows.append(projected("down", inner))
    y = family.added(layer, torch.stack(rows)[None], residual)
    return family.after(layer, h + y + (attention if residual == "kept" else 0), call)[0]


def layer_of(model: Any, index: int) -> Any:
    return decoder_layers(model)[index]


def descend(step: npt.Distillation, ids: Tensor, *, lr: float, steps: int) -> list[float]:
    """The loss of each step of training on one text."""
    optimizer = torch.optim.AdamW(npt.trainable_parameters(step.model), lr=lr)
    losses = []
    for _ in range(steps):
        loss = step(ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
