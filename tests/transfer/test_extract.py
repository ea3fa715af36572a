"""Extraction: v_a and v_b equal the definition at the requested tokens."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch

import npt_fast as npt
from npt_fast.config import Position
from npt_fast.hf.convert import components, decoder_layers
from npt_fast.kernels import reference
from npt_fast.transfer.modulation import Modulation
from tests.transfer.models import (
    FAMILIES,
    PROJECTIONS,
    SOURCE,
    TEXT,
    attention_outputs,
    bos_tokenizer,
    converted,
    hooks,
    ids_of,
    logits,
    own_vectors,
    tokenizer,
)

ARCHITECTURES = [
    {"modulation": modulation, "num_ranks": num_ranks}
    for modulation in ("single", "dual", "triple")
    for num_ranks in (1, 3)
]


def assert_is_the_definition(
    m: Modulation, model: Any, text: str, places: list[int], layers: list[int]
) -> None:
    """Vectors from this model's attention outputs, averaged over `places`."""
    attention = attention_outputs(model, text, layers)
    assert list(m.layers) == layers
    for layer in layers:
        expected = own_vectors(components(model)[layer], attention[layer])
        assert m.layers[layer].keys() == expected.keys()
        for name, terms in m.layers[layer].items():
            for v, every in zip(terms, expected[name], strict=True):
                mean = every[places].mean(0)
                torch.testing.assert_close(v, mean.to(v.dtype), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_vectors_of_the_last_token(family: str) -> None:
    model = converted(family)
    m = npt.extract(model, tokenizer, SOURCE)
    assert_is_the_definition(m, model, SOURCE, [len(SOURCE) - 1], [1, 2])
    assert {v.dtype for _, _, terms in m.walk() for v in terms} == {torch.float64}


@pytest.mark.parametrize(
    "architecture", ARCHITECTURES, ids=lambda a: "-".join(map(str, a.values()))
)
def test_every_architecture(architecture: dict[str, Any]) -> None:
    model = converted(**architecture, layers=[0, 3])
    m = npt.extract(model, tokenizer, SOURCE, position=3)
    assert_is_the_definition(m, model, SOURCE, [3], [0, 3])
    assert m.terms == architecture["num_ranks"]
    count = ("single", "dual", "triple").index(architecture["modulation"]) + 1
    assert tuple(m.layers[3]) == PROJECTIONS[:count]


def test_dw_is_what_the_reference_adds_to_the_weight() -> None:
    """Extracted vectors reproduce the layer: W a + sum v_b (v_a . a) of kernels/reference.py."""
    model = converted(num_ranks=2)
    m = npt.extract(model, tokenizer, SOURCE)
    x = attention_outputs(model, SOURCE, [2])[2][-1:]
    state = components(model)[2].split()
    a = torch.randn(1, 32, dtype=torch.float64)
    factors = (
        torch.stack([state[f"{stem}_up.{i}"] for i in range(2)])
        for stem in ("W_down", "W_a_up", "W_b_up")
    )
    weight = model.get_parameter("model.layers.2.mlp.up_proj.weight")
    projection = reference.Projection(weight, None, reference.ProjectionFactors(*factors))
    with torch.no_grad():
        expected = reference.modulated_linear(a, x, projection)
        actual = a @ (weight + m.dense(2, "up")).t()
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


PLACES: list[tuple[Position, int]] = [
    (0, 0),
    (5, 5),
    (-2, 21),
    ("first", 0),
    ("last", 22),
    ("2", 2),
    ([4], 4),
    (slice(1, 2), 1),
    ("at:b", 2),
    ("after:blue", 6),
]


@pytest.mark.parametrize(("position", "place"), PLACES, ids=str)
def test_positions(position: Position, place: int) -> None:
    model = converted()
    m = npt.extract(model, tokenizer, SOURCE, position=position)
    assert_is_the_definition(m, model, SOURCE, [place], [1, 2])
    assert m.origin["positions"] == [place]


@pytest.mark.parametrize(
    ("position", "places"),
    [("all", list(range(23))), (":3", [0, 1, 2]), ("1,-1", [1, 22]), ("at:boat", [7, 8, 9, 10])],
    ids=str,
)
def test_the_mean_of_vectors_over_positions(position: Position, places: list[int]) -> None:
    model = converted()
    m = npt.extract(model, tokenizer, SOURCE, position=position, reduce="mean")
    attention = attention_outputs(model, SOURCE, [1, 2])
    for layer in (1, 2):
        expected = own_vectors(components(model)[layer], attention[layer])
        for name, terms in m.layers[layer].items():
            for v, every in zip(terms, expected[name], strict=True):
                torch.testing.assert_close(v, every[places].mean(0), rtol=1e-12, atol=1e-12)
    assert m.origin["positions"] == places and m.vectors


def test_the_mean_of_vectors_is_not_the_mean_of_changes() -> None:
    model = converted()
    one = npt.extract(model, tokenizer, SOURCE, position=":2", reduce="mean")
    parts = [npt.extract(model, tokenizer, SOURCE, position=i) for i in range(2)]
    assert not torch.allclose(one.dense(1, "up"), npt.mean(parts).dense(1, "up"))


def test_several_positions_need_a_mean() -> None:
    with pytest.raises(npt.TransferError, match="3 positions have a modulation each; take one"):
        npt.extract(converted(), tokenizer, SOURCE, position=":3")


def test_layers() -> None:
    model = converted(layers=(0, 1, 3))
    m = npt.extract(model, tokenizer, SOURCE, layers=[3, 1])
    assert sorted(m.layers) == [1, 3]
    with npt.disabled(model, [1]):  # only layers that are on are extracted
        m = npt.extract(model, tokenizer, SOURCE)
        assert_is_the_definition(m, model, SOURCE, [len(SOURCE) - 1], [0, 3])
        with pytest.raises(
            npt.ModelError, match=r"layer 1 is not an NP layer that is on; on are \[0, 3\]"
        ):
            npt.extract(model, tokenizer, SOURCE, layers=[0, 1])
    with pytest.raises(
        npt.ModelError, match=r"layer 2 is not an NP layer that is on; .* \[0, 1, 3\]"
    ):
        npt.extract(model, tokenizer, SOURCE, layers=[2])


def test_nothing_to_extract_from() -> None:
    model = converted()
    with npt.disabled(model), pytest.raises(npt.ModelError, match="no NP layers that are on"):
        npt.extract(model, tokenizer, SOURCE)
    with pytest.raises(npt.ModelError, match="load a checkpoint first"):
        npt.extract(npt.unload(model), tokenizer, SOURCE)


@pytest.mark.parametrize(
    ("text", "position", "message"),
    [
        ("", -1, "the text is empty"),
        ("abc", 3, "position 3 is outside the text, which has 3 tokens: 0 'a', 1 'b', 2 'c'"),
        ("abc", -4, "position -4 is outside"),
        ("abc", "at:x", "'x' does not occur in 'abc'"),
        ("abc", "here", "'here' is not a position"),
    ],
)
def test_bad_input(text: str, position: Position, message: str) -> None:
    model = converted()
    with pytest.raises(npt.TransferError, match=message):
        npt.extract(model, tokenizer, text, position=position)
    assert not hooks(model)


def test_the_model_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted()
    before = logits(model, ids_of(TEXT))
    npt.extract(model, tokenizer, SOURCE)
    assert not hooks(model) and torch.equal(logits(model, ids_of(TEXT)), before)

    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patched:
        patched.setattr(decoder_layers(model)[2], "forward", fail)
        with pytest.raises(ZeroDivisionError):
            npt.extract(model, tokenizer, SOURCE)
    assert not hooks(model) and torch.equal(logits(model, ids_of(TEXT)), before)


def test_provenance() -> None:
    model = converted()
    model.config._name_or_path = "some/model"
    m = npt.extract(model, tokenizer, "red 12", position="after:red")
    assert m.origin["text"] == "red 12"
    assert m.origin["tokens"] == ["r", "e", "d", " ", "1", "2"]
    assert m.origin["positions"] == [3]
    assert (m.base.name, *m.base.sizes, m.base.vocab_size) == ("some/model", 32, 48, 4, 257)


def test_digests_tell_checkpoints_apart() -> None:
    model = converted()
    first = npt.extract(model, tokenizer, TEXT).origin["weights"]
    data = b"".join(p.detach().numpy().tobytes() for p in components(model)[1].parameters())
    assert first.keys() == {"1", "2"} and first["1"] == hashlib.sha256(data).hexdigest()
    assert npt.extract(converted(), tokenizer, SOURCE).origin["weights"] == first
    with torch.no_grad():
        components(model)[2].w_down[0, 0] += 1
    changed = npt.extract(model, tokenizer, TEXT).origin["weights"]
    assert changed["1"] == first["1"] and changed["2"] != first["2"]


@pytest.mark.parametrize("position", [0, 1, -1, "at:b"])
def test_a_position_is_the_same_token_for_the_model(position: Position) -> None:
    """`extract` and `inject` count what `model(**tokenizer(text))` reads, BOS included."""
    model = converted(vocab_size=258)
    inputs = bos_tokenizer(SOURCE, return_tensors="pt")
    m = npt.extract(model, bos_tokenizer, SOURCE, position=position)
    before = model(**inputs, use_cache=False).logits
    with npt.inject(model, m, position=position, tokenizer=bos_tokenizer) as hits:
        after = model(**inputs, use_cache=False).logits
    assert hits.positions == [m.origin["positions"]]
    (place,) = m.origin["positions"]
    assert m.origin["tokens"][place] == bos_tokenizer.decode(inputs["input_ids"][0, place])
    # a token's own modulation, at its own place, changes nothing
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)


def test_how_the_text_was_read_is_recorded() -> None:
    model = converted(vocab_size=258)

    def read(text: str, **how: Any) -> tuple[str, Any]:
        origin = npt.extract(model, bos_tokenizer, text, **how).origin
        return "".join(origin["tokens"]), (origin["special_tokens"], origin["chat"])

    assert read("hi") == read("<bos>hi") == ("<bos>hi", (True, False))
    assert read("hi", special_tokens=False) == ("hi", (False, False))
    assert read("hi", chat=True) == ("<bos>user:hi;me:", (True, True))
    with pytest.raises(ValueError, match="a chat template writes special tokens"):
        read("hi", chat=True, special_tokens=False)


def test_bos_makes_a_difference() -> None:
    """The last token attends to BOS, so its modulation is another one without."""
    model = converted(vocab_size=258)
    last, alone = (
        npt.extract(model, bos_tokenizer, SOURCE, special_tokens=given).dense(1, "gate")
        for given in (True, False)
    )
    assert (last - alone).norm() > 0.01 * last.norm()
