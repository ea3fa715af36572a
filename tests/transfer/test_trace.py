"""Patching in rows of a batch equals patching one layer at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import npt_fast as npt
from npt_fast.errors import TransferError
from npt_fast.hf.base_model import load_base_model
from npt_fast.hf.tokenizer import PLAIN, Reading
from npt_fast.transfer import attention
from npt_fast.transfer.trace import CrossRelation, Patch, Trace, draw, trace, trace_tokens
from tests.training import tiny

SOURCE, TARGET = "abcd efg", "xyz uv"
CHAT = Reading(chat=True)


@pytest.fixture(scope="module")
def model() -> Any:
    """A model whose weights are large enough for its layers to matter."""
    found = tiny.model()
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "proj" in name:
                parameter.mul_(8)
    return found


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.tokenizer()


@torch.no_grad()
def one_by_one(
    model: Any, tokenizer: Any, layers: list[int], taken: list[int], put: list[int]
) -> torch.Tensor:
    """Probabilities after TARGET, patched by hooks on o_proj, one pass per layer."""
    ids = [tokenizer(text, return_tensors="pt").input_ids for text in (SOURCE, TARGET)]
    kept: dict[int, torch.Tensor] = {}
    modules = {layer: model.model.layers[layer].self_attn.o_proj for layer in layers}
    hooks = [
        part.register_forward_hook(lambda m, a, out, n=n: kept.update({n: out[0, taken].clone()}))
        for n, part in modules.items()
    ]
    model(ids[0], use_cache=False)
    for hook in hooks:
        hook.remove()

    def put_in(n: int, out: torch.Tensor) -> torch.Tensor:
        out = out.clone()
        out[0, put] = kept[n]
        return out

    hooks = [
        part.register_forward_hook(lambda m, a, out, n=n: put_in(n, out))
        for n, part in modules.items()
    ]
    logits = model(ids[1], use_cache=False).logits[0, -1]
    for hook in hooks:
        hook.remove()
    return logits.double().softmax(-1)


@pytest.mark.parametrize("window", [1, 2, 4])
@pytest.mark.parametrize(
    ("where", "taken", "put"),
    [
        ((-1, "last"), [7], [5]),
        ((2, "all"), [2], [0, 1, 2, 3, 4, 5]),
        (("0:2", [1, 3]), [0, 1], [1, 3]),
        (("at:efg", "at:xyz"), [5, 6, 7], [0, 1, 2]),
    ],
)
def test_rows_are_single_runs(
    model: Any, tokenizer: Any, window: int, where: Any, taken: list[int], put: list[int]
) -> None:
    found = trace(
        model, tokenizer, SOURCE, TARGET, tracked=["a", "q"], window=window,
        source_position=where[0], target_position=where[1],
    )  # fmt: skip
    assert (found.source_positions, found.target_positions) == (taken, put)
    base = one_by_one(model, tokenizer, [], taken, put)
    follow = [tokenizer(text)["input_ids"][0] for text in "aq"]
    assert found.target_tracked == pytest.approx(base[follow].tolist())
    assert [patch.layers[0] for patch in found.patches] == list(range(4 - window + 1))
    for patch in found.patches:
        assert patch.layers == list(range(patch.layers[0], patch.layers[0] + window))
        expected = one_by_one(model, tokenizer, patch.layers, taken, put)
        assert patch.tracked == pytest.approx(expected[follow].tolist(), rel=1e-4)
        assert patch.top == tokenizer.decode([int(expected.argmax())])
        kl = (base * (base / expected).log()).sum().item()
        assert patch.kl == pytest.approx(kl, rel=1e-3, abs=1e-7)
        # the last layer's attention output at an earlier token affects nothing
        assert kl > 1e-6 or (patch.layers == [3] and 5 not in put)


def test_several_passes_are_one(model: Any, tokenizer: Any, monkeypatch: Any) -> None:
    whole = trace(model, tokenizer, SOURCE, TARGET)
    monkeypatch.setattr(attention, "TOKENS", 3 * len(TARGET))
    parts = trace(model, tokenizer, SOURCE, TARGET)
    for a, b in zip(whole.patches, parts.patches, strict=True):
        assert (a.layers, a.top) == (b.layers, b.top)
        assert a.tracked == pytest.approx(b.tracked, rel=1e-4)
    assert len(parts.patches) == 4


def test_the_likeliest_tokens_are_followed_unasked(model: Any, tokenizer: Any) -> None:
    found = trace(model, tokenizer, SOURCE, TARGET)
    assert found.source_top != found.target_top
    assert found.tracked == [found.source_top, found.target_top]


def test_a_prompt_into_itself_changes_nothing(model: Any, tokenizer: Any) -> None:
    found = trace(model, tokenizer, TARGET, TARGET)
    assert found.decisive == []
    assert all(patch.kl < 1e-9 for patch in found.patches)


def test_np_layers_are_off_meanwhile(tokenizer: Any) -> None:
    plain = trace(tiny.model(), tokenizer, SOURCE, TARGET)
    converted = npt.convert(tiny.model(), npt.NPTConfig(layers=(1, 2), rank=3, num_ranks=2))
    hooks = sum(len(part._forward_hooks) for part in converted.modules())
    found = trace(converted, tokenizer, SOURCE, TARGET)
    assert found.target_tracked == pytest.approx(plain.target_tracked, rel=1e-6)
    kls = [[patch.kl for patch in one.patches] for one in (found, plain)]
    assert kls[0] == pytest.approx(kls[1], rel=1e-4)
    assert [status.enabled for status in npt.status(converted)] == [True, True]
    assert sum(len(part._forward_hooks) for part in converted.modules()) == hooks


def test_what_is_wrong_is_said(model: Any, tokenizer: Any) -> None:
    for changes, expected in (
        ({"window": 0}, "a window of 0 layers: the model has 4"),
        ({"window": 5}, "a window of 5 layers"),
        ({"source_position": 8}, "position 8 is outside the text"),
        ({"source_position": "all"}, "8 source positions do not fit 1 target positions"),
        ({"tracked": [""]}, "the text is empty"),
    ):
        with pytest.raises(TransferError, match=expected):
            trace(model, tokenizer, SOURCE, TARGET, **changes)
    assert not any(part._forward_hooks for part in model.modules())


def test_token_by_token(model: Any, tokenizer: Any) -> None:
    """From the first that differs on, counted from the end."""
    for source, target, pairs in (
        ("abcd", "abxd", [(2, 2), (3, 3)]),
        ("abc d", "abxyz d", [(2, 4), (3, 5), (4, 6)]),
        ("abc", "abc", [(2, 2)]),
    ):
        found = trace_tokens(model, tokenizer, source, target, tracked=["q"], window=2)
        assert [(*one.source_positions, *one.target_positions) for one in found] == pairs
        for one, (taken, put) in zip(found, pairs, strict=True):
            assert one == trace(
                model, tokenizer, source, target, tracked=["q"], window=2,
                source_position=taken, target_position=put,
            )  # fmt: skip


def test_what_both_begin_with_has_no_effect(model: Any, tokenizer: Any) -> None:
    """So leaving it out loses nothing."""
    found = trace(model, tokenizer, "abcd", "abxd", source_position=1, target_position=1)
    assert all(patch.kl < 1e-9 for patch in found.patches)


def test_a_heat_map(model: Any, tokenizer: Any) -> None:
    source = "$x_1^ $"  # matplotlib would parse this as a formula
    found = trace_tokens(model, tokenizer, source, "$xy1^ $", tracked=["a", "b", "c"])
    figure = draw(found)
    figure.canvas.draw()
    maps = {axes.get_title(): axes for axes in figure.axes if axes.images}
    assert list(maps) == ["KL, nats", *(f"probability of {token!r}" for token in "abc")]
    for index, axes in enumerate(maps.values()):
        (image,) = axes.images
        for column, one in enumerate(found):
            values = [p.kl if index == 0 else p.tracked[index - 1] for p in one.patches]
            assert list(image.get_array()[:, column]) == values
        names = [text.get_text() for text in axes.get_xticklabels()]
        assert names == ["'_' in 'y'", "'1'", "'^'", "' '", "'$'"]
        assert [text.get_text() for text in axes.get_yticklabels()] == ["0", "1", "2", "3"]
    marks = [axes.lines[0].get_ydata()[0] for axes in figure.axes if axes.lines]
    assert marks == [max(value, 1e-4) for value in found[0].target_tracked]


@pytest.mark.slow
def test_layer_23_has_the_capitals(smollm2: Path) -> None:
    """Layer 23 carries the capital; measured by hand, independently of `trace`."""
    model, tokenizer = load_base_model(str(smollm2))
    found = trace(
        model, tokenizer, "The capital of France is", "The capital of Germany is",
        tracked=[" Paris", " Berlin"],
    )  # fmt: skip
    assert found.target_tracked == pytest.approx([0.007, 0.80], abs=0.005)
    assert [patch.layers for patch in found.decisive] == [[23]]
    assert found.strongest is found.patches[23]
    assert found.patches[23].tracked == pytest.approx([0.84, 0.001], abs=0.005)
    assert {patch.top for patch in found.patches if patch.layers != [23]} == {" Berlin"}


def test_bos_is_read_and_counted() -> None:
    model, tokenizer = tiny.model(vocab_size=258), tiny.bos_tokenizer()
    found = trace(model, tokenizer, "abc", "xyz", source_position=1, tracked=["c"])
    assert (found.source, found.target) == (["<bos>", *"abc"], ["<bos>", *"xyz"])
    assert (found.source_positions, found.target_positions) == ([1], [3])
    assert found.tracked == ["c"]  # a token that follows, not BOS
    for text, value in (("abc", found.source_tracked), ("xyz", found.target_tracked)):
        logits = model(**tokenizer(text, return_tensors="pt")).logits[0, -1]
        letter = tokenizer.convert_tokens_to_ids("c")
        assert value == pytest.approx([logits.double().softmax(-1)[letter].item()])
    for reading, tokens in ((PLAIN, list("abc")), (CHAT, ["<bos>", *"user:abc;me:"])):
        assert trace(model, tokenizer, "abc", "xyz", reading=reading).source == tokens


def test_another_relation(model: Any, tokenizer: Any) -> None:
    """The subject is what differs; its text is patched in like the source is."""
    found = trace(model, tokenizer, "abcd efg", "abcd uv", cross_relation="the {} of")
    assert found.cross is not None
    assert (found.cross.subject, found.cross.text) == ("efg", "the efg of")
    alone = trace(model, tokenizer, "the efg of", "abcd uv")
    assert found.cross.tops == [patch.top for patch in alone.patches]
    assert found.cross.top == alone.source_top
    assert trace(model, tokenizer, "abcd efg", "abcd uv").cross is None


def test_the_subject(model: Any, tokenizer: Any) -> None:
    for source, target, subject in (
        ("of the big city is", "of Rome is", "the big city"),
        ("a b", "c b", "a"),
        ("a a b", "a b", "a"),
    ):
        found = trace(model, tokenizer, source, target, cross_relation="{}!{}")
        assert found.cross is not None
        assert (found.cross.subject, found.cross.text) == (subject, f"{subject}!{subject}")
    with pytest.raises(TransferError, match="has no subject of its own"):
        trace(model, tokenizer, "a b", "a b", cross_relation="{}")
    with pytest.raises(TransferError, match=r"write \{\} for the subject"):
        trace(model, tokenizer, "a b", "c b", cross_relation="x")


def traced(cross: CrossRelation | None, *tops: str) -> Trace:
    """A trace from A, after which a comes, to B, after which b comes."""
    patches = [Patch([n], [0.0], 1.0 + n, top) for n, top in enumerate(tops)]
    return Trace(["A"], ["of", " B"], [0], [1], ["a"], [1.0], [0.0], "a", "b", 1, patches, cross)


def test_what_it_finds() -> None:
    begin = "The attention of layer 1 at token 1 ' B' carries "
    subject = CrossRelation("the A", "A", "x", ["b", "a"])
    assert traced(subject, "b", "a").finding == (
        f"{begin}the subject 'A': taken from 'the A', it puts 'a' on top as well."
    )
    for cross, top in (
        (CrossRelation("the A", "A", "x", ["a", "x"]), "x"),  # the fact goes along
        (CrossRelation("the A", "A", "x", ["a", "b"]), "b"),
        (CrossRelation("the A", "A", "a", ["b", "a"]), "a"),  # the text itself says the same
    ):
        assert traced(cross, "b", "a").finding == (
            f"{begin}what differs between the two texts: "
            f"taken from 'the A', it puts {top!r} on top."
        )
    assert traced(None, "b", "a").finding == (
        f"{begin}what differs between the two texts: it puts 'a' on top."
    )
    assert traced(subject, "b", "b").finding == (
        "No layer changes the answer, which stays 'b'; layer 1 changes it most (KL 2.0000)."
    )
