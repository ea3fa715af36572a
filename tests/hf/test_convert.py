"""Converting Hugging Face models: NP layers match their definition, and unload is exact."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, cpu_offload, dispatch_model, load_checkpoint_in_model
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.nn.modules.module import register_module_forward_hook
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MptConfig,
    Qwen2Config,
    Qwen3Config,
)

import npt_fast as npt
from npt_fast.hf.convert import components, decoder_layers
from npt_fast.kernels import reference
from tests.checkpoints import assert_same_tensors

FAMILIES = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
PROMPT = torch.tensor([[3, 14, 15, 92, 6, 5]])


def tiny(family: str = "llama", **options: Any) -> Any:
    """A random model of 4 layers."""
    torch.manual_seed(0)
    config = FAMILIES[family](
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        **options,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def randomize(model: Any) -> Any:
    """Set random parameters, so that every NP component has an effect."""
    torch.manual_seed(1)
    with torch.no_grad():
        for part in components(model).values():
            for parameter in part.parameters():
                parameter.normal_(std=0.3)
    return model


def converted(family: str = "llama", layers: tuple[int, ...] = (1, 2), **options: Any) -> Any:
    model = tiny(family)
    npt.convert(model, npt.NPTConfig(layers=layers, rank=4, num_ranks=2, **options))
    return randomize(model)


@torch.no_grad()
def logits(model: Any, ids: Tensor = PROMPT, **options: Any) -> Tensor:
    return model(ids, use_cache=False, **options).logits


def one_pass(model: Any, layer: Any) -> dict[str, Any]:
    """Input (h, kwargs) and output (out) of a layer in one forward pass."""
    seen: dict[str, Any] = {}
    layer.register_forward_hook(
        lambda module, args, kwargs, out: seen.update(h=args[0], kwargs=kwargs, out=out),
        with_kwargs=True,
    )
    logits(model)
    return seen


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("residual", ["removed", "kept"])
def test_a_converted_layer_is_the_definition(family: str, residual: str) -> None:
    """The output equals design.md#layer, computed from the layer's parts with v_a and v_b."""
    model = converted(family, layers=(1,), residual=residual)
    layer = decoder_layers(model)[1]
    seen = one_pass(model, layer)
    h, part, mlp = seen["h"], layer.np_component, layer.mlp
    with torch.no_grad():
        attention, _ = layer.self_attn(hidden_states=layer.input_layernorm(h), **seen["kwargs"])
        state = part.split()

        def projection(name: str) -> reference.Projection:
            stacks = (
                torch.stack([state[f"{stem}_{name}.{i}"] for i in range(2)])
                for stem in ("W_down", "W_a_up", "W_b_up")
            )
            base = getattr(mlp, f"{name}_proj")
            return reference.Projection(
                base.weight, base.bias, reference.ProjectionFactors(*stacks)
            )

        y = reference.modulated_mlp(
            attention[0],
            layer.post_attention_layernorm(h)[0],
            projection("gate"),
            projection("up"),
            projection("down"),
            torch.nn.functional.silu,
        )
        expected = h[0] + y + (attention[0] if residual == "kept" else 0)
    torch.testing.assert_close(seen["out"][0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_base_comes_back(family: str) -> None:
    base = tiny(family)
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    expected = logits(base)
    model = converted(family)
    assert not torch.allclose(logits(model), expected)
    with npt.disabled(model):
        assert torch.equal(logits(model), expected)
    assert not torch.allclose(logits(model), expected)
    assert npt.unload(model) is model
    assert torch.equal(logits(model), expected)
    found = model.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert all("forward" not in layer.__dict__ for layer in decoder_layers(model))


def test_a_kept_residual_starts_as_the_mlp_without_attention_in_its_input() -> None:
    """The output of a new layer is known: h + attention + MLP(LN2(h))."""
    model = tiny()
    npt.convert(model, npt.NPTConfig(layers=[0], residual="kept", rank=4))
    layer = decoder_layers(model)[0]
    seen = one_pass(model, layer)
    with torch.no_grad():
        h = seen["h"]
        attention, _ = layer.self_attn(hidden_states=layer.input_layernorm(h), **seen["kwargs"])
        expected = h + attention + layer.mlp(layer.post_attention_layernorm(h))
    torch.testing.assert_close(seen["out"], expected)


def test_disabled_takes_layers_nests_and_survives_errors() -> None:
    model = converted()
    on = logits(model)
    with npt.disabled(model, layers=[1]):
        one = logits(model)
        with npt.disabled(model):
            assert [layer.enabled for layer in npt.status(model)] == [False, False]
        assert [layer.enabled for layer in npt.status(model)] == [False, True]
        assert torch.equal(logits(model), one)
    with pytest.raises(ZeroDivisionError), npt.disabled(model):
        raise ZeroDivisionError
    assert torch.equal(logits(model), on)
    with pytest.raises(npt.ModelError, match=r"layer 3 is no NP layer; converted are \[1, 2\]"):
        with npt.disabled(model, layers=[3]):
            pass


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_uses_the_cache_and_agrees_with_none(family: str) -> None:
    model = converted(family)
    options = {"max_new_tokens": 8, "do_sample": False}
    cached = model.generate(PROMPT, **options)
    assert torch.equal(cached, model.generate(PROMPT, use_cache=False, **options))
    calls: list[int] = []
    decoder_layers(model)[1].np_component.register_forward_hook(
        lambda module, args, out: calls.append(out.shape[1])
    )
    model.generate(PROMPT, **options)
    assert calls == [6] + [1] * 7  # the prompt once, then one token at a time


def test_left_padding_and_batches() -> None:
    model = converted()
    short = PROMPT[:, 2:]
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), short], 1)
    batch = torch.cat([PROMPT, padded])
    mask = (torch.arange(6) >= torch.tensor([[0], [2]])).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    together = logits(model, batch, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(together[0], logits(model)[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together[1, 2:], logits(model, short)[0], rtol=1e-4, atol=1e-5)


def test_eager_and_sdpa_attention_agree() -> None:
    model = converted()
    sdpa = logits(model)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(logits(model), sdpa, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_changes_nothing() -> None:
    model = converted().train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            new_name = "activation_checkpointing_enable"  # which transformers 5.17 does not have
            getattr(model, new_name, model.gradient_checkpointing_enable)()
        model.zero_grad()
        model(PROMPT, labels=PROMPT, use_cache=False).loss.backward()
        parts = components(model).values()
        gradients.append([p.grad.clone() for part in parts for p in part.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_only_the_np_part_is_trained() -> None:
    model = converted()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".np_component." in name for name in trained)


def test_with_accelerate_hooks() -> None:
    """device_map replaces forward by a hook; it may do so before or after the conversion."""
    expected, base = logits(converted()), logits(tiny())
    model = dispatch(tiny())
    npt.convert(model, npt.NPTConfig(layers=[1, 2], rank=4, num_ranks=2))
    randomize(model)
    assert hasattr(decoder_layers(model)[1], "_hf_hook")
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(dispatch(converted())), expected)
    npt.unload(model)
    assert torch.equal(logits(model), base)


def dispatch(model: Any) -> Any:
    """Do what ``device_map`` does: every part on the CPU, but with hooks."""
    parts = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    parts += [f"model.layers.{index}" for index in range(4)]
    return dispatch_model(model, dict.fromkeys(parts, "cpu"), force_hooks=True)


def test_unload_leaves_nothing_behind() -> None:
    def contents(model: Any) -> list[dict[str, Any]]:
        return [
            {name: dict(v) if isinstance(v, dict) else v for name, v in vars(module).items()}
            for module in model.modules()
        ]

    model = tiny()
    before = contents(model)
    npt.convert(model, npt.NPTConfig(layers=[1, 2], rank=4))
    assert contents(model) != before
    npt.unload(model)
    assert contents(model) == before


def test_offloaded_layers_are_refused() -> None:
    model = cpu_offload(tiny(), execution_device=torch.device("cpu"))
    with pytest.raises(npt.ModelError, match="layer 1 is offloaded"):
        npt.convert(model, npt.NPTConfig(layers=[1]))


def test_no_second_copy_of_the_base() -> None:
    model = tiny()
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    randomize(npt.convert(model, npt.NPTConfig(layers=[1, 2], rank=4, num_ranks=2)))
    base = [p for n, p in model.named_parameters() if "np_component" not in n]
    assert {p.untyped_storage().data_ptr() for p in base} == storages
    assert not any("original" in name for name in model.state_dict())


def test_a_deep_copy_is_independent() -> None:
    model = converted()
    twin = copy.deepcopy(model)
    expected = logits(model)
    assert torch.equal(logits(twin), expected)
    with torch.no_grad():
        components(twin)[1].w_b_gate.zero_()
    assert torch.equal(logits(model), expected)
    assert not torch.equal(logits(twin), expected)


def test_status() -> None:
    model = converted(layers=(-1, 1), modulation="dual")
    assert [(s.layer, str(s.architecture)) for s in npt.status(model)] == [
        (1, "dual, num_ranks 2, rank 4"),
        (3, "dual, num_ranks 2, rank 4"),
    ]
    assert npt.status(model)[0].parameters == 2 * 2 * 4 * (2 * 32 + 48)


@pytest.mark.parametrize("layers", [[4], [-5], [0, 9]])
def test_layers_that_do_not_exist(layers: list[int]) -> None:
    model = tiny()
    with pytest.raises(npt.OptionError, match="there is no layer"):
        npt.convert(model, npt.NPTConfig(layers=layers))
    assert not npt.status(model)


def test_converting_twice_is_refused() -> None:
    model = converted()
    with pytest.raises(npt.ModelError, match="layer 2 is an NP layer already"):
        npt.convert(model, npt.NPTConfig(layers=[0, 2]))
    assert [s.layer for s in npt.status(model)] == [1, 2]


def test_what_is_missing_is_named() -> None:
    mpt = AutoModelForCausalLM.from_config(
        MptConfig(n_layers=1, d_model=8, n_heads=1, vocab_size=16)
    )
    with pytest.raises(npt.ModelError, match="MptModel: has no list of decoder layers"):
        npt.convert(mpt, npt.NPTConfig(layers=[0]))
    model = tiny()
    del decoder_layers(model)[1].mlp.up_proj
    with pytest.raises(npt.ModelError, match=r"layer 1 .* has no mlp.up_proj"):
        npt.convert(model, npt.NPTConfig(layers=[0, 1]))
    assert not npt.status(model)
    model = tiny(hidden_act="tanh")
    with pytest.raises(npt.ModelError, match=r"layer 0 .* has the activation Tanh in its MLP"):
        npt.convert(model, npt.NPTConfig(layers=[0]))


def test_full_state_dict_of_the_model_round_trips(tmp_path: Path) -> None:
    model = converted()
    assert model.state_dict().keys() == {
        *dict(model.named_parameters()),
        *(name for name, _ in model.named_buffers() if not name.endswith("inv_freq")),
        "lm_head.weight",
    }
    torch.save(model.state_dict(), tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    plain, meta = (
        npt.convert(tiny(), npt.NPTConfig(layers=[1, 2], rank=4, num_ranks=2)) for _ in range(2)
    )
    plain.load_state_dict(state)
    assert torch.equal(logits(plain), logits(model))
    meta.model.layers.to("meta")
    meta.load_state_dict(state, assign=True)
    assert not any(parameter.is_meta for parameter in meta.parameters())
    assert torch.equal(logits(meta), logits(model))


def test_accelerate_loads_and_offloads_converted_models(tmp_path: Path) -> None:
    model = converted()
    expected = logits(model)
    Accelerator(cpu=True).save_model(model, tmp_path)
    other = npt.convert(tiny(), npt.NPTConfig(layers=[1, 2], rank=4, num_ranks=2))
    load_checkpoint_in_model(other, tmp_path, device_map={"": "cpu"})
    assert torch.equal(logits(other), expected)
    assert_same_tensors(get_model_state_dict(model), model.state_dict())
    cpu_offload(model, execution_device=torch.device("cpu"))
    torch.testing.assert_close(logits(model), expected)
    with npt.disabled(model):
        assert torch.equal(logits(model), logits(tiny()))


def replaced_mlp(layer: Any) -> None:
    layer.mlp = copy.deepcopy(layer.mlp)
    del layer.mlp.forward, layer.mlp.np_act_fn


def replaced_forward(layer: Any) -> None:
    layer.mlp.forward = partial(type(layer.mlp).forward, layer.mlp)


def replaced_activation(layer: Any) -> None:
    layer.mlp.act_fn = torch.nn.GELU()


@pytest.mark.parametrize("replace", [replaced_mlp, replaced_forward, replaced_activation])
def test_an_mlp_that_is_replaced_later_is_refused(replace: Any) -> None:
    model = randomize(npt.convert(tiny(), npt.NPTConfig(layers=[1], rank=4)))
    layer = decoder_layers(model)[1]
    replace(layer)
    with pytest.raises(npt.ModelError, match="was replaced after the layer was converted"):
        logits(model)
    with npt.disabled(model):
        logits(model)


def test_a_hook_of_all_modules_is_called_on_np_layers() -> None:
    model = randomize(npt.convert(tiny(), npt.NPTConfig(layers=[1], rank=4)))
    mlp, before = decoder_layers(model)[1].mlp, logits(model)
    seen: list[Any] = []
    handle = register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        torch.testing.assert_close(logits(model), before)
    finally:
        handle.remove()
    assert all(any(module is part for module in seen) for part in mlp.modules())
