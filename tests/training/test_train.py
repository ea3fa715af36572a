"""What a training run does and leaves behind; where it is resumed, as if it had never stopped."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import npt_fast as npt
from npt_fast.training.run_directory import RunDirectory
from npt_fast.training.train import _deferred_signals
from tests.checkpoints import (
    assert_same_tensors,
    contents,
    load_state,
    read_weights,
)
from tests.training import runs
from tests.training.runs import Place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with runs.place(tmp_path_factory.mktemp("place")) as found:
        yield found


# --- resuming

PLAIN: dict[str, Any] = {}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "all-losses-in-all-stages": {
        "curriculum_stages": "teacher:3,mixed:3:0.3:0.6,student:10",
        "fidelity_weight": 1.0,
        "lambda_reg": 0.1,
    },
    "as-the-original": {
        "loss": "mse",
        "curriculum_stages": "student:5",
        "modulation": "dual",
        "residual": "kept",
        "init_strategy": "conservative",
        "mixed_precision": True,
        "format": "safetensors",
    },
    "cache": {"teacher_cache": "10MB", "lr_schedule": "constant", "warmup_steps": 6},
    "evaluated": {"eval_steps": 2, "generation_steps": 3, "logging_steps": 1},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_resuming_is_exact(place: Place, tmp_path: Path, name: str) -> None:
    """12 steps of 4 windows are more than an epoch, so the data position counts."""
    settings = {**SETTINGS[name], "max_steps": 12, "save_steps": 7}
    whole = place.train(tmp_path / "whole", **settings)
    half = whole.with_name("checkpoint-7")
    rest = place.train(tmp_path / "rest", resume_from=str(half), **settings)
    assert rest.name == whole.name == "checkpoint-12"
    runs.assert_same_end(rest, whole)
    before, after = read_weights(half), read_weights(whole)
    assert all((after[key] - before[key]).norm() > 0.01 * after[key].norm() for key in after)
    assert contents(rest)["npt_config.json"] == contents(whole)["npt_config.json"]


def test_resuming_in_the_same_folder(place: Place, tmp_path: Path) -> None:
    """As after a crash: lost steps are replaced, and the log has none twice."""
    settings = {"save_steps": 3, "logging_steps": 1, "eval_steps": 2}
    whole = place.train(tmp_path / "whole", **settings)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    again = tmp_path / "again" / "checkpoints"
    for name in ("checkpoint-8", "final"):
        shutil.rmtree(again / name)
    place.train(tmp_path / "again", resume_from=str(again / "checkpoint-3"), **settings)
    for name in ("checkpoint-6", "checkpoint-8", "final", "best"):
        runs.assert_same_end(again / name, whole.with_name(name))
    logs = [runs.log(tmp_path / run) for run in ("again", "whole")]
    for line in (*logs[0], *logs[1]):
        line.pop("training/tokens_per_second", None)
    assert logs[0] == logs[1]


def test_resuming_a_merge_is_exact(place: Place, tmp_path: Path) -> None:
    """Two runs of unlike layers, merged: each layer goes on as it would have in its own run."""
    settings = {"gradient_clip": 0, "max_steps": 8, "save_steps": 3}
    kinds = {1: {"np_rank": 5, "num_ranks": 1}, 2: {"np_rank": 2, "num_ranks": 4}}
    alone = {
        layer: place.train(tmp_path / str(layer), train_layers=str(layer), **kind, **settings)
        for layer, kind in kinds.items()
    }
    halves = [path.with_name("checkpoint-3") for path in alone.values()]
    npt.merge(halves, tmp_path / "merged", verify=True)
    both = place.train(tmp_path / "both", resume_from=str(tmp_path / "merged"), **settings)
    weights, optimizer = read_weights(both), runs.by_name(both)
    assert list(weights) == [name for path in alone.values() for name in read_weights(path)]
    for path in alone.values():
        own = read_weights(path)
        assert_same_tensors({name: weights[name] for name in own}, own)
        for name, state in runs.by_name(path).items():
            assert_same_tensors(optimizer[name], state)
    described = json.loads((both / "npt_config.json").read_text())["layers"]
    found = {layer: (d["rank"], d["num_ranks"], d["step"]) for layer, d in described.items()}
    assert found == {"1": (5, 1, 8), "2": (2, 4, 8)}


def test_resuming_with_fewer_layers(place: Place, tmp_path: Path, capfd: Any) -> None:
    """Without clipping, layers in the teacher stage do not know of each other."""
    settings = {"gradient_clip": 0, "max_steps": 6, "save_steps": 3}
    both = place.train(tmp_path / "both", **settings)
    half = both.with_name("checkpoint-3")
    (half / "config.json").write_bytes(b"")
    (half / "accumulated_npt_weights.pt").write_bytes(b"not read")
    one = place.train(tmp_path / "one", train_layers="2", resume_from=str(half), **settings)
    expected = {name: value for name, value in runs.by_name(both).items() if "layer_2_" in name}
    assert len(expected) == 18
    weights = read_weights(both)
    assert_same_tensors(read_weights(one), {name: weights[name] for name in expected})
    found = runs.by_name(one)
    assert found.keys() == expected.keys()
    for name, state in expected.items():
        assert_same_tensors(found[name], state)
    said = capfd.readouterr().err
    assert "layers [1] of" in said
    assert f"Note: {half / 'config.json'}: is empty" in said
    assert f"Note: {half}: using npt_weights.pt; to use accumulated" in said


def test_resuming_with_more_layers(place: Place, tmp_path: Path, capfd: Any) -> None:
    """The known layer goes on; the new one starts as a new layer, in time and in architecture."""
    settings = {"gradient_clip": 0, "max_steps": 6, "save_steps": 3}
    one = place.train(tmp_path / "one", train_layers="2", **settings)
    half = one.with_name("checkpoint-3")
    both = place.train(
        tmp_path / "both", train_layers="0,2", resume_from=str(half), np_rank=5, **settings
    )
    found, weights = runs.by_name(both), read_weights(both)
    assert_same_tensors({n: t for n, t in weights.items() if "layer_2_" in n}, read_weights(one))
    for name, state in runs.by_name(one).items():
        assert_same_tensors(found[name], state)
    fresh = {name: state for name, state in found.items() if "layer_0_" in name}
    assert {state["step"].item() for state in fresh.values()} == {3}
    assert weights["layer_0_np.W_down_gate.0"].shape == (32, 5)
    assert "Optimizer starts fresh for layers [0]" in capfd.readouterr().err
    described = json.loads((both / "npt_config.json").read_text())["layers"]
    assert [(n, d["step"]) for n, d in described.items()] == [("0", 3), ("2", 6)]


@pytest.mark.parametrize("given", ["checkpoint", "file"])
def test_resuming_from_weights_alone(place: Place, tmp_path: Path, given: str) -> None:
    """Somebody's weights: the architecture is theirs whatever the options say; step 0."""
    path = runs.start(tmp_path / "start", 2, rank=5, num_ranks=1, modulation="dual")
    source = path if given == "checkpoint" else path / "npt_weights.pt"
    after = place.train(
        tmp_path / "out", train_layers="2", resume_from=str(source), max_steps=1, learning_rate=1e-4
    )
    expected, found = read_weights(path), read_weights(after)
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert 0 < (found[name] - tensor).abs().max() < 2e-4, name
    assert {state["step"].item() for state in runs.moments(after)} == {1}


def test_the_command_lines_learning_rate_wins(place: Place, tmp_path: Path) -> None:
    settings = {"save_steps": 2, "logging_steps": 1, "max_steps": 4, "lr_schedule": "constant"}
    whole = place.train(tmp_path / "whole", **settings)
    half = whole.with_name("checkpoint-2")
    slow = place.train(tmp_path / "slow", resume_from=str(half), learning_rate=1e-5, **settings)
    lines = [line for line in runs.log(tmp_path / "slow") if "training/learning_rate" in line]
    assert [line["training/learning_rate"] for line in lines] == [1e-5, 1e-5]
    group = load_state(slow)["optimizer_state_dict"]["param_groups"][0]
    assert (group["lr"], group["initial_lr"]) == (1e-5, 1e-5)
    begun, there = read_weights(half), read_weights(slow)
    moved = {name: (there[name] - begun[name]).abs().max().item() for name in begun}
    assert 0 < max(moved.values()) < 3e-5  # about one learning rate per step
    assert runs.moments(slow)[0]["step"] == 4


def test_other_data_begins_anew(place: Place, tmp_path: Path, capfd: Any) -> None:
    first = place.train(tmp_path / "a", max_steps=2)
    other = {"data": str(place.short), "num_eval_samples": 1, "max_steps": 3}
    second = place.train(tmp_path / "b", resume_from=str(first), **other)
    assert "so the text begins anew" in capfd.readouterr().err
    assert load_state(second)["data_state"]["windows"] == 4


def test_nothing_left_to_do(place: Place, tmp_path: Path) -> None:
    path = place.train(tmp_path / "a", max_steps=2)
    with pytest.raises(npt.TrainingError, match="is at step 2, so --max_steps 2 leaves nothing"):
        place.train(tmp_path / "b", resume_from=str(path), max_steps=2)


def test_a_checkpoint_of_other_layers(place: Place, tmp_path: Path) -> None:
    path = runs.start(tmp_path / "start", 1)
    with pytest.raises(npt.TrainingError, match=r"has layers \[1\], none of --train_layers \[2\]"):
        place.train(tmp_path / "out", train_layers="2", resume_from=str(path))


# --- what a step is


def in_one_go(place: Place, folder: Path, **changes: Any) -> Path:
    """One step over all windows of the short text, the padded one among them, from `start`."""
    settings = {"max_steps": 1, "num_eval_samples": 1, "gradient_clip": 0, **changes}
    begin = str(runs.start(folder / "start", 1, 2))
    return place.train(folder / "out", data=str(place.short), resume_from=begin, **settings)


STAGES = ["teacher:5", "mixed:5:0.5,student:5"]


@pytest.mark.parametrize("stages", STAGES)
def test_accumulation_is_exact(place: Place, tmp_path: Path, stages: str) -> None:
    """Every token weighs the same, though one window has only five."""
    found = {}
    for batch in (8, 4, 2, 1):
        changes = {"batch_size": batch, "gradient_accumulation_steps": 8 // batch}
        path = in_one_go(
            place, tmp_path / str(batch), curriculum_stages=stages, fidelity_weight=1.0, **changes
        )
        found[batch] = runs.gradient(path)
    for batch in (4, 2, 1):
        assert (found[batch] - found[8]).norm() < 1e-6 * found[8].norm(), batch


def test_clipping(place: Place, tmp_path: Path) -> None:
    """All gradients of a step together, after accumulation."""
    free = runs.moments(in_one_go(place, tmp_path / "free"))
    clipped = runs.moments(in_one_go(place, tmp_path / "clipped", gradient_clip=0.25))
    norm = 10 * math.sqrt(sum(state["exp_avg"].double().square().sum() for state in free))
    assert norm > 0.5
    for one, other in zip(free, clipped, strict=True):
        torch.testing.assert_close(one["exp_avg"] * (0.25 / norm), other["exp_avg"])


@pytest.mark.parametrize(
    ("schedule", "warmup"), [("cosine", 3), ("cosine", 0), ("constant", 3), ("cosine", None)]
)
def test_learning_rates(place: Place, tmp_path: Path, schedule: str, warmup: int | None) -> None:
    """Linear from 0, then half a cosine down to 0 at max_steps, or constant; resumed half-way."""
    settings = {"lr_schedule": schedule, "warmup_steps": warmup, "logging_steps": 1}
    half = place.train(tmp_path / "out", max_steps=4, **settings)
    place.train(tmp_path / "out", max_steps=20, resume_from=str(half), **settings)
    first = 2 if warmup is None else warmup  # without a number, a tenth of the steps

    def expected(step: int, end: int, first: int) -> float:
        if step < first:
            return 1e-2 * step / first
        progress = (step - first) / (end - first) if schedule == "cosine" else 0
        return 1e-2 * (1 + math.cos(math.pi * progress)) / 2

    begun = warmup or 0
    found = [line["training/learning_rate"] for line in runs.log(tmp_path / "out")]
    assert found == pytest.approx(
        [expected(step, 4, begun) for step in range(4)]
        + [expected(step, 20, first) for step in range(4, 20)]
    )
    state = load_state(tmp_path / "out" / "checkpoints" / "final")
    assert state["scheduler_state_dict"]["last_epoch"] == 20


def test_a_layer_does_not_know_of_others(place: Place, tmp_path: Path) -> None:
    """In the teacher stage, without clipping, it starts and ends the same in any company."""
    settings = {"gradient_clip": 0, "max_steps": 3}
    both = read_weights(place.train(tmp_path / "both", train_layers="2,0", **settings))
    for layer in (0, 2):
        own = read_weights(place.train(tmp_path / str(layer), train_layers=[layer], **settings))
        assert_same_tensors(own, {name: both[name] for name in own})
    assert list(both) == sorted(both, key=lambda name: name[:7])


def test_measuring_does_not_disturb(place: Place, tmp_path: Path) -> None:
    settings = {"curriculum_stages": "mixed:9", "lambda_reg": 0.1}
    plain = place.train(tmp_path / "plain", **settings)
    often = {"generation_steps": 1, "logging_steps": 1, "eval_steps": 2, "save_steps": 3}
    busy = place.train(tmp_path / "busy", **often, **settings)
    runs.assert_same_end(plain, busy)


def test_seeds(place: Place, tmp_path: Path) -> None:
    """The same seed, the same bits; another, another start and another order of the text."""
    first, same, other = (
        read_weights(place.train(tmp_path / f"{n}", max_steps=2, seed=seed))
        for n, seed in enumerate((1, 1, 2))
    )
    assert_same_tensors(first, same)
    assert all(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(("strategy", "changes"), [("zero", False), ("improved", True)])
def test_initialization(place: Place, tmp_path: Path, strategy: str, changes: bool) -> None:
    """With a vanishing learning rate the checkpoint is the start."""
    settings = {"learning_rate": 1e-30, "weight_decay": 0, "max_steps": 1}
    weights = read_weights(
        place.train(tmp_path / "out", init_strategy=strategy, np_init_scale=0.5, **settings)
    )
    writes = [tensor for name, tensor in weights.items() if "W_b_up" in name]
    assert all((tensor.abs().max() > 1e-3) == changes for tensor in writes)


# --- options


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("uniform", {0: 1.0, 1: 1.0, 3: 1.0}),
        ("linear", {3: 1.0, 0: 0.75, 1: 0.5}),
        ("2, 0.5,1e1", {3: 2.0, 0: 0.5, 1: 10.0}),
    ],
)
def test_layer_weights(place: Place, tmp_path: Path, text: str, weights: dict[int, float]) -> None:
    """In the order in which layers are named; -1 is the last one."""
    path = place.train(tmp_path / "out", train_layers="-1,0,1", layer_weights=text, max_steps=1)
    state = torch.load(path / "multi_layer_state.pt", weights_only=True)
    assert state["layer_weights"] == weights
    assert state["layers_to_train"] == [0, 1, 3]


def test_layer_weights_weigh(place: Place, tmp_path: Path) -> None:
    plain = runs.by_name(in_one_go(place, tmp_path / "plain"))
    weighed = runs.by_name(in_one_go(place, tmp_path / "weighed", layer_weights="4,0.25"))
    for name, state in plain.items():
        factor = 4 if "layer_1_" in name else 0.25
        assert torch.equal(weighed[name]["exp_avg"], state["exp_avg"] * factor)


@pytest.mark.parametrize("text", ["1", "1,2,3", "1,-2", "1,0", "1,nan", "1,inf", "even", "1,,2"])
def test_bad_layer_weights(place: Place, tmp_path: Path, text: str) -> None:
    with pytest.raises(npt.TrainingError, match="uniform, linear or 2 positive numbers"):
        place.train(tmp_path / "out", layer_weights=text)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("4", "there is no layer 4, the model has 4"),
        ("0,-5", "there is no layer -5, the model has 4"),
        ("3,-1", r"names a layer twice: \[3, 3\]"),
    ],
)
def test_layers_that_are_not_there(place: Place, tmp_path: Path, layers: str, message: str) -> None:
    with pytest.raises(npt.TrainingError, match=message):
        place.train(tmp_path / "out", train_layers=layers)


# --- what is left behind


def test_where_runs_are(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = place.train(Path(), output_dir=None, wandb_name="layer11_training", max_steps=1)
    assert path == Path("experiments/layer11_training/checkpoints/checkpoint-1")
    assert path.is_dir()
    unnamed = place.train(Path(), output_dir=None, max_steps=1)
    assert unnamed.parts[0] == "experiments"
    assert unnamed.parts[1].startswith("npt_layers_1-2_base_")
    for name in ("..", "a/b"):
        with pytest.raises(npt.TrainingError, match="no name for a folder"):
            place.train(Path(), output_dir=None, wandb_name=name)


def test_the_guides_layout(place: Place, tmp_path: Path) -> None:
    """SPEC 2: the files, and what the original's tools look for in them."""
    path = place.train(
        tmp_path / "out",
        curriculum_stages="teacher:3,mixed:3:0.3:0.6,student:10",
        max_steps=5,
        save_steps=2,
        eval_steps=4,
        residual="kept",
    )
    assert {p.name for p in path.parent.iterdir()} == {
        "checkpoint-2", "checkpoint-4", "checkpoint-5", "best", "final",
    }  # fmt: skip
    assert {p.name for p in path.parent.parent.iterdir()} == {
        "checkpoints", "config.json", "training_log.jsonl",
    }  # fmt: skip
    names = {
        "npt_weights.pt", "training_state.pt", "multi_layer_state.pt", "config.json",
        "npt_config.json",
    }  # fmt: skip
    for checkpoint in path.parent.iterdir():
        assert {p.name for p in checkpoint.iterdir()} == names
        assert npt.verify(checkpoint).passed
    state = torch.load(path / "multi_layer_state.pt", weights_only=True)
    assert state["curriculum_schedule"] == [
        {"name": "teacher", "until_step": 3, "mixing_ratio": 0.0, "mlp_mixing_ratio": 0.0},
        {"name": "mixed", "until_step": 6, "mixing_ratio": 0.3, "mlp_mixing_ratio": 0.6},
        {"name": "student", "until_step": 16, "mixing_ratio": 1.0, "mlp_mixing_ratio": 1.0},
    ]
    assert state["current_stage_index"] == 1
    config = json.loads((path / "config.json").read_text())
    spec = {
        "model_name": str(place.base),
        "batch_size": 2,
        "learning_rate": 1e-2,
        "max_steps": 5,
        "gradient_accumulation_steps": 2,
        "mixed_precision": False,
        "gradient_clip_value": 0.5,
    }
    assert spec.items() <= config.items()
    described = json.loads((path / "npt_config.json").read_text())
    assert described["base_model"]["name"] == str(place.base)
    last = [line for line in runs.log(tmp_path / "out") if "eval/kl" in line][-1]
    assert last["step"] == 5
    for layer in ("1", "2"):
        found = described["layers"][layer]
        assert (found["step"], found["residual"]) == (5, "kept")
        assert found["fidelity"] == last[f"eval_mlp_direct_loss/layer_{layer}"]
    assert load_state(path)["batch_count"] == 10


def test_best(place: Place, tmp_path: Path) -> None:
    """By KL against the base model; a resumed run knows how good the best has been."""
    settings = {"eval_steps": 1, "save_steps": 2}
    path = place.train(tmp_path / "out", max_steps=6, **settings)
    values = {
        line["step"]: line["eval/kl"] for line in runs.log(tmp_path / "out") if "eval/kl" in line
    }
    best = min(values, key=lambda step: values[step])
    assert load_state(path.with_name("best"))["global_step"] == best
    assert load_state(path.with_name("best"))["best_val_loss"] == values[best]
    # so large a step makes the model worse
    place.train(
        tmp_path / "out", max_steps=7, resume_from=str(path), learning_rate=10.0, **settings
    )
    worse = runs.log(tmp_path / "out")[-1]["step"]
    assert worse == 7
    assert load_state(path.with_name("best"))["global_step"] == best
    assert load_state(path.with_name("checkpoint-7"))["best_val_loss"] == values[best]


def test_keep_last(place: Place, tmp_path: Path) -> None:
    path = place.train(tmp_path / "out", save_steps=2, keep_last=2, eval_steps=3)
    names = ["best", "checkpoint-6", "checkpoint-8", "final"]
    assert sorted(p.name for p in path.parent.iterdir()) == names
    for name in names:
        assert npt.verify(path.with_name(name)).passed


def test_keep_last_beside_an_earlier_longer_run(place: Place, tmp_path: Path) -> None:
    """What is written now stays, though the folder has checkpoints of later steps."""
    path = place.train(tmp_path / "out", save_steps=2)
    begin = path.with_name("checkpoint-2")
    again = place.train(
        tmp_path / "out", resume_from=str(begin), save_steps=1, keep_last=2, max_steps=5
    )
    assert again.name == "checkpoint-5" and again.is_dir()
    assert list(RunDirectory(tmp_path / "out", resuming=True).checkpoints()) == [4, 5, 6, 8]


def test_metrics(place: Place, tmp_path: Path) -> None:
    """The names of SPEC 5.10; every figure is a mean over all tokens since the line before."""
    settings = {
        "curriculum_stages": "teacher:2,student:10",
        "fidelity_weight": 0.5,
        "lambda_reg": 0.1,
        "layer_weights": "2,1",
        "max_steps": 4,
        "eval_steps": 4,
    }
    place.train(tmp_path / "out", logging_steps=1, **settings)
    place.train(tmp_path / "rarely", logging_steps=2, **settings)
    lines = runs.log(tmp_path / "out")
    steps = [line for line in lines if "loss/total" in line]
    layered = {
        f"{name}/layer_{layer}"
        for layer in (1, 2)
        for name in (
            "mlp_direct_loss", "regularization", "v_a_attention_similarity", "v_a_norm", "v_b_norm"
        )
    }  # fmt: skip
    assert [set(line) - layered for line in steps] == [
        {
            "step", "loss/total", "loss/fidelity", "curriculum/stage", "curriculum/stage_index",
            "curriculum/mixing_ratio", "training/learning_rate", "training/grad_norm",
            "training/tokens_per_second",
        }
    ] * 4  # fmt: skip
    assert all(layered < set(line) for line in steps)
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert [line["curriculum/stage_index"] for line in steps] == [0, 0, 1, 1]
    assert [line["curriculum/mixing_ratio"] for line in steps] == [0, 0, 1, 1]
    for line in steps:
        total = sum(
            weight
            * (10 * line[f"mlp_direct_loss/layer_{n}"] + 0.1 * line[f"regularization/layer_{n}"])
            for n, weight in ((1, 2), (2, 1))
        )
        assert line["loss/total"] == pytest.approx(total + 0.5 * line["loss/fidelity"])
    (change,) = (line for line in lines if "curriculum/stage_transition" in line)
    assert change == {
        "step": 2,
        "curriculum/stage_transition": 1.0,
        "curriculum/attention_mixing_ratio": 1.0,
        "curriculum/mlp_mixing_ratio": 1.0,
    }
    (measured,) = (line for line in lines if "eval_loss/total" in line)
    assert {"eval_mlp_direct_loss/layer_1", "eval_mlp_direct_loss/layer_2"} < set(measured)
    rarely = {line["step"]: line for line in runs.log(tmp_path / "rarely") if "loss/total" in line}
    mean = (steps[2]["loss/fidelity"] + steps[3]["loss/fidelity"]) / 2
    assert rarely[4]["loss/fidelity"] == pytest.approx(mean)
    assert rarely[4]["v_a_norm/layer_1"] == steps[3]["v_a_norm/layer_1"]  # measured only then


def test_the_report(place: Place, tmp_path: Path) -> None:
    options = npt.TrainOptions(**place.settings(tmp_path / "out", max_steps=2, eval_steps=1))
    report = npt.train(options)
    assert report.output == tmp_path / "out"
    assert report.checkpoint == tmp_path / "out" / "checkpoints" / "checkpoint-2"
    assert (report.global_step, report.layers, report.stopped_by) == (2, (1, 2), 0)
    assert report.evaluation is not None and report.evaluation.kl > 0
    again = json.loads(json.dumps(report.to_dict()))
    assert again["evaluation"]["direct"]["1"] == report.evaluation.direct[1]


# --- what goes wrong


def test_a_loss_that_is_not_finite(place: Place, tmp_path: Path) -> None:
    good = place.train(tmp_path / "out", max_steps=2)
    before = contents(good)
    with pytest.raises(npt.TrainingError) as caught:
        place.train(
            tmp_path / "out", max_steps=9, resume_from=str(good), learning_rate=1e30, save_steps=3
        )
    assert "of layer 1, 2 is not finite at step 4" in str(caught.value)
    assert f"the last good checkpoint is {good.with_name('checkpoint-3')}" in str(caught.value)
    assert contents(good) == before
    assert not good.with_name("checkpoint-4").exists()


def test_weights_that_are_not_finite_are_not_saved(place: Place, tmp_path: Path) -> None:
    """The loss was fine, the step that came of it is beyond float32."""
    message = "layer_1_np.W_down_gate.0 is not finite at step 1; no checkpoint had been saved"
    with pytest.raises(npt.TrainingError, match=message):
        place.train(tmp_path / "out", learning_rate=1e39, max_steps=1)
    assert not list((tmp_path / "out").glob("checkpoints/*"))


def test_two_runs_in_one_folder(place: Place, tmp_path: Path) -> None:
    running = RunDirectory(tmp_path / "out", resuming=False)
    with pytest.raises(npt.TrainingError, match="another run is training into it"):
        place.train(tmp_path / "out")
    running.close()
    place.train(tmp_path / "out", max_steps=1)
    with pytest.raises(npt.TrainingError, match="holds checkpoints of another run"):
        place.train(tmp_path / "out", max_steps=1)


def test_a_second_signal_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that follows at once is the same: a terminal's goes to launcher and processes alike."""
    with _deferred_signals() as stop:
        assert stop() == 0
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop() == signal.SIGINT
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 2)
        with pytest.raises(SystemExit) as caught:
            os.kill(os.getpid(), signal.SIGTERM)
        assert caught.value.code == 143
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_stop_at_the_last_step_is_no_stop(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is all done: there would be nothing left to resume."""

    @contextmanager
    def always() -> Iterator[Any]:
        yield lambda: 15

    monkeypatch.setattr("npt_fast.training.train._deferred_signals", always)
    settings = place.settings(tmp_path / "out", max_steps=1)
    assert npt.train(npt.TrainOptions(**settings)).stopped_by == 0
    assert (tmp_path / "out" / "checkpoints" / "final").is_dir()
    settings = place.settings(tmp_path / "other", max_steps=3)
    report = npt.train(npt.TrainOptions(**settings))
    assert (report.stopped_by, report.global_step) == (15, 1)
    assert npt.verify(report.checkpoint).passed
    assert not (tmp_path / "other" / "checkpoints" / "final").exists()
