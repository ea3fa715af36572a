"""Mixtures of experts as NP layers: their definition, the base model, files, and refusals."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

import npt_fast as npt
from npt_fast.hf.convert import decoder_layers
from npt_fast.hf.examine import _random_weights
from npt_fast.training.distillation import Distillation
from tests.hf.families import descend
from tests.hf.mixtures import FAMILIES, IDS, LAYERS, base, converted, layer_output, logits, one_pass

pytestmark = pytest.mark.usefixtures("one_thread")
WIDTHS = {"mixtral": 48, "qwen3_moe": 16, "gpt_oss": 48, "deepseek_v3": 16}
"""Width F of an expert; DeepSeek's shared one is as wide as one of the others."""


def close(found: Tensor, expected: Tensor, bound: float = 1e-9) -> None:
    torch.testing.assert_close(found, expected, rtol=bound, atol=bound)


@pytest.mark.parametrize("residual", ["kept", "removed"])
@pytest.mark.parametrize("modulation", ["single", "dual", "triple"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_is_the_definition(family: str, modulation: str, residual: str) -> None:
    """Each expert of each token with weights W + dW, one after the other."""
    model = converted(family, [1], modulation=modulation, residual=residual)
    layer, seen = decoder_layers(model)[1], one_pass(model, 1)
    expected = layer_output(family, layer, seen["h"], seen["kwargs"])
    # DeepSeek's router rounds its weights to float32
    close(seen["out"], expected, 1e-6 if family == "deepseek_v3" else 1e-9)
    assert layer.np_component.intermediate_size == WIDTHS[family]
    with npt.disabled(model):
        assert (one_pass(model, 1)["out"] - expected).abs().max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_the_base_comes_back(family: str) -> None:
    expected = logits(base(family))
    model = converted(family)
    state = {name: tensor.clone() for name, tensor in base(family).state_dict().items()}
    assert (logits(model) - expected).abs().max() > 0.01
    with npt.disabled(model):
        assert torch.equal(logits(model), expected)
    npt.unload(model)
    assert torch.equal(logits(model), expected)
    found = model.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    left = [
        name
        for name, module in model.named_modules()
        if {"forward", "np_act_fn"} & vars(module).keys()
    ]
    assert not left


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_no_change_is_the_base_mixture(family: str, implementation: str) -> None:
    """However transformers computes its experts."""
    model = base(family).float()
    model.set_experts_implementation(implementation)
    npt.convert(model, npt.NPTConfig(layers=[1], rank=2, residual="kept"))
    layer = decoder_layers(model)[1]
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = layer.mlp(x)
        expected = expected[0] if isinstance(expected, tuple) else expected
        close(layer.np_component(x, x, layer.mlp), expected, 1e-5)


def test_a_compiled_model() -> None:
    model = converted("mixtral")
    compiled = torch.compile(model, backend="aot_eager")
    close(logits(compiled), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_uses_the_cache_and_agrees_with_none(family: str) -> None:
    model = converted(family)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    cached = model.generate(IDS, **options)
    assert torch.equal(cached, model.generate(IDS, use_cache=False, **options))


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding(family: str) -> None:
    model = converted(family)
    short = IDS[:1, 2:]
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), short], 1)
    mask = (torch.arange(8) >= torch.tensor([[0], [2]])).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    batch = torch.cat([IDS[:1], padded])
    together = logits(model, batch, attention_mask=mask, position_ids=positions)
    close(together[0], logits(model, IDS[:1])[0], 1e-6)
    close(together[1, 2:], logits(model, short)[0], 1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_save_load_and_merge(family: str, tmp_path: Path) -> None:
    """Layers of a mixture have a width of their own, beside that of the base model's config."""
    model = converted(family, [0, 2], modulation="triple").float()
    expected = logits(model)
    npt.save(model, tmp_path / "both")
    for layer in (0, 2):
        npt.merge([f"{tmp_path}/both:{layer}"], tmp_path / str(layer))
    npt.merge([tmp_path / "0", tmp_path / "2"], tmp_path / "merged", verify=True)
    for name in ("both", "merged"):
        other = npt.load(base(family).float(), tmp_path / name)
        assert torch.equal(logits(other), expected)
    # DeepSeek's first layer has no experts, and is wider
    widths = [48 if family == "deepseek_v3" else WIDTHS[family], WIDTHS[family]]
    assert [part.architecture.intermediate_size for part in npt.status(other)] == widths


def test_experts_of_another_width(tmp_path: Path) -> None:
    npt.save(converted("qwen3_moe").float(), tmp_path / "layers")
    other = base("qwen3_moe", moe_intermediate_size=24).float()
    with pytest.raises(npt.ModelError, match="intermediate_size 16, the model has 24"):
        npt.load(other, tmp_path / "layers")


def test_a_whole_model_is_pickled_and_copied() -> None:
    model = converted("mixtral")
    expected = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), expected)
        npt.unload(other)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("residual", ["kept", "removed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_lowers_the_loss(family: str, residual: Any) -> None:
    model = base(family).float()
    npt.convert(model, npt.NPTConfig(layers=LAYERS, rank=4, num_ranks=2, residual=residual))
    step = Distillation(model, fidelity_weight=0.5, sink_weight=0.1, virtual_stride=3)
    losses = descend(step, IDS, lr=3e-3, steps=25)
    assert losses[-1] < 0.8 * losses[0]
    frozen = {name for name, p in model.named_parameters() if p.grad is not None}
    assert all("np_component" in name for name in frozen)


def test_gradients() -> None:
    """Of the attention output, the input, the router's input and the factors."""
    model = converted("gpt_oss", [1], modulation="triple")
    layer = decoder_layers(model)[1]
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(1, 3, 32, dtype=torch.float64, generator=generator, requires_grad=True)
        for _ in range(3)
    ]

    def run(attention: Tensor, h: Tensor, routed_by: Tensor, *_: Tensor) -> Any:
        return layer.np_component(attention, h, layer.mlp, routed_by=routed_by)

    assert torch.autograd.gradcheck(
        run, (*tensors, *layer.np_component.parameters()), fast_mode=True
    )


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_hooks_of_the_mixture_and_its_experts(family: str) -> None:
    """They see what they see in the base model, and may change it."""
    model = converted(family, [1])
    layer, expected = decoder_layers(model)[1], one_pass(model, 1)["out"]
    part = getattr(layer.mlp, layer.np_component.mixture.changed)
    seen: list[tuple[int, ...]] = []
    for module in (layer.mlp, part):
        module.register_forward_hook(lambda _, args, out: seen.append(tuple(args[0].shape)))
    close(one_pass(model, 1)["out"], expected)
    shapes = list(seen)
    seen.clear()
    with npt.disabled(model):
        logits(model)
    assert len(shapes) == 2 and shapes == seen
    part.register_forward_hook(lambda _, args, out: 0 * out)
    assert (one_pass(model, 1)["out"] - expected).abs().max() > 0.01


class _Other(nn.Module):
    """Something in the place of a part, which calls it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any) -> Any:
        return self.inner(*args)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["inner"], name)


def test_parts_that_were_replaced_after_conversion() -> None:
    model = converted("mixtral", [1])
    mlp = decoder_layers(model)[1].mlp
    mlp.experts = _Other(mlp.experts)
    with pytest.raises(npt.ModelError, match="_Other: it or its forward was replaced"):
        logits(model)


def _quantised(mlp: Any) -> None:
    weight = mlp.experts.down_proj.detach().to(torch.float8_e4m3fn)
    mlp.experts.down_proj = nn.Parameter(weight, requires_grad=False)


def _parallel(mlp: Any) -> None:
    mlp.experts._is_expert_parallel = True


def _scaled(mlp: Any) -> None:
    mlp.experts.register_forward_pre_hook(lambda _, args: (2 * args[0], *args[1:]))


def _with_its_input(mlp: Any) -> None:
    own = type(mlp).forward
    mlp.__class__ = type("Leaky", (type(mlp),), {"forward": lambda self, x: own(self, x) + x})


def _normed(mlp: Any) -> None:
    own = type(mlp).forward
    mlp.__class__ = type(
        "Normed", (type(mlp),), {"forward": lambda self, x: nn.functional.normalize(own(self, x))}
    )


def _latent(mlp: Any) -> None:
    own = type(mlp).forward
    mlp.__class__ = type("Latent", (type(mlp),), {"forward": lambda self, x: own(self, x * 2)})


REFUSED = {
    "quantised": (_quantised, r"experts \(MixtralExperts\) whose down_proj is no float tensor"),
    "expert parallel": (_parallel, "whose _is_expert_parallel is True, not False"),
    "its input besides": (_with_its_input, r"\(Leaky\) whose output is no sum of its experts"),
    "a norm": (_normed, r"\(Normed\) whose output is no sum of its experts"),
    "other inputs": (_latent, r"\(Latent\) whose experts do not read its input as it is"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str) -> None:
    fault, words = REFUSED[what]
    model = base("mixtral")
    fault(decoder_layers(model)[1].mlp)
    with pytest.raises(npt.ModelError, match=rf"layer 1 .*{words}") as caught:
        npt.convert(model, npt.NPTConfig(layers=[1], rank=2))
    assert "\n" not in str(caught.value) and not npt.status(model)


def test_experts_that_become_parallel_later() -> None:
    model = converted("mixtral", [1])
    _parallel(decoder_layers(model)[1].mlp)
    with pytest.raises(npt.ModelError, match="_is_expert_parallel is True"):
        logits(model)


def test_hundreds_of_experts_are_examined_in_little_memory() -> None:
    with torch.device("meta"):
        model = MixtralForCausalLM(MixtralConfig(num_local_experts=64, num_hidden_layers=1))
    layer = decoder_layers(model)[0]
    with _random_weights(layer):
        weight = layer.mlp.experts.gate_up_proj
        assert weight.untyped_storage().nbytes() < weight.nbytes / 8
        assert len({tuple(expert[0, :4].tolist()) for expert in weight}) == len(weight)
    assert layer.mlp.experts.gate_up_proj.is_meta
