"""``npt-fast train``: what it prints, how it ends, and that every mistake is one clear line."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MptConfig, MptForCausalLM

import npt_fast as npt
from npt_fast.training.run_directory import RunDirectory
from tests.checkpoints import (
    contents,
    layer_weights,
    load_state,
    read_weights,
    run,
    write_checkpoint,
)
from tests.fork_server import ForkServer
from tests.training import runs, tiny
from tests.training.runs import Place

# --- what it prints


def test_stdout_is_the_result(place: Place, capsys: Any, tmp_path: Path) -> None:
    code, out, err = run(capsys, *place.arguments(tmp_path / "out", max_steps=2))
    assert code == 0
    last = tmp_path / "out" / "checkpoints" / "checkpoint-2"
    assert out == f"Multi-Layer NPT Training Complete!\nFinal checkpoint: {last}\n"
    assert f"Base model: {place.base}" in err and "step 2/2" in err
    assert npt.verify(last).passed


def test_everything_on(place: Place, capsys: Any, tmp_path: Path) -> None:
    """Evaluations, samples and progress go to stderr; stdout has the last figures."""
    often = {"eval_steps": 1, "generation_steps": 1, "logging_steps": 1}
    code, out, _ = run(capsys, *place.arguments(tmp_path / "out", max_steps=2, **often))
    assert code == 0
    first, figures, *texts, last = out.splitlines()
    names = [line.split("|")[1].strip() for line in texts]
    assert names[3:] == ["news", "story", "code", "french", "worst of other kinds"]
    assert first == "Multi-Layer NPT Training Complete!"
    assert figures.startswith("Perplexity ") and "KL " in figures and "top-1" in figures
    assert last.startswith("Final checkpoint: ")


def test_json_is_the_report(place: Place, capsys: Any, tmp_path: Path) -> None:
    arguments = place.arguments(tmp_path / "out", max_steps=2, eval_steps=1, generation_steps=1)
    code, out, _ = run(capsys, *arguments, "--json")
    assert code == 0
    report = json.loads(out)
    assert report["checkpoint"] == str(tmp_path / "out" / "checkpoints" / "checkpoint-2")
    assert (report["global_step"], report["layers"], report["stopped_by"]) == (2, [1, 2], 0)
    assert report["evaluation"]["kl"] > 0


def test_both_spellings(place: Place, capsys: Any, tmp_path: Path) -> None:
    snake = place.arguments(tmp_path / "a", max_steps=2, mixed_precision=True, layer_weights="2,1")
    kebab = [
        f"{word.replace('_', '-').replace('/a', '/b')}" if word.startswith("--") else word
        for word in snake
    ]
    kebab[kebab.index("--output-dir") + 1] = str(tmp_path / "b")
    assert any("_" in word for word in snake if word.startswith("--"))
    ends = []
    for arguments in (snake, kebab):
        code, out, _ = run(capsys, *arguments)
        assert code == 0
        ends.append(Path(out.splitlines()[-1].removeprefix("Final checkpoint: ")))
    runs.assert_same_end(*ends)


def test_tags_and_layers_as_lists(place: Place, capsys: Any, tmp_path: Path) -> None:
    """``--wandb_tags a b``, as the original takes them; layers from the end need a ``=``."""
    arguments = place.arguments(tmp_path / "out", max_steps=1)
    at = arguments.index("--train_layers")
    arguments[at : at + 2] = ["--train_layers=-1,0"]
    assert run(capsys, *arguments, "--wandb_tags", "a", "b")[0] == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["wandb_tags"] == ["a", "b"]
    found = npt.inspect(tmp_path / "out" / "checkpoints" / "final").layers
    assert [info.layer for info in found] == [0, 3]


@pytest.mark.parametrize("verb", ["train", "evaluate"])
def test_help(capsys: Any, verb: str) -> None:
    code, out, _ = run(capsys, verb, "--help")
    assert code == 0
    assert f"Usage: npt-fast {verb}" in out and "--model_name" in out
    assert "\x1b" not in out


@pytest.mark.parametrize("arguments", [["train", "--help"], ["evaluate", "--help"], ["train"]])
def test_help_and_usage_load_nothing(arguments: list[str]) -> None:
    code = f"""
import sys
from npt_fast.cli.main import main
try:
    main({arguments})
except SystemExit:
    print(*sys.modules)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    modules = set(result.stdout.split())
    assert not {"torch", "numpy", "triton", "transformers", "datasets"} & modules


# --- mistakes

USAGE: dict[str, tuple[list[str], str]] = {
    "no-layers": ([], "--train_layers"),
    "unknown-layer": (["--train_layers", "eleven"], "not a list of layers"),
    "layer-twice": (["--train_layers", "11,11"], "twice"),
    "unknown-option": (["--train_layers", "1", "--warp", "9"], "--warp"),
    "no-number": (["--train_layers", "1", "--np_rank", "many"], "many"),
    "bad-choice": (["--train_layers", "1", "--modulation", "quadruple"], "quadruple"),
    "negative": (["--train_layers", "1", "--np_rank", "-4"], "np_rank must be positive"),
    "zero": (["--train_layers", "1", "--batch-size", "0"], "batch_size must be positive"),
    "nan": (["--train_layers", "1", "--learning-rate", "nan"], "learning_rate must be positive"),
    "bad-size": (["--train_layers", "1", "--teacher_cache", "some"], "not a size"),
    "bad-stride": (["--train_layers", "1", "--stride", "600"], "stride must be"),
    "two-precisions": (["--train_layers", "1", "--fp16", "--mixed_precision"], "not both"),
    "nothing-to-learn": (["--train_layers", "1", "--direct_mlp_weight", "0"], "nothing to learn"),
}


@pytest.mark.parametrize("case", USAGE)
def test_wrong_usage_is_exit_code_2(capsys: Any, case: str) -> None:
    arguments, expected = USAGE[case]
    code, out, err = run(capsys, "train", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("Error: ") and err.count("\n") == 1
    assert expected in err


def _nowhere(place: Place, folder: Path) -> dict[str, Any]:
    return {"model_name": folder / "nowhere"}


def _gpt2(place: Place, folder: Path) -> dict[str, Any]:
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=257, n_embd=32, n_layer=4, n_head=4, bos_token_id=None, eos_token_id=0
        )
    )
    model.save_pretrained(folder / "gpt2")
    tiny.tokenizer().save_pretrained(folder / "gpt2")
    return {"model_name": folder / "gpt2", "modulation": "dual"}


def _mpt(place: Place, folder: Path) -> dict[str, Any]:
    MptForCausalLM(MptConfig(vocab_size=257, d_model=32, n_layers=4, n_heads=4)).save_pretrained(
        folder / "mpt"
    )
    tiny.tokenizer().save_pretrained(folder / "mpt")
    return {"model_name": folder / "mpt"}


def _another_base(place: Place, folder: Path) -> dict[str, Any]:
    return {"resume_from": write_checkpoint(folder / "a", layer_weights(1, d=16, f=24))}


def _a_deeper_base(place: Place, folder: Path) -> dict[str, Any]:
    return {"resume_from": runs.start(folder / "a", 1, 9)}


def _missing_key(place: Place, folder: Path) -> dict[str, Any]:
    weights = layer_weights(1, **runs.SIZES)
    del weights["layer_1_np.W_a_up_up.1"]
    return {"resume_from": write_checkpoint(folder / "a", weights)}


def _extra_key(place: Place, folder: Path) -> dict[str, Any]:
    weights = layer_weights(1, **runs.SIZES) | {"layer_1_np.W_left_up.0": torch.zeros(3, 3)}
    return {"resume_from": write_checkpoint(folder / "a", weights)}


def _no_checkpoint(place: Place, folder: Path) -> dict[str, Any]:
    return {"resume_from": folder / "none"}


def _broken_state(place: Place, folder: Path) -> dict[str, Any]:
    path = runs.start(folder / "a", 1)
    (path / "training_state.pt").write_bytes(b"PK\x03\x04 and no more")
    return {"resume_from": path}


def _empty_data(place: Place, folder: Path) -> dict[str, Any]:
    (folder / "empty.txt").touch()
    return {"data": folder / "empty.txt"}


def _little_data(place: Place, folder: Path) -> dict[str, Any]:
    (folder / "little.txt").write_text("a few words")
    return {"data": folder / "little.txt"}


def _no_data(place: Place, folder: Path) -> dict[str, Any]:
    return {"data": folder / "none.txt"}


def _running(place: Place, folder: Path) -> dict[str, Any]:
    _running.lock = RunDirectory(folder / "out", resuming=False)  # type: ignore[attr-defined]
    return {}


def _taken(place: Place, folder: Path) -> dict[str, Any]:
    (folder / "out" / "checkpoints" / "checkpoint-5").mkdir(parents=True)
    return {}


def _a_file(place: Place, folder: Path) -> dict[str, Any]:
    (folder / "out").touch()
    return {}


FAILURES: dict[Callable[[Place, Path], dict[str, Any]], str] = {
    lambda place, folder: {"train_layers": 9}: "there is no layer 9, the model has 4",
    _nowhere: "nowhere: no such folder",
    _gpt2: "layer 1 (GPT2Block): modulation dual needs an MLP with a gate; take plain",
    _mpt: "MptModel: has no list of decoder layers; not supported",
    _another_base: "a: was trained on another base model: hidden_size 16, the model has 32",
    _a_deeper_base: "a: has layer 9, the model has 4",
    _missing_key: "W_a_up_up",
    _extra_key: "layer_1_np.W_left_up.0",
    _no_checkpoint: "Checkpoint not found: ",
    _broken_state: "training_state.pt: ",
    _empty_data: "empty.txt: ",
    _little_data: "little.txt: ",
    _no_data: "none.txt: no such file",
    _running: "out: another run is training into it",
    _taken: "out: holds checkpoints of another run",
    _a_file: "out: File exists",
    lambda place, folder: {"curriculum_stages": "late:5"}: "stages are teacher, mixed, student",
    lambda place, folder: {"layer_weights": "1,2"}: "layer_weights '1,2' is not",
}


@pytest.mark.parametrize("case", FAILURES, ids=lambda case: case.__name__)
def test_a_failure_is_one_line_and_exit_code_1(
    place: Place, capsys: Any, tmp_path: Path, case: Any
) -> None:
    changes = {"train_layers": "1", **case(place, tmp_path)}
    before = sorted(tmp_path.glob("out/checkpoints/*"))
    arguments = place.arguments(tmp_path / "out", **changes)
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (1, ""), err
    assert err.startswith("Error: ") and err.count("\n") == 1
    assert FAILURES[case] in err
    assert sorted(tmp_path.glob("out/checkpoints/*")) == before


def test_a_loss_that_is_not_finite(place: Place, capsys: Any, tmp_path: Path) -> None:
    good = place.train(tmp_path / "out", max_steps=2)
    before = contents(good)
    arguments = place.arguments(
        tmp_path / "out", resume_from=good, max_steps=9, learning_rate=1e30, warmup_steps=0
    )
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (1, "")
    line = err.splitlines()[-1]
    assert line.startswith("Error: the loss of layer 1, 2 is not finite at step 4; ")
    assert f"the last good checkpoint is {good}" in line
    assert "Traceback" not in err
    assert contents(good) == before


@pytest.mark.parametrize(
    ("limit", "where"),
    [(100, ""), (2_500, "/training_log.jsonl"), (9_000, "/checkpoints/checkpoint-8")],
)
def test_a_full_disk_is_exit_code_4(
    place: Place, capsys: Any, tmp_path: Path, limit: int, where: str
) -> None:
    with runs.file_size_limit(limit):
        code, out, err = run(capsys, *place.arguments(tmp_path / "out", logging_steps=1))
    assert (code, out) == (4, "")
    last = err.splitlines()[-1]
    assert last == f"Error: {tmp_path / 'out'}{where}: File too large; nothing was written"
    assert "Traceback" not in err
    assert not list((tmp_path / "out").glob("checkpoints/*"))


# --- signals


def interrupted(
    start: Start, place: Place, folder: Path, number: int, **changes: Any
) -> tuple[int, list[str], list[str]]:
    """Start the program, send it a signal after its third step: exit code, stdout, stderr.

    It cannot run ahead: its stderr is a pipe that holds some thirty lines, read one by one.
    """
    settings = {"logging_steps": 1, **SETTINGS, **changes}
    (stdout, to_stdout), (stderr, to_stderr) = map(opened, (os.pipe(), os.pipe()))
    fcntl.fcntl(stderr, fcntl.F_SETPIPE_SZ, 4096)
    with stdout, stderr:
        with to_stdout, to_stderr:
            pid, wait = start(place.arguments(folder, **settings), to_stdout, to_stderr)
        err = []
        for line in stderr:
            err.append(line.decode())
            if line.startswith(b"step 3/"):
                os.kill(pid, number)
        out = stdout.read().decode().splitlines()
    return wait(), out, err


def opened(pipe: tuple[int, int]) -> tuple[IO[bytes], IO[bytes]]:
    return open(pipe[0], "rb", buffering=0), open(pipe[1], "wb", buffering=0)


Start = Callable[[list[str], IO[bytes], IO[bytes]], tuple[int, Callable[[], int]]]
"""Starts the program: arguments, stdout and stderr -> its process id, and what waits for it."""


@pytest.fixture
def start(request: pytest.FixtureRequest, fork_server: ForkServer) -> Start:
    def fork(arguments: list[str], out: IO[bytes], err: IO[bytes]) -> tuple[int, Callable[[], int]]:
        with open(os.devnull) as nothing:
            pid = fork_server.start(arguments, (nothing, out, err))
        return pid, lambda: fork_server.wait()["code"]

    def spawn(
        arguments: list[str], out: IO[bytes], err: IO[bytes]
    ) -> tuple[int, Callable[[], int]]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "npt_fast", *arguments]
        process = subprocess.Popen(command, stdout=out, stderr=err, env=environment)
        return process.pid, process.wait

    return {"fork": fork, "spawn": spawn}[request.param]


SETTINGS = {"max_steps": 60, "save_steps": 1000, "batch_size": 4, "gradient_accumulation_steps": 1}


@pytest.fixture(scope="module")
def uninterrupted(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return place.train(tmp_path_factory.mktemp("whole"), **SETTINGS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "processes", "start"),
    [(signal.SIGTERM, 1, "fork"), (signal.SIGINT, 1, "fork"), (signal.SIGTERM, 2, "spawn")],
    indirect=["start"],
)
def test_a_signal_saves(
    place: Place, tmp_path: Path, uninterrupted: Path, number: int, processes: int, start: Start
) -> None:
    """The step is finished and saved; a resumed run equals one without a break.

    Two processes start as they do in use.
    """
    settings = {"num_processes": processes, "batch_size": 4 // processes}
    code, out, err = interrupted(start, place, tmp_path / "run", number, **settings)
    assert code == 128 + number, "".join(err)
    assert not any("Traceback" in line for line in err)
    stopped, last = out
    path = Path(last.removeprefix("Final checkpoint: "))
    step = load_state(path)["global_step"]
    assert 3 <= step < 60
    assert stopped == f"Stopped at step {step}; continue with --resume_from:"
    assert path == tmp_path / "run" / "checkpoints" / f"checkpoint-{step}"
    assert npt.verify(path).passed
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    rest = place.train(tmp_path / "run", resume_from=str(path), **SETTINGS)
    if processes == 1:
        runs.assert_same_end(rest, uninterrupted)
    else:  # sums in another order
        one, other = load_state(rest), load_state(uninterrupted)
        assert one["data_state"]["windows"] == other["data_state"]["windows"] == 276
        ours, theirs = (read_weights(p) for p in (rest, uninterrupted))
        wrong = torch.cat([(ours[name] - theirs[name]).ravel() for name in theirs]).norm()
        assert wrong < 1e-2 * torch.cat([t.ravel() for t in theirs.values()]).norm()


def test_special_tokens_are_left_out(
    place: Place, bos_base: Path, capsys: Any, tmp_path: Path
) -> None:
    """The option is recorded, and a run that is resumed without it starts its text over."""
    bos = replace(place, base=bos_base)
    given = bos.arguments(tmp_path / "out", max_steps=1)
    code, _, err = run(capsys, *given, "--no-special-tokens")
    assert code == 0, err
    assert json.loads((tmp_path / "out" / "config.json").read_text())["special_tokens"] is False
    checkpoint = tmp_path / "out" / "checkpoints" / "checkpoint-1"
    assert load_state(checkpoint)["data_state"]["special_tokens"] == 0
    more = bos.arguments(tmp_path / "more", max_steps=2, resume_from=checkpoint)
    note = "the data or the windows are not those of before"
    for option, starts_over in ((["--no-special-tokens"], False), ([], True)):
        code, out, err = run(capsys, *more, *option)
        assert code == 0 and (note in out + err) == starts_over
