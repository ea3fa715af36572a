"""Several processes take the steps of one together, or each trains its own layers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.spawn import ProcessRaisedException

import npt_fast as npt
from npt_fast.training import launch, run
from npt_fast.training.run_directory import RunDirectory
from tests.checkpoints import assert_same_tensors, load_state, read_weights
from tests.training import runs
from tests.training.runs import Place

pytestmark = pytest.mark.usefixtures("quick_processes")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_processes_take_the_steps_of_one(place: Place, tmp_path: Path, parallel: str) -> None:
    """Compare the gradient of the first step, which has a window of five tokens, and weights and
    metrics after four steps."""
    begin = runs.start(tmp_path / "start", 1, 2)
    settings = {
        "resume_from": str(begin),
        "data": str(place.short),
        "num_eval_samples": 1,
        "gradient_clip": 0,
        "curriculum_stages": "teacher:2,mixed:5",
        "fidelity_weight": 1.0,
        "lambda_reg": 0.1,
        "max_steps": 4,
        "save_steps": 1,
        "eval_steps": 2,
        "logging_steps": 1,
    }
    one = place.train(tmp_path / "one", batch_size=8, gradient_accumulation_steps=1, **settings)
    two = place.train(
        tmp_path / "two", batch_size=2, num_processes=2, parallel=parallel, **settings
    )
    gradients = [runs.gradient(path.with_name("checkpoint-1")) for path in (one, two)]
    assert (gradients[1] - gradients[0]).norm() < 1e-6 * gradients[0].norm()
    begun, expected, found = read_weights(begin), read_weights(one), read_weights(two)
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        moved = (tensor - begun[name]).norm()
        assert (found[name] - tensor).norm() < 1e-3 * moved, name
    for ours, theirs in zip(runs.log(tmp_path / "two"), runs.log(tmp_path / "one"), strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            if key not in ("training/tokens_per_second", "curriculum/stage"):
                assert ours[key] == pytest.approx(value, rel=1e-3, abs=1e-6), key
    files = {p.name for p in two.iterdir()}
    assert files == {p.name for p in one.iterdir()}
    assert load_state(two)["data_state"]["windows"] == 32
    assert {p.name for p in two.parent.iterdir()} == {p.name for p in one.parent.iterdir()}


@pytest.mark.slow
def test_layers_apart(place: Place, tmp_path: Path) -> None:
    """A process per layer gives the layers that single runs give, merged and verified."""
    settings = {"train_layers": "1,-1", "num_processes": 2, "parallel": "layers", "max_steps": 3}
    options = npt.TrainOptions(**place.settings(tmp_path / "both", **settings))
    report = npt.train(options)
    assert (report.layers, report.global_step, report.stopped_by) == ((1, 3), 3, 0)
    assert report.checkpoint == tmp_path / "both" / "checkpoints" / "checkpoint-3"
    merged, states = read_weights(report.checkpoint), runs.by_name(report.checkpoint)
    for layer in (1, 3):
        alone = place.train(tmp_path / str(layer), train_layers=str(layer), max_steps=3)
        own = read_weights(alone)
        assert_same_tensors({name: merged[name] for name in own}, own)
        for name, state in runs.by_name(alone).items():
            assert_same_tensors(states[name], state)
    summary = json.loads((report.checkpoint / "merge_summary.json").read_text())
    assert summary["merged_layers"] == [1, 3]
    assert "merge_digests.txt" in summary["files"]  # the merge was verified
    assert npt.verify(report.checkpoint.with_name("final")).passed
    described = json.loads((report.checkpoint / "npt_config.json").read_text())["layers"]
    assert [described[layer]["step"] for layer in ("1", "3")] == [3, 3]
    config = json.loads((tmp_path / "both" / "config.json").read_text())
    assert config["train_layers"] == "1,-1" and config["parallel"] == "layers"
    # a run can resume from it
    after = place.train(
        tmp_path / "after", train_layers="1,3", resume_from=str(report.checkpoint), max_steps=4
    )
    assert {state["step"].item() for state in runs.moments(after)} == {4}


@pytest.mark.slow
def test_layers_apart_go_on_where_each_was(place: Place, tmp_path: Path) -> None:
    """After a stop one process had taken 2 of 3 steps, the other all."""
    settings = {"parallel": "layers", "num_processes": 2, "max_steps": 3, "save_steps": 2}
    for layer in (1, 2):
        place.train(
            tmp_path / "run" / f"layers_{layer}",
            train_layers=str(layer),
            max_steps=3,
            save_steps=2,
        )
    expected = [
        read_weights(tmp_path / "run" / f"layers_{layer}" / "checkpoints" / "checkpoint-3")
        for layer in (1, 2)
    ]
    for name in ("checkpoint-3", "final"):
        shutil.rmtree(tmp_path / "run" / "layers_1" / "checkpoints" / name)
    path = place.train(tmp_path / "run", resume_from=str(tmp_path / "run"), **settings)
    assert_same_tensors(read_weights(path), expected[0] | expected[1])
    # and again, where only the merge is left to do
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    path = place.train(tmp_path / "run", resume_from=str(tmp_path / "run"), **settings)
    assert_same_tensors(read_weights(path), expected[0] | expected[1])


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "layers"])
def test_what_goes_wrong_in_a_process(place: Place, tmp_path: Path, parallel: str) -> None:
    """The error shows at once: the other process does not wait for the one that failed."""
    settings: dict[str, Any] = {"num_processes": 2, "parallel": parallel}
    begun = time.monotonic()
    if parallel == "ddp":  # only the first process looks at the folder
        running = RunDirectory(tmp_path / "out", resuming=False)
        message = "another run is training into it"
    else:
        running = RunDirectory(tmp_path / "out" / "layers_2", resuming=False)
        message = "layers_2: another run is training into it"
    with pytest.raises(npt.TrainingError, match=message):
        place.train(tmp_path / "out", **settings)
    running.close()
    assert time.monotonic() - begun < launch._GRACE


def at_the_start(monkeypatch: pytest.MonkeyPatch, happens: Callable[[list[Any]], None]) -> None:
    """Call `happens` as soon as the processes exist."""
    wait = launch._all_succeeded

    def instead(processes: list[Any]) -> bool:
        happens(processes)
        return wait(processes)

    monkeypatch.setattr(launch, "_all_succeeded", instead)


def _never_begins(index: int, tasks: list[npt.TrainOptions], *arguments: Any) -> None:
    """Stand where training would begin, for good; a file says so. It runs in a started process."""

    def stand(options: npt.TrainOptions) -> None:
        Path(f"{options.output_dir}.{index}").touch()
        while True:
            time.sleep(60)

    run.train_here = stand  # type: ignore[assignment]
    launch._train_one(index, tasks, *arguments)


@pytest.mark.parametrize("pause", [0, 1])
def test_a_process_that_is_killed(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pause: float
) -> None:
    """A process is killed, as when memory runs out, before or after the launcher looks."""

    def happens(processes: list[Any]) -> None:
        processes[0].kill()
        time.sleep(pause)

    monkeypatch.setattr(launch, "_train_one", _never_begins)
    at_the_start(monkeypatch, happens)
    begun = time.monotonic()
    with pytest.raises(npt.TrainingError, match="process 0 terminated with signal SIGKILL"):
        place.train(tmp_path / "out", num_processes=2)
    assert time.monotonic() - begun < launch._GRACE


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_signal_before_training_begins(
    place: Place,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    error: type[BaseException],
) -> None:
    """There is nothing to save, so the program ends as it would without our handler."""

    def happens(processes: list[Any]) -> None:
        while not all((tmp_path / f"out.{index}").exists() for index in range(2)):
            assert all(process.is_alive() for process in processes)
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(launch, "_train_one", _never_begins)
    at_the_start(monkeypatch, happens)
    before = signal.getsignal(number)
    with pytest.raises(error) as caught:
        place.train(tmp_path / "out", num_processes=2)
    assert caught.value.args in ((143,), ())
    assert signal.getsignal(number) is before


def _crash(index: int, *arguments: object) -> None:
    raise ZeroDivisionError


def test_our_own_bugs_are_not_hidden(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_train_one", _crash)
    with pytest.raises(ProcessRaisedException, match=r"in _crash\n.*raise ZeroDivisionError"):
        place.train(tmp_path / "out", num_processes=2)


def test_layer_weights_mean_nothing_apart(place: Place, tmp_path: Path) -> None:
    settings = {"num_processes": 2, "parallel": "layers", "layer_weights": "1,2"}
    with pytest.raises(npt.TrainingError, match="layer_weights have no effect"):
        place.train(tmp_path / "out", **settings)


def test_more_processes_than_gpus(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(npt.TrainingError, match="num_processes 2: only 1 GPUs are visible"):
        place.train(tmp_path / "out", num_processes=2, cpu=False)


@pytest.mark.parametrize(
    ("visible", "gpus", "expected"),
    [
        (None, 0, ["", "", ""]),
        (None, 2, ["0", "1", "0"]),
        ("4,7", 2, ["4", "7", "4"]),
        ("", 0, ["", "", ""]),
    ],
)
def test_gpus_are_shared_out(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, gpus: int, expected: list[str]
) -> None:
    """Processes share the GPUs that this process may use."""
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert launch._devices(3) == expected
