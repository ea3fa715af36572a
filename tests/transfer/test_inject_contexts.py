"""Injections in contexts: nested, in other threads, with several prompts, compiled, and hooked."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

import pytest
import torch
from torch import Tensor

import npt_fast as npt
from npt_fast.config import InjectionMode
from npt_fast.hf.convert import decoder_layers
from tests.transfer.injected import IDS, MODES, close
from tests.transfer.models import (
    SOURCE,
    TEXT,
    Vectors,
    assert_same,
    converted,
    greedy,
    hooks,
    logits,
    random_modulation,
    spelled_out,
    tokenizer,
)


def test_injections_nest() -> None:
    model = converted()
    a, b = npt.extract(model, tokenizer, SOURCE), random_modulation(layers=(2,))
    plain = logits(model, IDS)
    with npt.inject(model, a, position=3):
        alone = logits(model, IDS)
        with npt.inject(model, b, position=[5, -1]):
            both = logits(model, IDS)
        assert torch.equal(logits(model, IDS), alone)
    assert torch.equal(logits(model, IDS), plain) and not hooks(model)

    def rule(layer: int, row: int, t: int, name: str, own: Vectors | None) -> Tensor | None:
        source = {3: a, 5: b, 12: b}.get(t)
        if source is None or layer not in source.layers:
            return None
        return source.dense(layer, name)

    with spelled_out(model, rule):
        close(both, logits(model, IDS))


def test_where_two_meet_the_inner_one_acts_on_what_the_outer_one_made() -> None:
    model = converted()
    a, b = random_modulation(1), random_modulation(2)
    with npt.inject(model, a + b, mode="exact-add", position="all"):
        expected = logits(model, IDS)
    with npt.inject(model, a, mode="exact-add", position="all"):
        with npt.inject(model, b, mode="exact-add", position="all"):
            close(logits(model, IDS), expected)
    with npt.inject(model, 0.7 * a + 0.3 * b):
        expected = logits(model, IDS)
    with npt.inject(model, a), npt.inject(model, b, mode="exact-blend", strength=0.3):
        close(logits(model, IDS), expected)


@pytest.mark.parametrize("mode", ["replace", "blend", "add"])
def test_an_inner_one_that_would_drop_the_outer_one_is_refused(mode: InjectionMode) -> None:
    model = converted()
    a, b = npt.extract(model, tokenizer, SOURCE), npt.extract(model, tokenizer, "a boat")
    message = f"two injections meet at one token of layer 1, where {mode} would drop"
    with pytest.raises(npt.TransferError, match=message):
        with npt.inject(model, a, position=[2, 3]), npt.inject(model, b, position=3, mode=mode):
            logits(model, IDS)
    assert not hooks(model)
    # of other projections nothing is lost
    gate, up = (random_modulation(projections=(name,)) for name in ("gate", "up"))
    with npt.inject(model, gate), npt.inject(model, up):
        found = logits(model, IDS)
    sources = {"gate": gate, "up": up}

    def rule(layer: int, row: int, t: int, name: str, own: Vectors | None) -> Tensor | None:
        return sources[name].dense(layer, name) if t == 12 and name in sources else None

    with spelled_out(model, rule):
        close(found, logits(model, IDS))


def test_it_acts_in_its_own_thread() -> None:
    model = converted()
    m = random_modulation()
    plain = logits(model, IDS)
    with ThreadPoolExecutor(1) as others:
        with npt.inject(model, m):
            injected = logits(model, IDS)
            assert torch.equal(others.submit(logits, model, IDS).result(), plain)
            context = copy_context()  # as asyncio.to_thread does
            assert torch.equal(others.submit(context.run, logits, model, IDS).result(), injected)
        with pytest.raises(
            npt.TransferError, match="did not run within the context, in its thread"
        ):
            with npt.inject(model, m):
                others.submit(logits, model, IDS).result()


def test_a_prompt_that_grows_by_one_token_is_refused_where_it_matters() -> None:
    """Without a cache and outside `generate`, it could be the last prompt and a generated token."""
    model = converted()
    m = random_modulation()
    with pytest.raises(npt.TransferError, match="cannot tell whether this is a longer prompt"):
        with npt.inject(model, m):
            logits(model, IDS[:, :7])
            logits(model, IDS[:, :8])
    with npt.inject(model, m, position=2):  # the same token either way
        logits(model, IDS[:, :7])
        found = logits(model, IDS[:, :8])
    with npt.inject(model, m, position=2):
        assert torch.equal(found, logits(model, IDS[:, :8]))
    with npt.inject(model, m) as hits:  # each call of `generate` begins a prompt
        for length in (7, 8):
            greedy(model, {"input_ids": IDS[:, :length]}, 1, use_cache=False)
            assert hits.positions == [[length - 1]]


def test_what_is_compiled_is_named() -> None:
    model, m = converted(), random_modulation()
    compiled: Any = torch.compile(model, backend="eager")
    compiled(IDS)
    with pytest.raises(
        npt.TransferError, match=r"the model is compiled, and torch\.compile leaves"
    ):
        with npt.inject(compiled, m):
            compiled(IDS)
    with pytest.raises(npt.TransferError, match=r"in its thread and without torch\.compile"):
        with npt.inject(model, m):
            compiled(IDS)
    torch.compiler.reset()


@pytest.mark.parametrize("mode", MODES)
def test_projections_that_are_called(mode: InjectionMode) -> None:
    """With hooks on the MLP, each is called once, and other tokens keep their bits."""
    model = converted()
    m = npt.extract(model, tokenizer, SOURCE)
    with npt.inject(model, m, position=[3, 5], mode=mode, strength=0.5):
        expected = logits(model, IDS)
    calls: list[tuple[int, ...]] = []
    for layer in decoder_layers(model):
        layer.get_submodule("mlp").register_forward_hook(
            lambda _, args, y: calls.append(tuple(args[0].shape))
        )
    plain = logits(model, IDS)
    calls.clear()
    with npt.inject(model, m, position=[3, 5], mode=mode, strength=0.5):
        found = logits(model, IDS)
    assert calls == [(1, 13, 32)] * 4
    close(found, expected)
    assert torch.equal(found[:, :3], plain[:, :3])


def test_compiled_layers_are_named() -> None:
    model, m = converted(), random_modulation()
    layers = decoder_layers(model)
    for index, layer in enumerate(layers):
        layers[index] = torch.compile(layer, backend="eager")
    logits(model, IDS)
    with pytest.raises(npt.TransferError, match="the model is compiled"), npt.inject(model, m):
        logits(model, IDS)
    with torch.no_grad():  # as extract runs it, so that nothing is compiled anew
        model.get_decoder()(input_ids=IDS, use_cache=False)
    with pytest.raises(npt.ModelError, match="the layers are compiled"):
        npt.extract(model, tokenizer, TEXT)
    torch.compiler.reset()


def test_a_model_in_a_wrapper() -> None:
    model, m = converted(), random_modulation()
    wrapped = torch.nn.DataParallel(model)
    with npt.inject(model, m):
        expected = logits(model, IDS)
    with npt.inject(wrapped, m):
        assert torch.equal(logits(wrapped, IDS), expected)
    extracted = npt.extract(wrapped, tokenizer, SOURCE)
    assert_same(extracted, npt.extract(model, tokenizer, SOURCE))
