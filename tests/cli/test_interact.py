"""``npt-fast interact``: its options, where it logs, a pipe to a real model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import run
from tests.cli.shell.piped import Shell
from tests.fork_server import ForkServer

DATA = Path(__file__).parent.parent / "data" / "smollm2_135m"


def test_the_log_has_a_place_of_its_own(shell: Shell, tmp_path: Path) -> None:
    shell.json("list")
    (path,) = (tmp_path / "state" / "npt_fast" / "sessions").iterdir()
    assert path.suffix == ".jsonl" and len(path.read_text().splitlines()) == 2
    (tmp_path / "file").touch()
    shell.monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    code, out, err = shell.pipe("list")
    assert (code, out) == (0, "No saved modulations\n")
    assert err.startswith("Warning: this session is not logged: ") and err.count("\n") == 1
    code, _, err = shell.pipe("list", options=["--log", "file"])
    assert (code, err) == (1, "Error: file: exists already; choose another file\n")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ([], "--checkpoint is missing"),
        (["--json"], "--checkpoint is missing"),
        (["--checkpoint", "a", "--layers", "x"], "is not a list of layers"),
        (["--checkpoint", "a", "--assert"], "--assert needs --replay"),
        (["--replay", "a", "--script", "b"], "leave out --script"),
        (["--checkpoint", "a", "--base_dtype", "half"], "base_dtype"),
    ],
)
def test_wrong_usage_is_exit_code_2(shell: Shell, options: list[str], problem: str) -> None:
    code, out, err = run(shell.capsys, "interact", *options)
    assert (code, out) == (2, "")
    assert err.startswith("Error: ") and err.count("\n") == 1 and problem in err


def test_layers_are_chosen(shell: Shell) -> None:
    _, found = shell.json("layers", options=["--layers", "2"])
    assert found[0]["result"] == {"on": [2], "off": []}
    _, found = shell.json("layers", options=["--layers", "upper_half"])
    assert found[0]["result"] == {"on": [2], "off": []}  # the model has four layers


@pytest.mark.parametrize(("layers", "problem"), [("2,3", "has no layer 3, only [1, 2]")])
def test_layers_are_checked_before_the_model_is_loaded(
    shell: Shell, layers: str, problem: str
) -> None:
    code, out, err = run(shell.capsys, *shell.options, "--layers", layers)
    assert (code, out) == (1, "") and problem in err
    assert err.startswith("Error: ") and err.count("\n") == 1


def test_a_terminal_needs_prompt_toolkit(shell: Shell) -> None:
    from npt_fast.cli import interact

    shell.monkeypatch.setattr(interact, "_is_terminal", lambda: True)
    shell.monkeypatch.delitem(sys.modules, "npt_fast.cli.shell.terminal", raising=False)
    shell.monkeypatch.setitem(sys.modules, "prompt_toolkit", None)
    code, _, err = run(shell.capsys, *shell.options)
    assert code == 1 and err == (
        "Error: npt-fast interact needs the package prompt_toolkit; "
        "pip install 'npt_fast[interact]'\n"
    )


@pytest.mark.parametrize("device", ["nowhere", "xpu:77"])
def test_a_device_that_is_not_there(shell: Shell, device: str) -> None:
    code, out, err = shell.pipe(options=["--device", device])
    assert (code, out) == (1, "")
    assert err.startswith("Error: ") and err.count("\n") == 1 and repr(device) in err


def test_help_is_without_torch() -> None:
    code = (
        "import sys\n"
        "from npt_fast.cli.main import main\n"
        "try: main(['interact', '--help'])\n"
        "except SystemExit: print(*sys.modules, file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "--keep_going" in result.stdout and "--assert" in result.stdout
    assert not {"torch", "transformers", "prompt_toolkit"} & set(result.stderr.split())


@pytest.mark.slow
def test_a_pipe_to_a_real_model(smollm2: Path, fork_server: ForkServer, tmp_path: Path) -> None:
    lines = [
        'extract a "The capital of France is"', 'inject a "The capital of Germany is" -tokens 4',
        "inject", 'test "The capital of Germany is"',
    ]  # fmt: skip
    arguments = [
        "interact", "--json", "--model_name", smollm2, "--device", "cpu", "--layers", "13",
        "--checkpoint", DATA / "layer13" / "checkpoint-600",
    ]  # fmt: skip
    result = fork_server.run(arguments, input="\n".join(lines), folder=tmp_path)
    assert result.code == 1
    assert result.err == f"Loading model from {smollm2}...\n"
    extract, inject, error = map(json.loads, result.out.splitlines())
    assert extract["result"]["tokens"] == ["The", " capital", " of", " France", " is"]
    assert inject["result"]["positions"] == [4] and inject["result"]["layers"] == [13]
    assert len(inject["result"]["injected"]) == 4
    assert error["ok"] is False and error["error"].startswith("line 3: NAME is missing")
