"""Tiny models with NP layers, and the definition of an injection with dense weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, silu
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

import npt_fast as npt
from npt_fast.hf.convert import components, decoder_layers
from npt_fast.transfer.base_model import BaseModel
from npt_fast.transfer.modulation import Modulation
from npt_fast.transfer.terms import Terms
from tests.training import tiny

FAMILIES: dict[str, Any] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
PROJECTIONS = ("gate", "up", "down")
TEXT, SOURCE = "the red house", "a blue boat on the lake"
tokenizer: PreTrainedTokenizerFast = tiny.tokenizer()  # one token per byte
bos_tokenizer: PreTrainedTokenizerFast = tiny.bos_tokenizer()  # and BOS in front of each text


def base(family: str = "llama", **changes: Any) -> Any:
    """A random base model of 4 layers in float64; the same every time."""
    options = {
        "vocab_size": 257,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
        "initializer_range": 0.2,  # large enough for one token to affect the logits
        **changes,
    }
    auto: Any = AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return auto.from_config(FAMILIES[family](**options)).double().eval()


def converted(
    family: str = "llama",
    *,
    layers: Sequence[int] = (1, 2),
    num_ranks: int = 2,
    vocab_size: int = 257,
    **options: Any,
) -> Any:
    """A base model with NP layers that have an effect, in float64; 258 tokens for BOS."""
    model = base(family, vocab_size=vocab_size)
    npt.convert(model, npt.NPTConfig(layers=layers, rank=3, num_ranks=num_ranks, **options))
    return with_effect(model, 0.4)


def with_effect(model: Any, scale: float, seed: int = 1) -> Any:
    """The model in float64, with random parameters in its NP layers, of this standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in components(model).values():
            for parameter in part.parameters():
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model.double()


def terms(model: Any) -> int:
    """Number of terms in the sums, one after another, between a token and its logits."""
    c = model.config
    layer = 3 * c.hidden_size + c.intermediate_size  # q, k, v; o; gate and up; then down
    return int(c.num_hidden_layers * layer + c.hidden_size)


def ids_of(text: str) -> Tensor:
    """Token ids of a text, ``(1, tokens)``."""
    return torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])


def left_padded(texts: Sequence[str]) -> dict[str, Tensor]:
    """Ids and mask of a batch, padded on the left."""
    rows = [ids_of(text)[0] for text in texts]
    width = max(map(len, rows))
    pad = [width - len(row) for row in rows]
    ids = [torch.cat([row.new_zeros(n), row]) for n, row in zip(pad, rows, strict=True)]
    mask = torch.arange(width) >= torch.tensor(pad)[:, None]
    return {"input_ids": torch.stack(ids), "attention_mask": mask.long()}


@torch.no_grad()
def logits(model: Any, ids: Tensor, **options: Any) -> Tensor:
    """Logits ``(batch, tokens, vocab)``, without a cache."""
    out: Tensor = model(ids, use_cache=False, **options).logits
    return out


def greedy(model: Any, inputs: dict[str, Tensor], tokens: int = 8, **options: Any) -> Any:
    """New tokens ``(batch, tokens)`` and the logits they were chosen from, in float32."""
    out = model.generate(
        **inputs,
        max_new_tokens=tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, 1)


def random_modulation(
    seed: int = 0,
    *,
    layers: Sequence[int] = (1, 2),
    projections: Sequence[str] = PROJECTIONS,
    terms: int = 2,
    sizes: tuple[int, int] = (32, 48),
) -> Modulation:
    """Random terms in float64, for the models of `base`."""
    generator = torch.Generator().manual_seed(seed)
    d, f = sizes

    def drawn(width: int) -> Tensor:
        return torch.randn((terms, width), generator=generator, dtype=torch.float64) / 4

    widths = {"gate": (d, f), "up": (d, f), "down": (f, d)}
    found = {
        layer: {name: Terms(*(drawn(width) for width in widths[name])) for name in projections}
        for layer in layers
    }
    return Modulation(found, BaseModel("", d, f, 4, 257), {"text": f"seed {seed}"})


def tensors_of(m: Modulation) -> dict[tuple[int, str, int], Tensor]:
    """Tensors by layer, projection, and 0 for v_a or 1 for v_b."""
    return {(layer, p, i): v for layer, p, terms in m.walk() for i, v in enumerate(terms)}


def assert_same(actual: Modulation, expected: Modulation) -> None:
    """Assert that all fields are equal, tensors bit for bit."""
    assert (actual.base, actual.vectors) == (expected.base, expected.vectors)
    assert actual.origin == expected.origin and actual.description == expected.description
    found, wanted = tensors_of(actual), tensors_of(expected)
    assert list(found) == list(wanted)
    for key, v in wanted.items():
        assert found[key].dtype == v.dtype and found[key].shape == v.shape
        assert torch.equal(found[key].view(torch.uint8), v.contiguous().view(torch.uint8))


def nested(depth: int) -> dict[str, Any]:
    """An origin of this many nested mappings."""
    found: dict[str, Any] = {}
    for _ in range(depth - 1):
        found = {"of": found}
    return found


def hooks(model: Any) -> int:
    """Number of hooks on all modules of a model."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


class Vectors(NamedTuple):
    """v_a and v_b of one projection at some tokens, ``(tokens, k, width)``."""

    v_a: Tensor
    v_b: Tensor

    def dense(self) -> Tensor:
        """dW of the first token, one outer product after the other."""
        changes = [
            torch.outer(b, a)
            for a, b in zip(self.v_a[0].unbind(), self.v_b[0].unbind(), strict=True)
        ]
        return torch.stack(changes).sum(0)


@torch.no_grad()
def own_vectors(part: Any, attention: Tensor) -> dict[str, Vectors]:
    """Vectors at attention outputs ``(tokens, D)``, one by one (design.md#definition)."""
    state = part.split()
    names = {"gate": ["_gate", ""], "up": ["_up"], "down": ["_down"]}

    def factor(stem: str, names: Sequence[str], i: int) -> Tensor | None:
        keys = [f"{stem}{name}{suffix}" for name in names for suffix in (f".{i}", "")]
        return next((state[key].to(attention.dtype) for key in keys if key in state), None)

    found = {}
    for projection, suffixes in names.items():
        pairs = []
        for i in range(part.num_ranks):
            factors = [factor(stem, suffixes, i) for stem in ("W_down", "W_a_up", "W_b_up")]
            w_down, w_a, w_b = factors
            if w_down is not None and w_a is not None and w_b is not None:
                z = attention @ w_down
                pairs.append((z @ w_a, z @ w_b))
        if pairs:
            found[projection] = Vectors(*(torch.stack(v, 1) for v in zip(*pairs, strict=True)))
    return found


def attention_outputs(model: Any, text: str, layers: Sequence[int]) -> dict[int, Tensor]:
    """Attention outputs ``(tokens, D)`` by layer."""
    seen: dict[int, Tensor] = {}
    handles = []
    for layer in layers:

        def keep(_: Any, __: Any, out: Any, layer: int = layer) -> None:
            seen[layer] = out[0][0]

        attention = decoder_layers(model)[layer].get_submodule("self_attn")
        handles.append(attention.register_forward_hook(keep))
    logits(model, ids_of(text))
    for handle in handles:
        handle.remove()
    return seen


# dW of (layer, row, token, projection), given the token's own vectors; None: the own dW
Rule = Callable[[int, int, int, str, Vectors | None], Tensor | None]


@contextmanager
def spelled_out(model: Any, rule: Rule) -> Iterator[None]:
    """Within the context, NP layers use dense weights W + dW for each token; `rule` gives dW.

    The layers' own results are discarded, so no code under test takes part.
    """

    def hook(index: int) -> Callable[..., Tensor]:
        def forward(layer: Any, args: Any, kwargs: Any, _: Any) -> Tensor:
            h = args[0]
            attention, _ = layer.self_attn(hidden_states=layer.input_layernorm(h), **kwargs)
            normed = layer.post_attention_layernorm(h)
            rows = [
                torch.stack([token(row, t) for t in range(h.shape[1])])
                for row in range(len(h))
                for token in [tokenwise(layer, attention, normed)]
            ]
            out: Tensor = h + torch.stack(rows)
            return out + attention if layer.np_component.residual == "kept" else out

        def tokenwise(layer: Any, attention: Tensor, normed: Tensor) -> Callable[..., Tensor]:
            def token(row: int, t: int) -> Tensor:
                own = own_vectors(layer.np_component, attention[row, t : t + 1])

                def projected(a: Tensor, name: str) -> Tensor:
                    module = layer.mlp.get_submodule(f"{name}_proj")
                    change = rule(index, row, t, name, own.get(name))
                    if change is None and name in own:
                        change = own[name].dense()
                    weight = module.weight if change is None else module.weight + change
                    return linear(a, weight, module.bias)

                x = normed[row, t]
                return projected(silu(projected(x, "gate")) * projected(x, "up"), "down")

            return token

        return forward

    with ExitStack() as stack:
        for index in components(model):
            layer = decoder_layers(model)[index]
            handle = layer.register_forward_hook(hook(index), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def mixed(mode: str, strength: float, source: Terms, own: Vectors | None) -> Tensor:
    """dW of a token in each mode, from the definition."""
    s = strength
    given = Vectors(source.v_a[None], source.v_b[None])
    if mode == "replace":
        return s * given.dense()
    if mode in ("blend", "add"):
        assert own is not None
        keep = 1 - s if mode == "blend" else 1.0
        return Vectors(
            *(keep * v + s * w for v, w in zip(own, given, strict=True)),
        ).dense()
    keep = 1 - s if mode == "exact-blend" else 1.0
    return s * given.dense() + (0 if own is None else keep * own.dense())
