"""Logs that are run again."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch

from tests import hostile_models
from tests.checkpoints import run
from tests.cli.shell.piped import Shell
from tests.training import runs

SESSION = [
    "track x", "extract a first", "extract-seq s second", "set seed=5", "calc c = a - 0.5*s",
    "inject c text -strategy top_p -tokens 6 -temp 2", "inject d text", "nonsense", "bake a",
    "test text", "undo", "layers 2", "save session", "compare a text", "sweep a text", "info c",
    "list",
]  # fmt: skip


def test_a_log_is_run_again(shell: Shell, tmp_path: Path) -> None:
    """A replay gives the same results, or names the first difference."""
    shell.json(*SESSION, options=["--log", "log", "--keep-going"])
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    header, entries = lines[0], lines[1:]
    assert header["layers"] == [1, 2] and len(header["weights"]["1"]) == 64
    assert [entry["command"] for entry in entries] == SESSION
    assert [entry["seed"] for entry in entries[:6]] == [0, 0, 0, 0, 5, 5]
    assert list(entries[4]["digests"]) == ["c"] and "did you" not in entries[6]["error"]
    again = ["interact", "--replay", "log", "--assert", "--device", "cpu"]
    code, out, _ = run(shell.capsys, *again)
    assert code == 0
    assert out.splitlines()[-1] == (
        "✓ Replayed 16 commands of log: results are equal (texts exactly, numbers within 0.0001; "
        "3 of 3 modulations bit for bit)"
    )
    assert "Not run again, since it writes files: save session" in out

    entries[5]["result"]["kl"] += 0.01
    (tmp_path / "log").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, _, err = run(shell.capsys, *again)
    assert code == 3
    where = "entry 6 (inject c text -strategy top_p -tokens 6 -temp 2)"
    assert f"Error: log: {where} differs from the record: entry.result.kl: " in err
    code, _, err = run(shell.capsys, *(option for option in again if option != "--assert"))
    assert code == 0 and f"Warning: log: {where} differs from the record: entry.result.kl" in err


def test_a_log_with_wrong_values_is_one_line(shell: Shell, tmp_path: Path) -> None:
    shell.json("list", options=["--log", "log"])
    header, entry = map(json.loads, (tmp_path / "log").read_text().splitlines())
    os.mkfifo("pipe")
    for changed, problem in (
        ({**header, "layers": 5}, "log, line 1: layers must be a list, each item a whole number"),
        ({**header, "checkpoint": ["a"]}, "log, line 1: checkpoint must be a text"),
        ({**header, "weights": {"1": 5}}, "log, line 1: weights must be a mapping"),
    ):
        (tmp_path / "log").write_text(f"{json.dumps(changed)}\n{json.dumps(entry)}\n")
        code, _, err = run(shell.capsys, "interact", "--replay", "log")
        assert code == 1 and err.startswith(f"Error: {problem}") and err.count("\n") == 1
    for path in ("pipe", "/dev/zero"):
        for option in ("--replay", "--script"):
            with_checkpoint = ["--checkpoint", shell.checkpoint, "--model_name", shell.base]
            code, _, err = run(shell.capsys, "interact", option, path, *with_checkpoint)
            assert (code, err) == (1, f"Error: {path}: not a regular file\n")


def test_a_log_of_other_weights(shell: Shell, tmp_path: Path) -> None:
    shell.json("extract a first", options=["--log", "log"])
    other = runs.start(tmp_path / "other", 1, 2)
    weights = torch.load(other / "npt_weights.pt", weights_only=True)
    torch.save({name: -tensor for name, tensor in weights.items()}, other / "npt_weights.pt")
    code, _, err = run(
        shell.capsys, "interact", "--replay", "log", "--assert", "--checkpoint", other,
        "--device", "cpu",
    )  # fmt: skip
    assert code == 3 and "log: the model differs from the record: weights.1: " in err


def test_a_log_on_the_same_model_elsewhere(shell: Shell, tmp_path: Path) -> None:
    shell.json("extract a first", options=["--log", "log"])
    elsewhere = shutil.copytree(shell.base, tmp_path / "elsewhere")
    replay = ["interact", "--replay", "log", "--assert", "--device", "cpu"]
    assert run(shell.capsys, *replay, "--model_name", elsewhere)[0] == 0
    hostile_models.change(elsewhere, "config.json", vocab_size=258)
    code, _, err = run(shell.capsys, *replay, "--model_name", elsewhere)
    assert code == 1 and "cannot be loaded" in err


def test_a_log_says_how_texts_are_read(bos_shell: Shell) -> None:
    again = ["interact", "--replay", "log", "--assert", "--device", "cpu"]
    lines = ["tokens ab", "set chat=true", "extract a ab"]
    for option in ([], ["--no-special-tokens"], ["--chat"]):
        bos_shell.json(*lines[: len(lines) - 2 * bool(option)], options=["--log", "log", *option])
        assert run(bos_shell.capsys, *again)[0] == 0
        Path("log").unlink()
    code, _, err = run(bos_shell.capsys, *again, "--no-special-tokens")
    assert code == 2 and "--replay reads texts as its log says" in err


def test_a_log_from_before_special_tokens(bos_shell: Shell) -> None:
    """It is run again without them; what it did not record is not compared."""
    lines = ["extract a ab", "calc b = 2 * a", "info b", "list", "sweep a ab", "set seed=1"]
    bos_shell.json(*lines, options=["--log", "log", "--no-special-tokens"])
    header, *entries = map(json.loads, Path("log").read_text().splitlines())
    for place in (header, entries[2]["result"]["origin"]["of"], entries[5]["result"]):
        del place["special_tokens"], place["chat"]
    del entries[4]["result"]["tokens"], entries[4]["result"]["positions"]
    for entry in entries[3]["result"]["modulations"]:
        entry["source"] = "in other words"
    Path("log").write_text("".join(json.dumps(line) + "\n" for line in (header, *entries)))
    code, out, err = run(
        bos_shell.capsys, "interact", "--replay", "log", "--assert", "--device", "cpu"
    )
    assert code == 0, err
    assert "✓ Replayed 6 commands of log: results are equal" in out
    header |= {"special_tokens": False, "chat": True}
    Path("log").write_text(json.dumps(header) + "\n")
    code, _, err = run(bos_shell.capsys, "interact", "--replay", "log")
    assert code == 1 and err.startswith("Error: log, line 1: a chat template writes special")
