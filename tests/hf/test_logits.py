"""The head gives the logits of the model itself, bit for bit, and leaves the model as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import npt_fast as npt
from npt_fast.hf.logits import head_of
from tests.hf.test_convert import tiny

PROMPT = torch.tensor([[3, 14, 15, 92, 6, 5]])
SCALED: dict[str, dict[str, Any]] = {
    "granite": {"logits_scaling": 8.0},
    "gemma2": {"final_logit_softcapping": 0.1},
    "cohere": {"logit_scale": 0.3},
    "minicpm3": {
        "dim_model_base": 8, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16,
        "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    },
}  # fmt: skip
"""Families whose logits are something else than the output of the last linear layer."""


def model_of(family: str, **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
    }  # fmt: skip
    config = CONFIG_MAPPING[family](**{**sizes, **options})
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def both(model: Any) -> tuple[Tensor, Tensor]:
    """The model's final hidden states and its logits."""
    hidden = model.get_decoder()(PROMPT, use_cache=False).last_hidden_state
    return hidden, model(PROMPT, use_cache=False, return_dict=True).logits


@pytest.mark.parametrize("family", ["llama", "qwen3", *SCALED])
def test_logits_are_the_models_own(family: str) -> None:
    model = model_of(family, **SCALED.get(family, {}))
    hidden, expected = both(model)
    with torch.no_grad():
        assert torch.equal(head_of(model)(hidden), expected)
        plain = model.get_output_embeddings()(hidden)
    assert torch.equal(plain, expected) is (family not in SCALED)


def test_any_shape_of_hidden_states() -> None:
    model = model_of("granite", logits_scaling=8.0)
    hidden, expected = both(model)
    assert torch.equal(head_of(model)(hidden[0]), expected[0])
    torch.testing.assert_close(head_of(model)(hidden[0, 2]), expected[0, 2])


def test_gradients_flow_and_the_model_stays_as_it_is() -> None:
    model = model_of("gemma2", final_logit_softcapping=0.1)
    calls: list[str] = []
    for part in (model, model.model):
        part.register_forward_hook(lambda *_: calls.append("called"))
    parts, state = dict(model.named_modules()), {**vars(model)}
    hidden = torch.randn(2, 3, 32).requires_grad_()
    head = head_of(model)
    head(hidden).sum().backward()
    by_hand = hidden.detach().clone().requires_grad_()
    (torch.tanh(model.lm_head(by_hand) / 0.1) * 0.1).sum().backward()
    torch.testing.assert_close(hidden.grad, by_hand.grad)
    assert dict(model.named_modules()) == parts
    assert vars(model).keys() == state.keys()
    assert not calls


def test_a_model_that_returns_tuples() -> None:
    model = tiny()
    hidden, expected = both(model)
    model.config.return_dict = False
    assert torch.equal(head_of(model)(hidden), expected)


def test_a_wrapped_model() -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

    model = tiny()
    hidden, expected = both(model)
    assert torch.equal(head_of(Wrapper(model))(hidden), expected)


def test_a_model_without_head() -> None:
    with pytest.raises(npt.ModelError, match="LlamaModel: has no head"):
        head_of(tiny().model)
