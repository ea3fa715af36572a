"""Static caches and compiled decode steps: the tokens that a dynamic cache gives, in one graph.

``fullgraph=True`` proves that nothing in a step waits for a value on the device, which a CUDA graph
could not capture: torch.compile would have to break the graph there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from transformers import CompileConfig, StaticCache

import npt_fast as npt
from npt_fast.hf.convert import components
from tests.hf.test_convert import FAMILIES, PROMPT, converted, randomize, tiny
from tests.transfer.models import converted as transfer_model
from tests.transfer.models import ids_of, tokenizer

NEW = 5
close = torch.testing.assert_close
LAYERS = (0, 2, 3)


class Graphs:
    """A backend of torch.compile that runs graphs as they are, and keeps them."""

    def __init__(self) -> None:
        self.made: list[fx.GraphModule] = []

    def __call__(self, graph: fx.GraphModule, _: Any) -> Callable[..., Any]:
        self.made.append(graph)
        return graph.forward

    def __deepcopy__(self, _: Any) -> Graphs:  # generate copies its options
        return self


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


def generated(model: Any, ids: Tensor = PROMPT, **options: Any) -> Tensor:
    found: Tensor = model.generate(
        ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0, **options
    )
    return found[:, ids.shape[1] :]


def logits_of(model: Any, ids: Tensor, options: Any) -> Tensor:
    found = model.generate(
        ids,
        max_new_tokens=3,
        min_new_tokens=3,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return torch.stack(found.logits)


def compiled_generate(graphs: Graphs) -> dict[str, Any]:
    """Options with which `generate` compiles its decode step, as it does by itself on a GPU."""
    config = CompileConfig(fullgraph=True, backend=graphs, mode=None)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


@torch.no_grad()
def decoded(model: Any, step: Callable[..., Any]) -> Tensor:
    """Logits of greedy decoding with a StaticCache: the prompt by the model itself, then steps."""
    cache = StaticCache(config=model.config, max_cache_len=32)
    logits = [model(PROMPT, past_key_values=cache, use_cache=True).logits[:, -1:]]
    for _ in range(NEW):
        token = logits[-1].argmax(-1)
        logits.append(step(input_ids=token, past_key_values=cache, use_cache=True).logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("residual", ["removed", "kept"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_static_cache_gives_the_tokens_of_a_dynamic_one(family: str, residual: str) -> None:
    model = converted(family, layers=LAYERS, residual=residual)
    assert torch.equal(generated(model, cache_implementation="static"), generated(model))


def test_rows_of_a_padded_batch_keep_their_tokens() -> None:
    model = converted(layers=LAYERS)
    ids = torch.cat([PROMPT, PROMPT.flip(1)])
    mask = torch.ones_like(ids)
    ids[1, :2], mask[1, :2] = 0, 0
    dynamic = generated(model, ids, attention_mask=mask)
    static = generated(model, ids, attention_mask=mask, cache_implementation="static")
    assert torch.equal(static, dynamic)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_generate_compiles_a_decode_step_into_one_graph(family: str) -> None:
    model, graphs = converted(family, layers=LAYERS), Graphs()
    expected = generated(model)
    assert torch.equal(generated(model, **compiled_generate(graphs)), expected)
    assert len(graphs.made) == 1


def test_a_compiled_step_of_a_loaded_16_bit_model_is_one_graph(tmp_path: Path) -> None:
    npt.save(converted(layers=LAYERS), tmp_path / "saved")
    model, graphs = npt.load(tiny().to(torch.bfloat16), tmp_path / "saved"), Graphs()
    step = torch.compile(model.forward, backend=graphs, fullgraph=True)
    close(decoded(model, step), decoded(model, model))
    assert len(graphs.made) == 1


def test_a_compiled_step_sees_what_is_changed_after_it(tmp_path: Path) -> None:
    """A layer that is switched off, and float32 factors that are written or loaded."""
    model, graphs = tiny(), Graphs()
    del model.model.layers[2:]
    model.config.num_hidden_layers = 2
    npt.convert(model, npt.NPTConfig(layers=[0, 1], rank=4))
    npt.save(randomize(model), tmp_path / "saved")
    model.to(torch.bfloat16)
    for part in components(model).values():
        part.float()
    step = torch.compile(model.forward, backend=graphs, fullgraph=True)
    close(decoded(model, step), decoded(model, model))
    seen = [decoded(model, step)]
    with npt.disabled(model, [0]):
        seen.append(decoded(model, step))
        close(seen[-1], decoded(model, model))
    close(decoded(model, step), seen[0])
    for part in components(model).values():
        for parameter in part.parameters():
            parameter.data.mul_(1.5)
    seen.append(decoded(model, step))
    close(seen[-1], decoded(model, model))
    npt.load(model, tmp_path / "saved")
    close(decoded(model, step), decoded(model, model))
    assert len({str(logits.tolist()) for logits in seen}) == len(seen)


def test_layers_with_other_shapes_are_one_graph() -> None:
    model, graphs = tiny(), Graphs()
    npt.convert(model, npt.NPTConfig(layers=[0], rank=3, modulation="single"))
    npt.convert(model, npt.NPTConfig(layers=[1], rank=2, num_ranks=4, modulation="dual"))
    npt.convert(model, npt.NPTConfig(layers=[3], rank=5, modulation="triple", residual="kept"))
    randomize(model)
    step = torch.compile(model.forward, backend=graphs, fullgraph=True)
    close(decoded(model, step), decoded(model, model))
    assert len(graphs.made) == 1


@pytest.mark.parametrize("compiled", [False, True])
def test_an_injection_acts_with_a_static_cache_or_is_refused(compiled: bool) -> None:
    """Into the prompt always; into generated tokens only where their steps are not compiled."""
    model, ids = transfer_model(), ids_of("the red house")
    modulation = npt.extract(model, tokenizer, "a blue car")
    options = compiled_generate(Graphs()) if compiled else {"cache_implementation": "static"}
    plain = logits_of(model, ids, options)  # compiles the decode step

    def run(when: Any, options: Any) -> Tensor:
        with npt.inject(model, modulation, strength=9.0, when=when):
            return logits_of(model, ids, options)

    expected = run("prefill", {})
    assert (expected - plain).norm() > 1e-3 * plain.norm()
    close(run("prefill", options), expected)
    if compiled:
        with pytest.raises(npt.TransferError, match=r"torch\.compile leaves hooks out"):
            run("both", options)
    else:
        close(run("both", options), run("both", {}))


@pytest.mark.slow
def test_inductor_gives_the_same_tokens() -> None:
    """An NP layer and a layer of the base, which is all that there is to compile."""
    model = converted(layers=(0,))
    del model.model.layers[2:]
    model.config.num_hidden_layers = 2
    step = torch.compile(model.forward, fullgraph=True)
    close(decoded(model, step), decoded(model, model))
