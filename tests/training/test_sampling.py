"""Texts sampled from tiny models, against draws that are made one token at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import npt_fast as npt
from npt_fast.hf.convert import components
from npt_fast.training.sampling import Marks, front, marks, sample_text
from tests.training import tiny

LENGTH = 24
EOS = 0
BOS = 257


def model(**changes: Any) -> Any:
    """A model that often draws EOS, so that documents end within rows."""
    found = tiny.model(**{"initializer_range": 0.2, "vocab_size": 258, **changes})
    with torch.no_grad():
        found.lm_head.weight[EOS] *= 5
    return found


@torch.no_grad()
def drawn_alone(model: Any, found: Marks, row: int, seed: int) -> list[int]:
    """A row of the text, without a cache and without rows beside it."""
    noise = np.random.default_rng([seed, row])
    first, *given = found.start(row)
    ids = [first]
    while len(ids) < LENGTH:
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double()
        logits[list(found.unknown)] = -torch.inf
        clocks = torch.from_numpy(noise.standard_exponential(len(logits)))
        if given:
            ids.append(given.pop(0))
            continue
        # the token whose clock rings first: its rate is its probability
        ids.append(int((clocks / logits.softmax(-1)).argmin()))
        if ids[-1] == found.end:
            given = list(found.next_start(row))
    return ids


@pytest.mark.parametrize("first", [(), ("ab", "<bos>c", "d")])
@pytest.mark.parametrize("tokenizer", [tiny.tokenizer(), tiny.bos_tokenizer()])
def test_rows_are_draws_from_the_model(tokenizer: Any, first: tuple[str, ...]) -> None:
    base = model()
    if "<bos>" not in tokenizer.get_vocab():
        first = first[:1]
    options: dict[str, Any] = {"max_length": LENGTH, "first_tokens": first, "seed": 5}
    ids = sample_text(base, tokenizer, 7 * LENGTH - 1, batch_size=3, **options)
    assert ids.shape == (7, LENGTH) and ids.dtype == torch.int64
    found = marks(base, tokenizer, first)
    assert ids.tolist() == [drawn_alone(base, found, row, 5) for row in range(7)]
    assert (ids[:, 1:-1] == EOS).any()
    # other rows beside it, and more of them, change nothing
    more = sample_text(base, tokenizer, 9 * LENGTH, batch_size=9, **options)
    assert torch.equal(more[:7], ids)
    assert not torch.equal(sample_text(base, tokenizer, 7 * LENGTH, **{**options, "seed": 6}), ids)


def test_draws_have_the_probabilities_of_the_model() -> None:
    base = model()
    ids = sample_text(base, tiny.tokenizer(), 6000, max_length=2, batch_size=3000)
    with torch.no_grad():
        expected = base(input_ids=torch.tensor([[EOS]])).logits[0, -1, :257].softmax(-1) * 3000
    counted = torch.bincount(ids[:, 1], minlength=257)
    chi_square = float(((counted - expected) ** 2 / expected).sum())
    freedom = 256
    assert abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5


def test_a_document_ends_and_another_begins() -> None:
    base = model(vocab_size=260)
    tokenizer = tiny.bos_tokenizer()
    ids = sample_text(base, tokenizer, 40 * LENGTH, max_length=LENGTH)
    assert set(ids[:, 0].tolist()) == {BOS}
    ends = (ids[:, :-1] == EOS).nonzero()
    assert len(ends) > 5
    assert all(ids[row, column + 1] == BOS for row, column in ends.tolist())


def test_the_marks_of_tokenizers() -> None:
    """By what the tokenizer does and what its special tokens are called, in this order."""
    base = model(vocab_size=300)

    def found(tokenizer: Any, *special: str, **named: str) -> tuple[Any, Any]:
        tokenizer.add_special_tokens({"additional_special_tokens": list(special), **named})
        result = marks(base, tokenizer)
        return tokenizer.convert_ids_to_tokens(list(result.starts[0])), (
            tokenizer.convert_ids_to_tokens(result.end)
        )

    assert found(tiny.tokenizer()) == (["<eos>"], "<eos>")
    assert found(tiny.bos_tokenizer()) == (["<bos>"], "<eos>")
    assert found(tiny.bos_tokenizer("<bos> $A <eos>")) == (["<bos>"], "<eos>")
    assert found(tiny.bos_tokenizer(), "<|end_of_text|>") == (["<bos>"], "<|end_of_text|>")
    chat = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    assert found(tiny.tokenizer(), **chat) == (["<|im_end|>"], "<|im_end|>")
    text = "<|endoftext|>"
    assert found(tiny.tokenizer(), text, **chat) == ([text], text)
    assert front(tiny.bos_tokenizer("<bos> <eos> $A")) == (BOS, EOS)


def test_np_layers_are_off_meanwhile() -> None:
    base, tokenizer = model(), tiny.tokenizer()
    expected = sample_text(base, tokenizer, 50, max_length=25)
    npt.convert(base, npt.NPTConfig(layers=[1], rank=2, init="improved", init_scale=1.0))
    assert torch.equal(npt.sample_text(base, tokenizer, 50, max_length=25), expected)
    assert components(base)[1].enabled


def test_tokens_that_the_tokenizer_does_not_know_are_not_drawn() -> None:
    base = model(vocab_size=320)
    with torch.no_grad():
        base.lm_head.weight[257:] = base.lm_head.weight[EOS]  # the likeliest of all
    ids = sample_text(base, tiny.tokenizer(), 20 * LENGTH, max_length=LENGTH)
    assert int(ids.max()) < 257
    assert len(ids.unique()) > 100
    assert marks(base, tiny.tokenizer()).unknown == tuple(range(257, 320))


def test_a_model_that_is_being_trained() -> None:
    """Dropout and checkpointing are off meanwhile; the model and the caller's draws go on."""
    base, tokenizer = model(attention_dropout=0.5), tiny.tokenizer()
    expected = sample_text(base, tokenizer, 50, max_length=25)
    base.train()
    for layer in base.model.layers:
        layer.gradient_checkpointing = True
    base.model.layers[2].eval()  # modules are restored one by one
    modes = [module.training for module in base.modules()]
    before = torch.get_rng_state(), np.random.get_state()[1]
    assert torch.equal(sample_text(base, tokenizer, 50, max_length=25), expected)
    assert [module.training for module in base.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


def test_settings_of_generation_do_not_matter() -> None:
    base, tokenizer = model(), tiny.tokenizer()
    expected = sample_text(base, tokenizer, 50, max_length=25)
    base.generation_config.update(top_k=1, temperature=0.1, suppress_tokens=[1], max_length=3)
    base.config.use_cache = False
    assert torch.equal(sample_text(base, tokenizer, 50, max_length=25), expected)


def test_progress_counts_tokens() -> None:
    seen: list[tuple[str, int, int]] = []
    sample_text(
        model(), tiny.tokenizer(), 20, max_length=4, batch_size=3,
        progress=lambda *call: seen.append(call),
    )  # fmt: skip
    assert [done for _, done, _ in seen] == [3, 6, 9, 12, 14, 16, 18, 20]
    assert {(name, total) for name, _, total in seen} == {("Sampling", 20)}


def test_what_cannot_be_sampled() -> None:
    base, tokenizer = model(), tiny.tokenizer()
    for options in ({"tokens": 0}, {"batch_size": 0}):
        with pytest.raises(npt.OptionError, match=f"{next(iter(options))} must be a whole number"):
            sample_text(base, tokenizer, **options)
    with pytest.raises(npt.DataError, match="first_tokens: 5 tokens leave nothing to sample of 5"):
        sample_text(base, tokenizer, max_length=5, first_tokens=["a", "abcde"])
    with pytest.raises(npt.DataError, match="first_tokens: a text is empty"):
        sample_text(base, tokenizer, first_tokens=["a", ""])
    with pytest.raises(npt.OptionError, match=r"first_tokens must be a list, .*, not 'ab'"):
        sample_text(base, tokenizer, first_tokens="ab")
    with pytest.raises(npt.ModelError, match="max_length 257: the base model reads at most 256 "):
        sample_text(base, tokenizer, max_length=257)
    with pytest.raises(npt.ModelError, match="a token 257, the model knows 257 tokens"):
        sample_text(model(vocab_size=257), tiny.bos_tokenizer())
    tokenizer.eos_token = None
    with pytest.raises(npt.ModelError, match="no token that ends a text"):
        sample_text(base, tokenizer)
    with torch.no_grad():
        base.lm_head.weight[7] = float("nan")
    with pytest.raises(npt.ModelError, match="logits are not numbers"):
        sample_text(base, tiny.tokenizer(), 8, max_length=4)
