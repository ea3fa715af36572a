"""Texts that a model continues, and windows that it is measured on, as the tokenizer makes them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import npt_fast as npt
from npt_fast.hf.tokenizer import PLAIN, Reading
from npt_fast.training import evaluation
from npt_fast.training.evaluation import continue_text, evaluate
from npt_fast.training.other_texts import read_text
from tests.training import tiny
from tests.training.texts import random_texts, write_texts


@pytest.mark.parametrize("template", ["<bos> $A", "<bos> $A <eos>"])
def test_a_prompt_is_what_the_model_goes_on_with(template: str) -> None:
    """BOS in front if the tokenizer puts it there, and no EOS behind, after which nothing comes."""
    model = tiny.model(vocab_size=258, initializer_range=0.2, eos_token_id=None)
    tokenizer: Any = tiny.bos_tokenizer(template)
    for reading, text in (
        (Reading(), "<bos>abc"), (PLAIN, "abc"), (Reading(chat=True), "<bos>user:abc;me:")
    ):  # fmt: skip
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        told = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
        expected = tokenizer.decode(told, skip_special_tokens=True)
        assert continue_text(model, tokenizer, "abc", 5, reading) == expected


@pytest.mark.parametrize("special_tokens", [True, False])
def test_the_windows_have_bos_or_not(
    special_tokens: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_texts(tmp_path / "a.jsonl", random_texts(40))
    model, tokenizer = tiny.model(vocab_size=258), tiny.bos_tokenizer()
    npt.convert(model, npt.NPTConfig(layers=[1], rank=2))
    seen: list[int] = []
    measure = evaluation.evaluate_windows

    def spy(distillation: Any, windows: Any, **options: Any) -> Any:
        seen.extend(token for window in windows for token in window["input_ids"].tolist())
        return measure(distillation, windows, **options)

    monkeypatch.setattr(evaluation, "evaluate_windows", spy)
    evaluate(model, tokenizer, str(source), windows=3, max_length=48, special_tokens=special_tokens)
    assert (257 in seen) == special_tokens


def test_a_text_of_another_kind_is_measured_as_torch_would(tmp_path: Path) -> None:
    source = write_texts(tmp_path / "a.jsonl", random_texts(40))
    model, tokenizer = tiny.model(vocab_size=258, initializer_range=0.2), tiny.bos_tokenizer()
    npt.convert(model, npt.NPTConfig(layers=[1, 2], rank=2, init="improved"))
    found = evaluate(model, tokenizer, str(source), windows=3, max_length=48)
    # the first 2,048 of 3,934 bytes; a window is as long as the context
    ids = tokenizer(read_text("french"), return_tensors="pt").input_ids[0, :2048].view(8, 256)
    with torch.no_grad():
        student = model(ids).logits.double().log_softmax(-1)
        with npt.disabled(model):
            teacher = model(ids).logits.double().log_softmax(-1)
    kl = (teacher.exp() * (teacher - student)).sum(-1).mean()
    losses = [
        -logs[:, :-1].gather(-1, ids[:, 1:, None]).mean().item() for logs in (student, teacher)
    ]
    french = found.texts["french"]
    assert french.tokens == 2048
    assert french.kl == pytest.approx(kl.item(), rel=1e-4) and french.kl > 1e-3
    assert french.perplexity_ratio == pytest.approx(math.exp(losses[0] - losses[1]), rel=1e-5)
    assert found.worst == {
        name: max(getattr(text, name) for text in found.texts.values())
        for name in ("kl", "perplexity_ratio")
    }


def test_windows_of_one_token() -> None:
    model, tokenizer = tiny.model(), tiny.tokenizer()
    npt.convert(model, npt.NPTConfig(layers=[1], rank=2))
    with pytest.raises(npt.DataError, match="no row has a second token that counts"):
        evaluate(model, tokenizer, ["a text"] * 9, windows=2, max_length=1)


def test_a_model_in_a_wrapper(tmp_path: Path) -> None:
    source = write_texts(tmp_path / "a.jsonl", random_texts(40))
    model, tokenizer = tiny.model(vocab_size=258), tiny.bos_tokenizer()
    npt.convert(model, npt.NPTConfig(layers=[1], rank=2))
    expected = evaluate(model, tokenizer, source, windows=4, max_length=32)
    wrapped = torch.nn.DataParallel(model)
    assert evaluate(wrapped, tokenizer, source, windows=4, max_length=32) == expected
