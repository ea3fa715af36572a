"""Comparing: probabilities and divergences against those of plain forward passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import npt_fast as npt
from npt_fast.config import Injection
from npt_fast.hf.tokenizer import PLAIN, Reading
from npt_fast.transfer.compare import Comparison, Sweep, compare, divergences, sweep
from npt_fast.transfer.generate import Sampling
from npt_fast.transfer.modulation import Modulation
from tests.transfer.models import (
    SOURCE,
    TEXT,
    bos_tokenizer,
    converted,
    hooks,
    ids_of,
    logits,
    tokenizer,
)

CHAT = Reading(chat=True)
LETTERS = [tokenizer.decode([i]) for i in range(257)]


@pytest.fixture(scope="module")
def model() -> Any:
    return converted()


@pytest.fixture(scope="module")
def modulation(model: Any) -> Modulation:
    return npt.extract(model, tokenizer, SOURCE)


def next_token(model: Any, text: str, m: Modulation | None, **options: Any) -> Tensor:
    """Probabilities of the next token."""
    if m is None:
        return logits(model, ids_of(text))[0, -1].softmax(-1)
    with npt.inject(model, m, **options):
        return logits(model, ids_of(text))[0, -1].softmax(-1)


def kl(p: Tensor, q: Tensor) -> float:
    return float(sum(a * (a / b).log() for a, b in zip(p, q, strict=True)))


def test_the_next_token(model: Any, modulation: Modulation) -> None:
    found = compare(
        model, tokenizer, modulation, TEXT, Injection(), tracked=["a", "bee", " "], top=3
    )
    before, after = next_token(model, TEXT, None), next_token(model, TEXT, modulation)
    assert found.prompt == list(TEXT)
    assert (found.positions, found.layers) == ([12], [1, 2])
    assert found.no_injection == [LETTERS[before.argmax()]] and found.injected == [
        LETTERS[after.argmax()]
    ]
    for shown, order in ((found.top, after), (found.no_injection_top, before)):
        places = order.topk(3).indices.tolist()
        assert [token.text for token in shown] == [LETTERS[i] for i in places]
        assert [token.before for token in shown] == pytest.approx(before[places].tolist(), rel=1e-4)
        assert [token.after for token in shown] == pytest.approx(after[places].tolist(), rel=1e-4)
    assert [token.text for token in found.tracked] == [
        "a",
        "b",
        " ",
    ]  # the first token of each text
    for token in found.tracked:
        place = ids_of(token.text)[0, 0]
        assert token.before == pytest.approx(before[place].item(), rel=1e-4)
        assert token.after == pytest.approx(after[place].item(), rel=1e-4)
    assert found.kls == [found.kl] and found.kl == pytest.approx(kl(before, after), rel=1e-4)
    assert found.seconds > 0 and found.no_injection_seconds > 0 and not hooks(model)


@pytest.mark.parametrize("when", ["prefill", "decode", "both"])
def test_every_generated_token(model: Any, modulation: Modulation, when: Any) -> None:
    found = compare(
        model, tokenizer, modulation, TEXT, Injection(when=when), sampling=Sampling(tokens=5)
    )
    ids = ids_of(TEXT)
    options = {"max_new_tokens": 5, "do_sample": False}
    base = model.generate(ids, **options)[0, 13:].tolist()
    with npt.inject(model, modulation, when=when):
        injected = model.generate(ids, **options)[0, 13:].tolist()
    assert found.no_injection == [LETTERS[i] for i in base]
    assert found.injected == [LETTERS[i] for i in injected]
    assert injected != base
    expected = []
    for n in range(5):  # both passes read the injected continuation
        read = torch.tensor([[*ids[0].tolist(), *injected[:n]]])
        p = logits(model, read)[0, -1].softmax(-1)
        places = {"prefill": [12], "decode": [], "both": [12]}[when]
        places += [] if when == "prefill" else range(13, 13 + n)
        if places:
            with npt.inject(model, modulation, position=places):
                q = logits(model, read)[0, -1].softmax(-1)
        else:
            q = p
        expected.append(kl(p, q))
    assert found.kls == pytest.approx(expected, rel=1e-3, abs=1e-6) and found.kl == found.kls[0]


def test_options_reach_the_injection(model: Any, modulation: Modulation) -> None:
    options: dict[str, Any] = {"position": "at:red", "mode": "blend", "strength": 0.4}
    found = compare(model, tokenizer, modulation, TEXT, Injection(**options))
    expected = next_token(model, TEXT, modulation, **options, tokenizer=tokenizer)
    assert found.positions == [4, 5, 6]
    assert found.top[0].after == pytest.approx(expected.max().item(), rel=1e-4)


def test_the_same_seed_gives_the_same_text(model: Any, modulation: Modulation) -> None:
    def run(seed: int) -> Comparison:
        sampling = Sampling(tokens=8, strategy="top_p", seed=seed)
        return compare(model, tokenizer, modulation, TEXT, Injection(), sampling=sampling)

    first, again, other = run(1), run(1), run(2)
    assert (first.no_injection, first.injected, first.kls) == (
        again.no_injection,
        again.injected,
        again.kls,
    )
    assert first.injected != other.injected


def test_divergences_of_equal_and_of_far_logits() -> None:
    rows = torch.tensor([[0.0, 1.0, -2.0], [50.0, 0.0, -50.0]])
    assert divergences(rows, rows + 3.0) == pytest.approx([0.0, 0.0], abs=1e-6)
    assert min(divergences(rows, rows.clone())) >= 0
    p, q = rows.double().softmax(-1), rows.flip(0).double().softmax(-1)
    expected = [kl(a, b) for a, b in zip(p, q, strict=True)]
    assert divergences(rows, rows.flip(0)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ""}, "the text is empty"),
        ({"tracked": [""]}, "the text is empty"),
        (
            {"injection": Injection(position=13)},
            "position 13 is outside the text, which has 13 tokens",
        ),
        ({"injection": Injection(position="at:blue")}, "'blue' does not occur in 'the red house'"),
        ({"injection": Injection(when="decode")}, "nothing was injected"),
    ],
)
def test_bad_input(
    model: Any, modulation: Modulation, changes: dict[str, Any], message: str
) -> None:
    options = {"prompt": TEXT, "injection": Injection(), **changes}
    with pytest.raises(npt.TransferError, match=message):
        compare(model, tokenizer, modulation, **options)
    assert not hooks(model)


def test_sweep(model: Any, modulation: Modulation) -> None:
    strengths = [0.5, 2.0]
    found: Sweep = sweep(
        model,
        tokenizer,
        modulation,
        TEXT,
        Injection(mode="exact-add"),
        strengths=strengths,
        tracked=["a", "b"],
    )
    assert found.layers == [[1], [2], [1, 2]] and found.strengths == strengths
    before = next_token(model, TEXT, None)
    for letter in "ab":
        assert found.no_injection[letter] == pytest.approx(
            before[ids_of(letter)[0, 0]].item(), rel=1e-4
        )
    for row, layers in enumerate(found.layers):
        for column, strength in enumerate(strengths):
            part = modulation.only(layers)
            after = next_token(model, TEXT, part, mode="exact-add", strength=strength)
            assert found.kl[row][column] == pytest.approx(kl(before, after), rel=1e-3)
            for letter in "ab":
                expected = after[ids_of(letter)[0, 0]].item()
                assert found.tracked[letter][row][column] == pytest.approx(expected, rel=1e-4)


def test_sweep_of_one_layer_has_one_row(model: Any, modulation: Modulation) -> None:
    found = sweep(model, tokenizer, modulation.only([2]), TEXT, Injection(), strengths=[1.0])
    assert (
        found.layers == [[2]] and len(found.kl) == 1 and found.tracked == {} == found.no_injection
    )


def test_sweep_over_the_tokens_of_a_prompt(model: Any, modulation: Modulation) -> None:
    found = sweep(model, tokenizer, modulation, TEXT, Injection(position=[0, -1]), each_token=True)
    last = len(ids_of(TEXT)[0]) - 1
    assert found.strengths == [0.25] and [c.split()[0] for c in found.columns] == ["0", str(last)]
    before = next_token(model, TEXT, None)
    for row, layers in enumerate(found.layers):
        for column, position in enumerate((0, last)):
            part = modulation.only(layers)
            after = next_token(model, TEXT, part, strength=0.25, position=position)
            assert found.kl[row][column] == pytest.approx(kl(before, after), rel=1e-3, abs=1e-9)


def test_bos_is_read_and_counted() -> None:
    """As in `generate(**tokenizer(prompt))`; left out, or written by a chat template, by option."""
    model = converted(vocab_size=258)
    source = npt.extract(model, bos_tokenizer, SOURCE)
    inputs = bos_tokenizer(TEXT, return_tensors="pt")
    options = {"max_new_tokens": 3, "do_sample": False}
    found = compare(
        model, bos_tokenizer, source, TEXT, Injection(position=1), sampling=Sampling(tokens=3)
    )
    assert found.prompt == ["<bos>", *TEXT] and found.positions == [1]
    plain = model.generate(**inputs, **options)[0, 14:]
    assert found.no_injection_text == bos_tokenizer.decode(plain)
    with npt.inject(model, source, position=1):
        injected = model.generate(**inputs, **options)[0, 14:]
    assert found.injected_text == bos_tokenizer.decode(injected)
    for reading, prompt in ((PLAIN, list(TEXT)), (CHAT, ["<bos>", *f"user:{TEXT};me:"])):
        found = compare(model, bos_tokenizer, source, TEXT, Injection(), reading=reading)
        assert found.prompt == prompt and found.positions == [len(prompt) - 1]


def test_sweep_reads_and_counts_bos() -> None:
    model = converted(vocab_size=258)
    source = npt.extract(model, bos_tokenizer, SOURCE)
    found = sweep(model, bos_tokenizer, source, "ab", Injection(position="all"), each_token=True)
    assert found.columns == ["0 '<bos>'", "1 'a'", "2 'b'"]
    assert (found.tokens, found.positions) == (["<bos>", "a", "b"], [0, 1, 2])
    alone = sweep(model, bos_tokenizer, source, "ab", Injection(), strengths=[1.0], reading=PLAIN)
    assert (alone.tokens, alone.positions) == (["a", "b"], [1])
    one = compare(model, bos_tokenizer, source, "ab", Injection(), reading=PLAIN)
    assert alone.kl[-1] == pytest.approx([one.kl])
