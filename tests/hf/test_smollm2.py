"""The two real checkpoints in the real model, compared with numbers of another implementation.

The expected numbers come with the checkpoints. Their makers computed them with code of their own,
in the form of the definition, with v_a and v_b materialised.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import npt_fast as npt
from tests.conftest import DATA

pytestmark = pytest.mark.slow
TEXT = (
    "The capital of France is Paris, and the capital of Germany is Berlin. Both cities lie on "
    "rivers: Paris on the Seine, Berlin on the Spree. Trains between them take about eight hours, "
    "and most travellers change in Cologne or Frankfurt on the way. In winter the days are short "
    "in both places, but the museums are open and the cafes are full."
)
# layers in NPT mode -> loss, KL(base, NPT), top-1 agreement, first logits at the last position
EXPECTED = {
    (): (3.14299, 0.0, 1.0, None),
    (13,): (3.11925, 0.05199, 0.908, (3.36305, 1.27976, 8.73880)),
    (11,): (3.14541, 0.06666, 0.829, (3.36505, 1.41717, 8.77233)),
    (11, 13): (3.12246, 0.13370, 0.803, (3.65184, 1.23310, 8.65883)),
}


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("merge") / "merged_11_13"
    inputs = [DATA / "layer11" / "checkpoint-800", DATA / "layer13" / "checkpoint-600"]
    npt.merge(inputs, output, verify=True)
    return output


@pytest.fixture(scope="module")
def model_and_tokenizer(smollm2: Path, merged: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    return npt.load(model.eval(), merged), AutoTokenizer.from_pretrained(smollm2)


@pytest.mark.parametrize("on", EXPECTED, ids=str)
def test_figures_of_the_checkpoints_makers(
    model_and_tokenizer: tuple[Any, Any], on: tuple[int, ...]
) -> None:
    model, tokenizer = model_and_tokenizer
    ids = tokenizer(TEXT, add_special_tokens=False, return_tensors="pt").input_ids
    assert ids.shape == (1, 76) and ids[0, :4].tolist() == [504, 3575, 282, 4649]
    off = [layer for layer in (11, 13) if layer not in on]
    with torch.no_grad():
        with npt.disabled(model):
            base = model(ids, use_cache=False).logits
        with npt.disabled(model, off) if off else nullcontext():
            out = model(ids, labels=ids, use_cache=False)
    loss, divergence, agreement, first = EXPECTED[on]
    p, q = base.log_softmax(-1), out.logits.log_softmax(-1)
    assert out.loss.item() == pytest.approx(loss, abs=1e-4)
    assert (p.exp() * (p - q)).sum(-1).mean().item() == pytest.approx(divergence, abs=1e-4)
    same = (base.argmax(-1) == out.logits.argmax(-1)).double().mean().item()
    assert same == pytest.approx(agreement, abs=5e-4)
    if first is not None:
        assert out.logits[0, -1, :3].tolist() == pytest.approx(first, abs=1e-3)


def test_generation(model_and_tokenizer: tuple[Any, Any]) -> None:
    model, tokenizer = model_and_tokenizer
    prompt = tokenizer("The capital of France is", return_tensors="pt", add_special_tokens=False)
    options = {"max_new_tokens": 6, "do_sample": False}
    cached = model.generate(**prompt, **options)
    assert torch.equal(cached, model.generate(**prompt, use_cache=False, **options))
    assert tokenizer.decode(cached[0]).startswith("The capital of France is Paris")
