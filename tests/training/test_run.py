"""Runs, and resumed runs, which end as if they had never stopped."""

from __future__ import annotations

import json
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
from npt_fast.checkpoint import checkpoint
from npt_fast.training.run import _deferred_signals
from npt_fast.training.run_directory import RunDirectory
from tests.checkpoints import (
    assert_same_tensors,
    contents,
    load_state,
    read_weights,
)
from tests.training import runs
from tests.training.relative import rates
from tests.training.runs import Place

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
    """12 steps of 4 windows are more than an epoch, so the position in the data counts."""
    settings = {**SETTINGS[name], "max_steps": 12, "save_steps": 7, "learning_rate": 0.02}
    whole = place.train(tmp_path / "whole", **settings)
    half = whole.with_name("checkpoint-7")
    rest = place.train(tmp_path / "rest", resume_from=str(half), **settings)
    assert rest.name == whole.name == "checkpoint-12"
    runs.assert_same_end(rest, whole)
    before, after = read_weights(half), read_weights(whole)
    assert all((after[key] - before[key]).norm() > 0.01 * after[key].norm() for key in after)
    assert contents(rest)["npt_config.json"] == contents(whole)["npt_config.json"]


def test_resuming_in_the_same_folder(place: Place, tmp_path: Path) -> None:
    """After a crash, lost steps are taken again, and the log has no step twice."""
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
    """In a merge of two runs with unlike layers, each layer continues as in its own run."""
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
    """Without clipping, layers do not influence each other in the teacher stage."""
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
    """The known layer continues; the new one starts at step 0 with the options' architecture."""
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
    """The architecture is that of the weights, whatever the options say, and the step is 0."""
    path = runs.start(tmp_path / "start", 2, rank=5, num_ranks=1, modulation="dual")
    source = path if given == "checkpoint" else path / "npt_weights.pt"
    after = place.train(
        tmp_path / "out", train_layers="2", resume_from=str(source), max_steps=1,
        learning_rate=1e-4, residual="removed",
    )  # fmt: skip
    expected, found = read_weights(path), read_weights(after)
    assert list(found) == list(expected)
    for name, rate in rates(expected, 1e-4).items():
        assert 0 < (found[name] - expected[name]).abs().max() < 2 * rate, name
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
    for name, rate in rates(begun, 1e-5).items():  # about one rate per step
        assert 0 < (there[name] - begun[name]).abs().max() < 3 * rate, name
    assert runs.moments(slow)[0]["step"] == 4


def test_other_data_begins_anew(place: Place, tmp_path: Path, capfd: Any) -> None:
    first = place.train(tmp_path / "a", max_steps=2)
    other = {"data": str(place.short), "num_eval_samples": 1, "max_steps": 3}
    second = place.train(tmp_path / "b", resume_from=str(first), **other)
    assert "so the text starts over" in capfd.readouterr().err
    assert load_state(second)["data_state"]["windows"] == 4


def test_resuming_opens_the_checkpoint_once(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = place.train(tmp_path / "a", max_steps=1)
    opened = []
    read = checkpoint._open

    def count(given: str) -> Any:
        opened.append(given)
        return read(given)

    monkeypatch.setattr(checkpoint, "_open", count)
    place.train(tmp_path / "b", resume_from=str(path), max_steps=2)
    assert [given.path for given in opened].count(path) == 1


def test_nothing_left_to_do(place: Place, tmp_path: Path) -> None:
    path = place.train(tmp_path / "a", max_steps=2)
    with pytest.raises(npt.TrainingError, match="is at step 2, so --max_steps 2 leaves nothing"):
        place.train(tmp_path / "b", resume_from=str(path), max_steps=2)


def test_a_checkpoint_of_other_layers(place: Place, tmp_path: Path) -> None:
    path = runs.start(tmp_path / "start", 1)
    with pytest.raises(npt.TrainingError, match=r"has layers \[1\], none of --train_layers \[2\]"):
        place.train(tmp_path / "out", train_layers="2", resume_from=str(path))


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
    """Weights follow the order in which layers are named; -1 is the last layer."""
    path = place.train(tmp_path / "out", train_layers="-1,0,1", layer_weights=text, max_steps=1)
    state = torch.load(path / "multi_layer_state.pt", weights_only=True)
    assert state["layer_weights"] == weights
    assert state["layers_to_train"] == [0, 1, 3]


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
    with pytest.raises(npt.OptionError, match=message):
        place.train(tmp_path / "out", train_layers=layers)


# --- the folder, the report, signals


def test_where_runs_are(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = place.train(Path(), output_dir=None, wandb_name="layer11_training", max_steps=1)
    assert path == Path("experiments/layer11_training/checkpoints/checkpoint-1")
    assert path.is_dir()
    unnamed = place.train(Path(), output_dir=None, max_steps=1)
    assert unnamed.parts[0] == "experiments"
    assert unnamed.parts[1].startswith("npt_layers_1-2_base_")
    for name in ("..", "a/b"):
        with pytest.raises(npt.TrainingError, match="is not a folder name"):
            place.train(Path(), output_dir=None, wandb_name=name)


def test_the_report(place: Place, tmp_path: Path) -> None:
    options = npt.TrainOptions(**place.settings(tmp_path / "out", max_steps=2, eval_steps=1))
    report = npt.train(options)
    assert report.output == tmp_path / "out"
    assert report.checkpoint == tmp_path / "out" / "checkpoints" / "checkpoint-2"
    assert (report.global_step, report.layers, report.stopped_by) == (2, (1, 2), 0)
    assert report.evaluation is not None and report.evaluation.kl > 0
    again = json.loads(json.dumps(report.to_dict()))
    assert again["evaluation"]["direct"]["1"] == report.evaluation.direct[1]


def test_two_runs_in_one_folder(place: Place, tmp_path: Path) -> None:
    running = RunDirectory(tmp_path / "out", resuming=False)
    with pytest.raises(npt.TrainingError, match="another run is training into it"):
        place.train(tmp_path / "out")
    running.close()
    place.train(tmp_path / "out", max_steps=1)
    with pytest.raises(npt.TrainingError, match="holds checkpoints of another run"):
        place.train(tmp_path / "out", max_steps=1)


def test_a_second_signal_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second signal within 1 s is the same Ctrl-C, sent to the launcher and its processes."""
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
    """All steps are taken, so there would be nothing left to resume."""

    @contextmanager
    def always() -> Iterator[Any]:
        yield lambda: 15

    monkeypatch.setattr("npt_fast.training.run._deferred_signals", always)
    settings = place.settings(tmp_path / "out", max_steps=1)
    assert npt.train(npt.TrainOptions(**settings)).stopped_by == 0
    assert (tmp_path / "out" / "checkpoints" / "final").is_dir()
    settings = place.settings(tmp_path / "other", max_steps=3)
    report = npt.train(npt.TrainOptions(**settings))
    assert (report.stopped_by, report.global_step) == (15, 1)
    assert npt.verify(report.checkpoint).passed
    assert not (tmp_path / "other" / "checkpoints" / "final").exists()
