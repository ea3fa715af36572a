"""The probe finds whatever a layer does otherwise than its block, and leaves no trace."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GraniteConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import npt_fast as npt
from npt_fast.hf.convert import decoder_layers
from tests.hf.test_convert import logits, tiny

CONFIG = npt.NPTConfig(layers=[1], rank=2)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
Forward = Callable[..., Any]


def sequential(
    layer: Any,
    h: Tensor,
    call: dict[str, Any],
    *,
    attention: Callable[[Any, Tensor], Tensor] = lambda layer, a: a,
    mlp: Callable[[Any, Tensor], Tensor] = lambda layer, m: m,
) -> Tensor:
    """Llama's block with something behind its parts."""
    a, _ = layer.self_attn(hidden_states=layer.input_layernorm(h), **call)
    h = h + attention(layer, a)
    return h + mlp(layer, layer.mlp(layer.post_attention_layernorm(h)))


def parallel(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    a, _ = layer.self_attn(hidden_states=layer.input_layernorm(h), **call)
    return h + a + layer.mlp(layer.post_attention_layernorm(h))


def unnormed(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    a, _ = layer.self_attn(hidden_states=h, **call)
    h = h + a
    return h + layer.mlp(layer.post_attention_layernorm(h))


def swapped(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    """Norms that a fresh model's weights of 1 make equal."""
    a, _ = layer.self_attn(hidden_states=layer.post_attention_layernorm(h), **call)
    h = h + a
    return h + layer.mlp(layer.input_layernorm(h))


FAULTS: dict[str, tuple[Forward, str]] = {
    "attention scaled": (
        lambda *args: sequential(*args, attention=lambda _, a: 0.22 * a),
        "scales attention's output by 0.22 before",
    ),
    "MLP scaled": (
        lambda *args: sequential(*args, mlp=lambda _, m: -2 * m),
        "scales the MLP's output by -2 before",
    ),
    "a learned scale at 1": (
        lambda *args: sequential(*args, mlp=lambda layer, m: layer.scale * m),
        "scales the MLP's output by .* before",
    ),
    "a norm behind attention": (
        lambda *args: sequential(*args, attention=lambda layer, a: layer.extra_norm(a)),
        r"does not read post_attention_layernorm\(h \+ a\) \(the layer also has .*extra_norm",
    ),
    "a norm behind the MLP": (
        lambda *args: sequential(*args, mlp=lambda layer, m: layer.extra_norm(m)),
        r"does not add its MLP's output .* \(the layer also has .*extra_norm",
    ),
    "side by side": (parallel, "runs attention and MLP side by side"),
    "no norm before attention": (unnormed, r"has an attention that does not read input_layernorm"),
    "norms swapped": (swapped, r"has an attention that does not read input_layernorm"),
    "more outputs": (lambda *args: (sequential(*args), None), "returns a tuple"),
    "no attention": (
        lambda layer, h, call: h + layer.mlp(layer.post_attention_layernorm(h)),
        "does not call its self_attn",
    ),
    "no MLP": (
        lambda layer, h, call: h + layer.self_attn(layer.input_layernorm(h), **call)[0],
        "does not call its mlp",
    ),
}


def faulty(forward: Forward, dtype: torch.dtype = torch.float32) -> Any:
    """A model whose layer 1 has a fault, and parts that a fresh model leaves at 1."""
    model = tiny()
    layer = decoder_layers(model)[1]
    layer.extra_norm, layer.scale = LlamaRMSNorm(32), nn.Parameter(torch.ones(()))
    own = lambda self, hidden_states, **call: forward(self, hidden_states, call)  # noqa: E731
    layer.__class__ = type("Faulty", (type(layer),), {"forward": own})
    return model.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FAULTS)
def test_what_differs_is_named(name: str, dtype: torch.dtype) -> None:
    forward, words = FAULTS[name]
    model = faulty(forward, dtype)
    with pytest.raises(npt.ModelError, match=rf"layer 1 \(Faulty\) .*{words}") as caught:
        npt.convert(model, CONFIG)
    assert str(caught.value).endswith("layers that can be converted: [0, 2, 3]")
    assert "\n" not in str(caught.value)
    assert not npt.status(model)
    assert [index for index, line in npt.supported_layers(model).items() if line] == [1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_layer_without_fault(dtype: torch.dtype) -> None:
    model = faulty(lambda *args: sequential(*args), dtype)
    assert not any(npt.supported_layers(model).values())
    assert npt.status(npt.convert(model, CONFIG))


def test_without_the_probe() -> None:
    forward, _ = FAULTS["attention scaled"]
    assert npt.status(npt.convert(faulty(forward), CONFIG, probe=False))


class Clamped(nn.Module):
    """An MLP with Llama's parts and a formula of its own."""

    def __init__(self, mlp: Any, form: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.act_fn, self.form = mlp.act_fn, form

    def forward(self, x: Tensor) -> Tensor:
        return self.form(self, x)


@pytest.mark.parametrize(
    "form",
    [
        lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x)).clamp(max=1) * m.up_proj(x)),
        lambda m, x: m.down_proj(m.act_fn(m.up_proj(x)) * m.gate_proj(x)),
        lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x)) * (m.up_proj(x) + 1)),
        lambda m, x: 2 * m.down_proj(m.act_fn(m.gate_proj(x)) * m.up_proj(x)),
    ],
    ids=["clamped", "gate and up swapped", "one added", "doubled"],
)
def test_an_mlp_of_another_form(form: Callable[[Any, Tensor], Tensor]) -> None:
    model = tiny()
    layer = decoder_layers(model)[1]
    layer.mlp = Clamped(layer.mlp, form)
    with pytest.raises(npt.ModelError, match=r"has an MLP \(Clamped\) that does not compute"):
        npt.convert(model, CONFIG, probe=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_pytorch_tanh", "relu"])
def test_activations_are_told_apart(name: str, dtype: torch.dtype) -> None:
    model = tiny(hidden_act=name).to(dtype)
    model.config.hidden_act = "silu"  # what a config says does not count
    npt.convert(model, CONFIG)
    assert decoder_layers(model)[1].np_component.activation == name


def test_weights_of_zero_hide_nothing() -> None:
    model = tiny(hidden_act="gelu")
    with torch.no_grad():
        for name in ("mlp.gate_proj", "mlp.up_proj", "self_attn.o_proj"):
            decoder_layers(model)[1].get_submodule(name).weight.zero_()
    npt.convert(model, CONFIG)
    assert decoder_layers(model)[1].np_component.activation == "gelu"
    scaled = faulty(FAULTS["MLP scaled"][0])
    with torch.no_grad():
        decoder_layers(scaled)[1].self_attn.o_proj.weight.zero_()
    with pytest.raises(npt.ModelError, match="scales the MLP's output by -2"):
        npt.convert(scaled, CONFIG)


def test_layers_of_one_class_are_told_apart() -> None:
    """By what they were told when they were made, by their sizes and by where they are."""
    model = AutoModelForCausalLM.from_config(
        GraniteConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2,
        )
    )  # fmt: skip
    layers = decoder_layers(model)
    layers[1].residual_multiplier = "0.5"
    layers[2].mlp = type(layers[2].mlp)(GraniteConfig(hidden_size=32, intermediate_size=40))
    layers[3].to("meta")
    found = npt.supported_layers(model)
    assert [found[0], found[2], found[3]] == [
        None, None, "is offloaded; NP layers must be on a device"
    ]  # fmt: skip
    assert found[1] is not None and found[1].startswith("cannot be run by itself: TypeError")
    npt.convert(model, npt.NPTConfig(layers=[0, 2], rank=2))
    assert [s.architecture.intermediate_size for s in npt.status(model)] == [48, 40]


def state(model: nn.Module) -> list[Any]:
    """Everything of a model that the probe touches for the time being."""
    found: list[Any] = [torch.is_grad_enabled(), torch.get_rng_state().tolist()]
    for part in model.modules():
        found += [part.training, *(id(t) for t in part.parameters()), *part._modules.items()]
        found += [dict(part._forward_hooks), dict(part._forward_pre_hooks)]
        found += [id(part._forward_hooks), *(id(t) for t in part.buffers())]
    return found


def doubled(mlp: Any, x: Tensor) -> Tensor:
    return 2 * type(mlp).forward(mlp, x)


@pytest.mark.parametrize("bind", [MethodType, partial])
def test_layers_with_forwards_of_their_own_are_told_apart(bind: Callable[..., Any]) -> None:
    model = tiny()
    mlp = decoder_layers(model)[1].mlp
    mlp.forward = bind(doubled, mlp)
    found = npt.supported_layers(model)
    assert [index for index, problem in found.items() if problem] == [1]


def test_a_compiled_activation() -> None:
    model = tiny()
    mlp = decoder_layers(model)[1].mlp
    mlp.act_fn = torch.compile(mlp.act_fn, backend="eager")
    assert npt.supported_layers(model, [1]) == {1: None}


@pytest.mark.parametrize("fails", [False, True], ids=["right", "fails"])
def test_the_model_stays_as_it_is(fails: bool) -> None:
    def broken(*_: Any) -> Tensor:
        raise ZeroDivisionError

    model = faulty(broken if fails else sequential).train()
    calls: list[str] = []
    for part in model.modules():
        part.register_forward_hook(lambda *_: calls.append("called"))
    model.model.layers[0].mlp.eval()
    before, weights = state(model), copy.deepcopy(model.state_dict())
    line = npt.supported_layers(model)[1]
    assert (line or "").startswith("cannot be run by itself: ZeroDivisionError") is fails
    assert state(model) == before
    assert not calls
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_what_rotary_embeddings_have_seen_stays() -> None:
    """Dynamic scaling goes back to the first frequencies when a text is short again."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = tiny(max_position_embeddings=16, rope_parameters=rope)
    model(torch.arange(40)[None])
    other = copy.deepcopy(model)
    npt.supported_layers(model)
    assert torch.equal(logits(model), logits(other))


def test_a_lora_with_dropout_in_training_mode() -> None:
    model = tiny()
    targets = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=4, lora_dropout=0.5, target_modules=targets, init_lora_weights=False)
    wrapped = get_peft_model(model, lora).train()
    assert set(npt.supported_layers(wrapped).values()) == {None}
    npt.convert(wrapped, CONFIG)
    assert [status.layer for status in npt.status(wrapped)] == [1]
    assert npt.status(wrapped)[0].architecture.intermediate_size == 48


def test_embeddings_that_are_offloaded_are_not_needed() -> None:
    model = tiny()
    expected = logits(model)
    words = model.model.embed_tokens.weight
    model.model.embed_tokens.weight = nn.Parameter(words.to("meta"))
    npt.convert(model, CONFIG)
    model.model.embed_tokens.weight = words
    with npt.disabled(model):
        assert torch.equal(logits(model), expected)


def test_layers_of_a_model_that_has_np_layers() -> None:
    model = npt.convert(faulty(FAULTS["side by side"][0]), npt.NPTConfig(layers=[2], rank=2))
    assert {n: line is None for n, line in npt.supported_layers(model).items()} == {
        0: True, 1: False, 2: True, 3: True,
    }  # fmt: skip


def test_a_multimodal_models_text_config() -> None:
    """Sizes of a model whose own config has none are those of its text model."""
    from tests.hf.small_models import build

    model = npt.convert(build("emu3"), CONFIG)
    assert npt.status(model)[0].architecture.hidden_size == 32
