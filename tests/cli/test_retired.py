"""The guide's own command lines, through the original's scripts and as npt-fast."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import npt_fast as npt
from npt_fast.cli import retired
from tests.checkpoints import run, trained_checkpoint
from tests.fork_server import Finished, ForkServer
from tests.training.runs import Place

SCRIPTS = Path(__file__).parent.parent.parent / "scripts"
TINY = [
    "--max_length", "24", "--num_eval_samples", "1", "--np_rank", "3", "--batch_size", "2",
    "--gradient_accumulation_steps", "1", "--generation_steps", "0", "--cpu",
]  # fmt: skip


def script(name: str, *options: object, folder: Path) -> Any:
    """Run a script from another folder, in a process of its own."""
    command = [sys.executable, SCRIPTS / f"{name}.py", *options]
    return subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True)


def test_the_guides_workflow(place: Place, tmp_path: Path, fork_server: ForkServer) -> None:
    """Train two layers, analyze, merge, transfer, continue: the guide's lines with a tiny model."""

    def script(name: str, *options: object, lines: str = "") -> Finished:
        file = SCRIPTS / f"{name}.py"
        return fork_server.run(options, script=file, folder=tmp_path, input=lines)

    model = ["--model_name", place.base, "--data", place.text, *TINY]
    for layer, steps in ((1, 4), (2, 3)):
        line = ["--train_layers", layer, "--max_steps", steps, "--wandb_name", f"l{layer}_training"]
        line += (
            ["--triple_modulation"] if layer == 1 else ["--dual_modulation", "--model_size", "1b"]
        )
        done = script("train_multi_layer_npt", *line, *model)
        assert done.code == 0, done.err
        assert done.err.startswith(f"$ npt-fast train --train_layers {layer} ")
        kind = "triple" if layer == 1 else "dual"
        assert f"Note: --{kind}_modulation is --modulation {kind} here\n" in done.err
    one, two = "experiments/l1_training/checkpoint-4", "experiments/l2_training/checkpoint-3"
    done = script("analyze_npt_checkpoint", "--checkpoint", one, "--verbose")
    assert done.code == 0 and "Modulation type: triple" in done.out
    merge = ["--checkpoints", one, two, "--output", "experiments/merged", "--verify"]
    done = script("merge_npt_checkpoints", *merge)
    assert done.code == 0 and "✓ Verification passed!" in done.out
    assert done.err.startswith(f"$ npt-fast merge --checkpoints {one} {two} --output ")
    merged = ["--checkpoint", "experiments/merged", "--model_name", place.base]
    done = script(
        "interactive_knowledge_transfer_tool", *merged, "--layers", "1,2", "--device", "cpu",
        lines='extract-seq knowledge "dead"\ninject knowledge "beef"\n',
    )  # fmt: skip
    assert done.code == 0 and "KL Divergence: " in done.out, done.err
    resume = ["--train_layers", "1,2", "--resume_from", "experiments/merged", "--max_steps", "5"]
    done = script("train_multi_layer_npt", *resume, *model)
    assert done.code == 0, done.err
    kinds = [
        info.architecture.modulation
        for folder in (tmp_path / "experiments").glob("npt_layers_1-2_*")
        for info in npt.inspect(folder).layers
    ]
    assert kinds == ["triple", "dual"]


def test_errors_of_scripts_are_those_of_verbs(tmp_path: Path) -> None:
    done = script("merge_npt_checkpoints", "--checkpoints", "a b", "--output", "o", folder=tmp_path)
    printed, problem = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (1, "")
    assert printed == "$ npt-fast merge --checkpoints 'a b' --output o"
    assert problem == "Error: Checkpoint not found: a b"
    done = script("analyze_npt_checkpoint", folder=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 2


@pytest.mark.parametrize(
    ("line", "stands", "note"),
    [
        ("train --model_size 1b", "train", "--model_name says which model"),
        ("train --model_size=3b", "train --model_name=meta-llama/Llama-3.2-3B", "is --model_name"),
        ("train --model_size 8b --model_name x", "train --model_name x", "has no effect"),
        ("train --dual_modulation", "train --modulation=dual", "is --modulation dual here"),
        (
            "train --dual-modulation --triple_modulation",
            "train --modulation=triple",
            "has no effect beside --triple_modulation",
        ),
        ("train --dataset_preset small", "train --data=small", "is --data small here"),
        ("train --gradient_scale_factor 2.5 --seed 1", "train --seed 1", "undo a factor"),
        ("train --convert_layers upper_half", "train --train_layers=upper_half", "--train_layers"),
        ("train --single_layer_mode", "train", "trained like several"),
        ("train --load_npt_weights a", "train --resume_from=a", "is --resume_from a here"),
        ("interact --architecture_version v1", "interact --residual=kept", "is --residual kept"),
        ("interact --architecture_version auto", "interact", "without --residual"),
        ("interact --use_npt_layers all", "interact --layers=all", "is --layers all here"),
        ("merge --model_size 3b", "merge --model_size 3b", None),  # never an option of this one
    ],
)
def test_what_stands_for_a_retired_option(line: str, stands: str, note: str | None) -> None:
    found, notes = retired.replaced(line.split())
    assert " ".join(found) == stands
    assert all("\n" not in one for one in notes)
    assert any(note in one for one in notes) if note else notes == []


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ("--model_size demo", "give --model_name"),
        ("--model_size", "--model_size takes a value"),
        ("--dual_modulation --modulation triple", "leave out --dual_modulation"),
        ("--triple_modulation=yes", "--triple_modulation takes no value"),
        ("--dataset_preset custom", "give --data FILE"),
        ("--dataset_preset small --data x", "leave out --dataset_preset"),
        ("--gradient_scale_factor 0", "must be a positive number, not '0'"),
        ("--gradient_scale_factor nan", "must be a positive number"),
        ("--demo_mode", "instead give --model_name smollm2-135m"),
    ],
)
def test_a_value_that_nothing_means_is_wrong_usage(capsys: Any, options: str, problem: str) -> None:
    code, out, err = run(capsys, "train", "--train_layers", "1", *options.split())
    assert (code, out) == (2, "")
    assert err.startswith("Error: ") and err.count("\n") == 1 and problem in err


def test_training_layers_by_name(capsys: Any, place: Place, tmp_path: Path) -> None:
    output = tmp_path / "out"
    line = ["train", "--train_layers", "upper_half", "--max_steps", "1", "--output_dir", output]
    code, _, err = run(capsys, *line, "--model_name", place.base, "--data", place.text, *TINY)
    assert code == 0, err
    assert [info.layer for info in npt.inspect(output).layers] == [2, 3]


def test_resuming_with_a_residual(capsys: Any, place: Place, tmp_path: Path) -> None:
    """The option is used where nothing is recorded, and is refused where it contradicts."""
    path = trained_checkpoint(tmp_path / "old", 1, d=32, f=48, modulation="dual")
    line = ["train", "--train_layers", "1", "--resume_from", path, "--max_steps", "4"]
    model = ["--model_name", place.base, "--data", place.text, *TINY]
    code, _, err = run(capsys, *line, *model, "--output_dir", tmp_path / "a")
    assert code == 1 and err.splitlines()[-1].startswith(f"Error: {path}: no file says whether")
    shutil.rmtree(tmp_path / "a", ignore_errors=True)
    for residual in ("kept", "removed"):
        output = ["--output_dir", tmp_path / residual, "--residual", residual]
        code, _, err = run(capsys, *line, *model, *output)
        assert code == 0, err
        assert npt.inspect(tmp_path / residual).layers[0].residual == residual
    line[4] = tmp_path / "kept" / "checkpoints" / "final"
    line[6] = "5"
    output = ["--output_dir", tmp_path / "b", "--residual", "removed"]
    code, _, err = run(capsys, *line, *model, *output)
    assert code == 1
    assert "is recorded with residual kept, which residual removed contradicts" in err
