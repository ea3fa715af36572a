"""`NPTTrainer` and `Distillation` with the parts of transformers, and loops of one's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    DataCollatorForLanguageModeling,
    EarlyStoppingCallback,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

import npt_fast as npt
from npt_fast.hf.convert import components
from tests.checkpoints import assert_same_tensors, read_weights
from tests.training import runs, tiny
from tests.training.relative import named, relative_step
from tests.training.runs import Place

ROWS = [tiny.tokenizer()(f"{n}: some words of a text"[: 12 + n % 9]).input_ids for n in range(16)]
ROWS = [{"input_ids": ids} for ids in ROWS]
COLLATE = DataCollatorForLanguageModeling(tiny.tokenizer(), mlm=False)


def converted(**changes: Any) -> Any:
    model = tiny.model(initializer_range=0.2)
    config = npt.NPTConfig(**{"layers": [1, 2], "rank": 3, "num_ranks": 2, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return npt.convert(model, config)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {
        f"{n}.{name}": tensor.detach().clone()
        for n, part in components(model).items()
        for name, tensor in part.named_parameters()
    }


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "max_steps": 4,
        "logging_steps": 1,
        "save_steps": 100,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return TrainingArguments(str(folder), **{**settings, **changes})


def trainer(model: Any, folder: Path, **changes: Any) -> Any:
    given = {name: changes.pop(name) for name in ("callbacks", "eval_dataset") if name in changes}
    return npt.NPTTrainer(
        model,
        arguments(folder, **changes),
        train_dataset=ROWS,
        data_collator=COLLATE,
        curriculum_stages="student:1",
        **given,
    )


def test_the_loss_is_a_loop_of_ones_own(tmp_path: Path) -> None:
    """AdamW and clipping of each layer, written out with torch alone."""
    one, other = converted(), converted()
    trainer(npt.Distillation(one), tmp_path, max_steps=1, per_device_train_batch_size=16).train()
    step = npt.Distillation(other)
    step.fit([COLLATE(ROWS[:8]), COLLATE(ROWS[8:])])
    parameters = [p for p in step.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    step(**COLLATE(ROWS)).loss.backward()
    for part in components(other).values():
        torch.nn.utils.clip_grad_norm_(part.parameters(), 1.0)
    relative_step(optimizer, named(other))
    for name, found in weights(one).items():
        torch.testing.assert_close(found, weights(other)[name], rtol=1e-3, atol=1e-5, msg=name)


def test_labels_say_which_tokens_count() -> None:
    step = npt.Distillation(converted(init="improved", init_scale=0.5), virtual_stride=0)
    batch = default_data_collator([{"input_ids": row["input_ids"][:12]} for row in ROWS[:2]])
    plain = step(**batch)
    same = step(**batch, labels=batch["input_ids"])
    assert plain.tokens == same.tokens == 24
    torch.testing.assert_close(same.total, plain.total, rtol=0, atol=0)
    labels = batch["input_ids"].clone()
    labels[0], labels[1, 5:] = -100, -100
    some = step(**batch, labels=labels)
    assert some.tokens == 5
    # causal: the first five tokens of the row alone give the same
    alone = step(batch["input_ids"][1:, :5])
    for layer, error in alone.direct.items():
        torch.testing.assert_close(some.direct[layer], error, rtol=1e-5, atol=1e-6)
    assert some.total < plain.total
    torch.testing.assert_close(some.loss, some.total / 5)


@pytest.mark.parametrize("size", [1, 2, 8])
def test_accumulation_is_exact(tmp_path: Path, size: int) -> None:
    changes = {"max_steps": 1, "gradient_accumulation_steps": 8 // size, "max_grad_norm": 0.0}
    found = []
    for batch in (8, size):
        model = converted()
        done = trainer(
            model,
            tmp_path,
            **{
                **changes,
                "per_device_train_batch_size": batch,
                "gradient_accumulation_steps": 8 // batch,
            },
        )
        done.train()
        states = done.optimizer.optimizer.state
        found.append(torch.cat([states[p]["exp_avg"].ravel() for p in states]))
    assert (found[0] - found[1]).norm() < 1e-5 * found[0].norm()


def test_checkpoints_hold_np_layers_and_resume(tmp_path: Path) -> None:
    model = converted()
    whole = trainer(model, tmp_path, save_steps=2)
    whole.train()
    folder = tmp_path / "checkpoint-2"
    names = {path.name for path in folder.iterdir()}
    assert {"npt_weights.safetensors", "npt_config.json", "trainer_state.json"} <= names
    assert not {"model.safetensors", "training_args.bin"} & names
    half = npt.load(tiny.model(initializer_range=0.2), folder)
    assert list(components(half)) == [1, 2]
    rest = converted()
    again = trainer(rest, tmp_path / "again", save_steps=2)
    again.train(resume_from_checkpoint=str(folder))
    assert again.state.global_step == 4
    assert_same_tensors(weights(rest), weights(model))
    assert not torch.equal(weights(half)["1.w_down"], weights(model)["1.w_down"])
    again.save_model(str(tmp_path / "saved"))
    found = npt.load(tiny.model(initializer_range=0.2), tmp_path / "saved")
    assert_same_tensors(weights(found), weights(model))


def test_evaluation_and_the_best_model(tmp_path: Path) -> None:
    model = converted(init="improved", init_scale=0.5)
    use_cache = model.config.use_cache
    done = trainer(
        model, tmp_path, eval_dataset=ROWS[:6], eval_strategy="steps", eval_steps=1, save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="eval_kl", learning_rate=1.0,
        greater_is_better=False,
    )  # fmt: skip
    done.train()
    assert model.config.use_cache == use_cache
    found = done.evaluate()
    logged = [line["eval_kl"] for line in done.state.log_history if "eval_kl" in line]
    assert len(set(logged)) > 2 and logged.index(min(logged)) != 3
    assert found["eval_kl"] == pytest.approx(min(logged), rel=1e-5)
    # the truth: probabilities of both models, in float64
    kl, tokens = 0.0, 0
    for row in ROWS[:6]:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            student = model(ids).logits.double().log_softmax(-1)
            with npt.disabled(model):
                teacher = model(ids).logits.double().log_softmax(-1)
        kl += (teacher.exp() * (teacher - student)).sum().item()
        tokens += ids.numel()
    assert found["eval_tokens"] == tokens
    assert found["eval_kl"] == pytest.approx(kl / tokens, rel=1e-4)
    assert {"eval_perplexity", "eval_loss", "eval_direct_layer_1"} <= found.keys()


def test_a_model_without_layers_to_train(tmp_path: Path) -> None:
    model = tiny.model().requires_grad_(False)
    with pytest.raises(npt.ModelError, match="has no NP layers that require gradients; npt"):
        npt.NPTTrainer(model, arguments(tmp_path))


@pytest.mark.parametrize(
    ("changes", "given", "message"),
    [
        ({"gradient_checkpointing": True}, {}, "_checkpointing: NPTTrainer has losses and"),
        ({"label_smoothing_factor": 0.1}, {}, "^label_smoothing_factor: .*; leave it out$"),
        ({}, {"compute_metrics": len}, "^compute_metrics: "),
    ],
)
def test_arguments_that_would_have_no_effect(
    tmp_path: Path, changes: dict[str, Any], given: dict[str, Any], message: str
) -> None:
    with pytest.raises(npt.TrainingError, match=message):
        npt.NPTTrainer(converted(), arguments(tmp_path, **changes), **given)


def test_nothing_to_train_on(tmp_path: Path) -> None:
    with pytest.raises(npt.DataError, match="the data set is empty"):
        npt.NPTTrainer(converted(), arguments(tmp_path), train_dataset=[]).train()
    with pytest.raises(npt.TrainingError, match="give train_dataset"):
        npt.NPTTrainer(converted(), arguments(tmp_path)).train()


# --- npt.train with objects


class Seen(TrainerCallback):
    """Keeps what callbacks get, and asks for something."""

    def __init__(self, **asked: Callable[[int], bool]) -> None:
        self.asked = asked
        self.logs: list[dict[str, float]] = []
        self.events: list[tuple[str, int]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append(("begin", state.global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, when in self.asked.items():
            if when(state.global_step):
                setattr(control, f"should_{name}", True)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append(("evaluate", state.global_step))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append(("save", state.global_step))


def options(place: Place, output: Path, **changes: Any) -> npt.TrainOptions:
    return npt.TrainOptions(**place.settings(output, **changes))


def test_a_model_of_ones_own(place: Place, tmp_path: Path) -> None:
    """It ends as the run that loads the same model by its name, and has the layers."""
    expected = place.train(tmp_path / "named")
    model = tiny.model(initializer_range=0.2)
    model.config._name_or_path = "mine"
    report = npt.train(options(place, tmp_path / "given"), model=model, tokenizer=tiny.tokenizer())
    runs.assert_same_end(report.checkpoint, expected)
    assert '"mine"' in (report.checkpoint / "npt_config.json").read_text()
    loaded = npt.load(tiny.model(initializer_range=0.2), expected, dtype=torch.float32)
    assert_same_tensors(weights(model), weights(loaded))
    # once more: its layers go on as they are
    more = npt.train(
        options(place, tmp_path / "more", learning_rate=1e-30, weight_decay=0.0, max_steps=1),
        model=model, tokenizer=tiny.tokenizer(),
    )  # fmt: skip
    assert_same_tensors(read_weights(more.checkpoint), read_weights(expected))


def test_callbacks_see_and_ask(place: Place, tmp_path: Path) -> None:
    seen = Seen(save=lambda step: step == 3, evaluate=lambda step: step == 2)
    report = npt.train(
        options(
            place,
            tmp_path / "run",
            max_steps=6,
            eval_steps=4,
            logging_steps=2,
            init_strategy="zero",
        ),
        callbacks=[seen],
    )
    assert seen.events == [
        ("begin", 0), ("evaluate", 2), ("save", 2), ("save", 3), ("evaluate", 4), ("save", 4),
        ("evaluate", 6), ("save", 6),
    ]  # fmt: skip
    assert report.global_step == 6
    assert {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()} >= {"checkpoint-3"}
    lines = [line for line in runs.log(tmp_path / "run") if "eval/kl" in line]
    assert [logs["eval_kl"] for logs in seen.logs if "eval_kl" in logs] == [
        line["eval/kl"] for line in lines
    ]
    losses = [line["loss/total"] for line in runs.log(tmp_path / "run") if "loss/total" in line]
    assert [logs["loss/total"] for logs in seen.logs if "loss/total" in logs] == losses
    resumed = Seen()
    again = options(place, tmp_path / "on", max_steps=7, resume_from=str(report.checkpoint))
    npt.train(again, callbacks=[resumed])
    assert resumed.events == [("begin", 6), ("save", 7)]


def test_a_callback_stops_the_run(place: Place, tmp_path: Path) -> None:
    """The last step is saved, and resuming goes on exactly."""
    whole = place.train(tmp_path / "whole", max_steps=6, save_steps=3)
    stop = Seen(training_stop=lambda step: step == 3)
    report = npt.train(options(place, tmp_path / "run", max_steps=6), callbacks=[stop])
    assert report.global_step == 3 and not report.stopped_by
    assert (tmp_path / "run" / "checkpoints" / "final").exists()
    runs.assert_same_end(report.checkpoint, whole.with_name("checkpoint-3"))
    on = options(place, tmp_path / "on", max_steps=6, resume_from=str(report.checkpoint))
    runs.assert_same_end(npt.train(on).checkpoint, whole)


def test_early_stopping(place: Place, tmp_path: Path) -> None:
    """With a learning rate of almost 0 nothing gets better."""
    settings = {"max_steps": 20, "eval_steps": 1, "learning_rate": 1e-30, "weight_decay": 0.0}
    report = npt.train(
        options(place, tmp_path / "run", **settings), callbacks=[EarlyStoppingCallback(2)]
    )
    assert report.global_step == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": tiny.model()}, "model and tokenizer belong together; give both or none"),
        (
            {"model": torch.nn.DataParallel(tiny.model()), "tokenizer": tiny.tokenizer()},
            "model: is a DataParallel, not a language model of transformers",
        ),
        ({"callbacks": [print]}, "callbacks: must be a list of transformers' TrainerCallback"),
        ({"num_processes": 2, "callbacks": [Seen()]}, "num_processes 2: other processes cannot"),
        (
            {"model": converted(layers=[0]), "tokenizer": tiny.tokenizer()},
            r"NP layers \[0\]",
        ),
    ],
)
def test_what_is_refused(place: Place, tmp_path: Path, given: dict[str, Any], message: str) -> None:
    changes = {"num_processes": given.pop("num_processes")} if "num_processes" in given else {}
    with pytest.raises(npt.TrainingError, match=message):
        npt.train(options(place, tmp_path / "run", **changes), **given)


def test_frozen_layers_are_refused(place: Place, tmp_path: Path) -> None:
    path = place.train(tmp_path / "first", max_steps=1)
    model = npt.load(tiny.model(initializer_range=0.2), path)
    with pytest.raises(npt.TrainingError, match=r"NP layers \[1, 2\] of the model have parameters"):
        npt.train(options(place, tmp_path / "run"), model=model, tokenizer=tiny.tokenizer())
    model = npt.load(tiny.model(initializer_range=0.2), path, trainable=True)
    components(model)[2].w_a_in.requires_grad_(False)
    with pytest.raises(npt.TrainingError, match=r"NP layers \[2\] of the model have parameters"):
        npt.train(options(place, tmp_path / "run"), model=model, tokenizer=tiny.tokenizer())
