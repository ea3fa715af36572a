"""The first hour of a researcher, as a script: each step is at most five lines, on a tiny model."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    TrainerCallback,
    TrainingArguments,
)

import npt_fast as npt
from npt_fast.checkpoint.training_log import read_log
from npt_fast.pictures import figure
from npt_fast.pictures.runs import draw_runs
from tests.training import tiny

TEXT = "The capital of France is"
Step = Callable[[Any], None]
STEPS: list[Step] = []
"""Steps in their order; each takes the names that the ones before have left."""


def step(function: Step) -> Step:
    STEPS.append(function)
    return function


class Steps(TrainerCallback):
    """Keeps the number of each step that a trainer takes."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.seen.append(state.global_step)


@step
def load_a_base_model(s: Any) -> None:
    s.model = AutoModelForCausalLM.from_pretrained("base")
    s.tokenizer = AutoTokenizer.from_pretrained("base")
    s.rows = [{"input_ids": s.tokenizer(f"{n} {TEXT}").input_ids} for n in range(8)]
    s.collate = DataCollatorForLanguageModeling(s.tokenizer, mlm=False)


@step
def convert(s: Any) -> None:
    npt.convert(s.model, npt.NPTConfig(layers=1, rank=4))
    s.step = npt.Distillation(s.model)


@step
def train_in_a_loop(s: Any) -> None:
    optimizer = torch.optim.AdamW(npt.trainable_parameters(s.model), lr=1e-2)
    for batch in DataLoader(s.rows, batch_size=4, collate_fn=s.collate):
        s.step(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@step
def train_with_trainer(s: Any) -> None:
    s.steps = Steps()
    settings = TrainingArguments("run", max_steps=3, report_to="none", use_cpu=True)
    given = {"train_dataset": s.rows, "data_collator": s.collate, "callbacks": [s.steps]}
    npt.NPTTrainer(s.model, settings, **given).train()


@step
def save(s: Any) -> None:
    npt.save(s.model, "layer1")


@step
def load_elsewhere(s: Any) -> None:
    s.other = AutoModelForCausalLM.from_pretrained("base")
    npt.load(s.other, "layer1")


@step
def train_another_layer(s: Any) -> None:
    options = npt.TrainOptions(
        train_layers=2, data="text.txt", output_dir="layer2", model_name="base", **s.quick
    )
    s.report = npt.train(options, callbacks=[s.steps])


@step
def merge(s: Any) -> None:
    s.merged = npt.merge(["layer1", s.report.checkpoint], "merged", verify=True)
    npt.load(s.other, "merged", layers="1-2", dtype=torch.float32)


@step
def inject(s: Any) -> None:
    s.modulation = npt.extract(s.other, s.tokenizer, TEXT, layers="1,2")
    prompt = s.tokenizer("The capital of Germany is", return_tensors="pt")
    with npt.inject(s.other, 20 * s.modulation / 2) as s.hits:
        s.injected = s.other(**prompt).logits


@step
def generate(s: Any) -> None:
    prompt = s.tokenizer("The capital of Germany is", return_tensors="pt")
    s.plain = s.other(**prompt).logits
    s.tokens = s.other.generate(**prompt, max_new_tokens=5)


@step
def export(s: Any) -> None:
    npt.export("merged", "served", verify=True)
    s.served = AutoModelForCausalLM.from_pretrained("served", dtype=torch.float32)


@step
def plot(s: Any) -> None:
    figure.save(draw_runs([read_log("layer2")]), "losses.png")


@pytest.fixture(scope="module")
def hour(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The names that the steps leave, and ``folder`` with their files."""
    folder = tmp_path_factory.mktemp("hour")
    tiny.save(folder / "base", initializer_range=0.2)
    (folder / "text.txt").write_text("some words of a text " * 40)
    quick = {
        **{"max_steps": 4, "max_length": 24, "num_eval_samples": 2, "np_rank": 4, "num_ranks": 1},
        **{"batch_size": 2, "logging_steps": 1, "generation_steps": 0, "eval_steps": 2},
        **{"cpu": True, "learning_rate": 1e-2},
    }
    found = SimpleNamespace(folder=folder, quick=quick)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        torch.manual_seed(0)
        for each in STEPS:
            each(found)
    return found


@pytest.mark.parametrize("each", STEPS, ids=lambda each: each.__name__)
def test_a_step_is_at_most_five_lines(each: Step) -> None:
    (function,) = ast.parse(inspect.getsource(each)).body
    assert isinstance(function, ast.FunctionDef)
    end = function.end_lineno
    assert end is not None and end - function.body[0].lineno < 5


def test_training_changes_the_layers(hour: Any) -> None:
    fresh = npt.convert(tiny.model(initializer_range=0.2), npt.NPTConfig(layers=1, rank=4))
    for trained, start in zip(
        npt.trainable_parameters(hour.model), npt.trainable_parameters(fresh), strict=True
    ):
        assert trained.shape == start.shape and trained.isfinite().all()
    w_b = [p for n, p in hour.model.named_parameters() if "w_b" in n]
    assert w_b and all(p.count_nonzero() for p in w_b)  # they are 0 before
    assert hour.steps.seen == [1, 2, 3, 1, 2, 3, 4]  # of both runs


def test_layers_are_the_same_elsewhere(hour: Any) -> None:
    other = npt.load(tiny.model(initializer_range=0.2), hour.folder / "layer1", trainable=True)
    for ours, theirs in zip(
        npt.trainable_parameters(other), npt.trainable_parameters(hour.model), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_the_merge_has_both_layers(hour: Any) -> None:
    assert [layer.layer for layer in hour.merged.layers] == [1, 2]
    assert npt.verify(hour.folder / "merged").passed
    assert [status.layer for status in npt.status(hour.other)] == [1, 2]


def test_the_injection_acts_on_the_last_token(hour: Any) -> None:
    assert hour.hits.layers == [1, 2] and hour.hits.count == 2
    assert torch.equal(hour.injected[:, :-1], hour.plain[:, :-1])
    assert not torch.allclose(hour.injected[:, -1], hour.plain[:, -1])
    assert hour.tokens[0, -5] == hour.plain[0, -1].argmax()


def test_the_export_is_the_same_model(hour: Any) -> None:
    ids = hour.tokenizer("The capital of Germany is", return_tensors="pt").input_ids
    assert torch.equal(hour.served(ids).logits, hour.other(ids).logits)


def test_what_is_shown(hour: Any) -> None:
    assert (hour.folder / "losses.png").read_bytes().startswith(b"\x89PNG")
    for shown in (hour.report, hour.report.evaluation, hour.merged, hour.modulation):
        assert len(repr(shown).splitlines()) == 1 and len(repr(shown)) < 400
        assert "<table>" in shown._repr_html_() and "<script" not in shown._repr_html_()
