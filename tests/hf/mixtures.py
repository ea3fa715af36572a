"""Small mixtures of experts in float64, and their layers written out with dense weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

import npt_fast as npt
from npt_fast.hf.convert import decoder_layers
from tests.hf.small_models import build
from tests.hf.survey import perturb
from tests.transfer.models import Vectors, own_vectors, with_effect

FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")
IDS = torch.tensor([[3, 14, 15, 92, 6, 5, 35, 89], [2, 7, 18, 28, 18, 28, 45, 90]])
LAYERS = (1, 2)


def base(family: str, **changes: Any) -> Any:
    """A random model of 4 layers, D = 32 and 4 experts, of which a token has 2."""
    model = build(family, initializer_range=0.2, **changes).double()
    model.set_experts_implementation("eager")  # the others lack float64
    perturb(model)
    return model


def converted(family: str, layers: Sequence[int] = LAYERS, **options: Any) -> Any:
    """The same with NP layers that have an effect."""
    model = base(family)
    npt.convert(model, npt.NPTConfig(layers=layers, rank=3, num_ranks=2, **options))
    return with_effect(model, 0.15)


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS, **options: Any) -> Tensor:
    """Logits ``(batch, tokens, vocab)``, without a cache."""
    out: Tensor = model(ids, use_cache=False, **options).logits
    return out


def _softmax_first(mlp: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mixtral's router and Qwen3's: the largest probabilities, which are float32."""
    weights, index = (mlp.gate.weight @ x).float().softmax(-1).topk(2)
    if getattr(mlp.gate, "norm_topk_prob", True):
        weights = weights / weights.sum()
    return weights, index


def _softmax_last(mlp: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """GPT-OSS: probabilities among the largest."""
    scores, index = (mlp.router.weight @ x + mlp.router.bias).topk(2)
    return scores.softmax(-1), index


def _sigmoid(mlp: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """DeepSeek: a bias has a part in the choice alone; the router computes in float32."""
    scores = (mlp.gate.weight.float() @ x.float()).sigmoid()
    index = (scores + mlp.gate.e_score_correction_bias).topk(2).indices
    weights = scores[index] / scores[index].sum() * mlp.gate.routed_scaling_factor
    return weights.to(x.dtype), index


ROUTERS: dict[str, Callable[[Any, Tensor], tuple[Tensor, Tensor]]] = {
    "mixtral": _softmax_first,
    "qwen3_moe": _softmax_first,
    "gpt_oss": _softmax_last,
    "deepseek_v3": _sigmoid,
}


def expert(family: str, mlp: Any, e: int) -> Callable[[Tensor, dict[str, Any]], Tensor]:
    """A function of a token ``(D,)`` and dense dW: one routed expert."""
    both, down = mlp.experts.gate_up_proj[e], mlp.experts.down_proj[e]
    biases = [torch.zeros((), dtype=both.dtype)] * 3
    if family == "gpt_oss":  # transposed, gate and up in turn, with biases
        gate, up, down = both[:, ::2].T, both[:, 1::2].T, down.T
        of_both, of_down = mlp.experts.gate_up_proj_bias[e], mlp.experts.down_proj_bias[e]
        biases = [of_both[::2], of_both[1::2], of_down]
    else:
        gate, up = both[: len(both) // 2], both[len(both) // 2 :]

    def clamped(g: Tensor, u: Tensor) -> Tensor:
        g, u = g.clamp(max=7.0), u.clamp(-7.0, 7.0)
        return (u + 1) * g * torch.sigmoid(1.702 * g)

    def apply(x: Tensor, change: dict[str, Any]) -> Tensor:
        g = (gate + change.get("gate", 0)) @ x + biases[0]
        u = (up + change.get("up", 0)) @ x + biases[1]
        inner = clamped(g, u) if family == "gpt_oss" else silu(g) * u
        return (down + change.get("down", 0)) @ inner + biases[2]

    return apply


def token(family: str, mlp: Any, x: Tensor, routed_by: Tensor, own: dict[str, Vectors]) -> Tensor:
    """Output of a mixture for one token, whose experts read `x` and have weights W + dW."""
    change = {name: vectors.dense() for name, vectors in own.items()}
    y = torch.zeros_like(x)
    if family == "deepseek_v3":  # whose shared expert changes
        shared = mlp.shared_experts
        gate, up, down = (
            getattr(shared, f"{name}_proj").weight + change.get(name, 0)
            for name in ("gate", "up", "down")
        )
        y = down @ (silu(gate @ x) * (up @ x))
        change = {}
    weights, index = ROUTERS[family](mlp, routed_by)
    for weight, e in zip(weights, index.tolist(), strict=True):
        y = y + weight * expert(family, mlp, e)(x, change)
    return y


@torch.no_grad()
def layer_output(family: str, layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    """An NP layer's output, ``(B, S, D)`` (design.md#mixtures-of-experts)."""
    a = layer.self_attn(hidden_states=layer.input_layernorm(h), **call)[0]
    read, routed_by = (layer.post_attention_layernorm(state) for state in (h, h + a))
    rows = [
        token(
            family,
            layer.mlp,
            read[b, t],
            routed_by[b, t],
            own_vectors(layer.np_component, a[b, t : t + 1]),
        )
        for b in range(h.shape[0])
        for t in range(h.shape[1])
    ]
    out = h + torch.stack(rows).view_as(h)
    return out + a if layer.np_component.residual == "kept" else out


def one_pass(model: Any, index: int) -> dict[str, Any]:
    """Input (h, kwargs) and output (out) of a layer in one forward pass."""
    seen: dict[str, Any] = {}
    handle = decoder_layers(model)[index].register_forward_hook(
        lambda module, args, kwargs, out: seen.update(h=args[0], kwargs=kwargs, out=out),
        with_kwargs=True,
    )
    logits(model)
    handle.remove()
    return seen
