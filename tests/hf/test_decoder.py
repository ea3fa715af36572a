"""The names of a decoder's parts, and the calls of its layers."""

from __future__ import annotations

import pytest
from torch import nn

import npt_fast as npt
from npt_fast.hf.base_sizes import base_sizes
from npt_fast.hf.convert import decoder_layers
from npt_fast.hf.decoder import call_of, final_norm, layers_of, with_layers
from tests.hf.families import base


def test_calls_by_position_and_by_name() -> None:
    layer = decoder_layers(base("gpt2"))[0]
    mask, states = object(), object()
    expected = states, {"past_key_values": None, "attention_mask": mask, "use_cache": False}
    assert call_of(layer, (states, None, mask), {"use_cache": False}) == expected
    named = {"hidden_states": states, **expected[1]}
    assert call_of(layer, (), named) == expected and "hidden_states" in named


@pytest.mark.parametrize(
    ("name", "norm"),
    [("gpt2", "transformer.ln_f"), ("phi", "model.final_layernorm"), ("granite", "model.norm"),
     ("gpt_neox", "gpt_neox.final_layer_norm")],
)  # fmt: skip
def test_the_final_norm(name: str, norm: str) -> None:
    model = base(name)
    assert final_norm(model) is model.get_submodule(norm)


def test_a_decoder_without_known_names() -> None:
    with pytest.raises(npt.ModelError, match="Linear: has no list of decoder layers"):
        layers_of(nn.Linear(2, 2))
    with pytest.raises(npt.ModelError, match="Linear: has no norm behind its layers"):
        final_norm(nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["gpt2", "phi"])
def test_other_layers_for_a_while(name: str) -> None:
    decoder = base(name).get_decoder()
    own = layers_of(decoder)
    with pytest.raises(RuntimeError), with_layers(decoder, own[:2]):
        assert [*layers_of(decoder)] == [*own[:2]]
        raise RuntimeError
    assert layers_of(decoder) is own


@pytest.mark.parametrize("name", ["gpt2", "falcon", "phi", "gptj"])
def test_sizes_that_the_config_need_not_tell(name: str) -> None:
    assert base_sizes(base(name)) == {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "vocab_size": 257
    }  # fmt: skip
