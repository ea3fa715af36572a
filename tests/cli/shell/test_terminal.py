"""The shell on a terminal: completion, history, Ctrl-C, Ctrl-D."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pexpect
import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

import npt_fast as npt
from npt_fast.cli.shell.command import Context
from npt_fast.cli.shell.terminal import CommandCompleter
from npt_fast.transfer.session import Session
from tests.cli.shell.piped import Shell
from tests.training import tiny


@pytest.fixture
def completer(shell: Shell) -> CommandCompleter:
    model = tiny.model()
    npt.load(model, shell.checkpoint)
    session = Session(model, tiny.tokenizer())
    for name in ("knowledge", "known", "other"):
        session.extract(name, "text")
    session.track([" Paris"])
    return CommandCompleter(Context(session))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ex", ["extract", "extract-seq", "export-lora", "exit"]),
        ("/inj", ["inject", "inject-blend", "inject-add"]),
        ("inject kno", ["knowledge", "known"]),
        ("inject known text", []),
        ('inject known "The -', []),
        ("inject known text -st", ["-strength", "-strategy"]),
        ("inject known text -strategy top", ["top_k", "top_p"]),
        ("inject-add known text -ex", ["-exact"]),
        ("inject -tokens 3 o", ["other"]),
        ("subtract known kn", ["knowledge", "known"]),
        ("average known other kno", []),
        ("calc new = 0.5*(kno", ["knowledge", "known"]),
        ("layers ", ["1", "2", "all"]),
        ("layers 1,", ["1", "2", "all"]),
        ("untrack ", ['" Paris"']),
        ("set s", ["strategy=", "seed="]),
        ("help inject-", ["inject-blend", "inject-add"]),
        ("nonsense x", []),
    ],
)
def test_completion(completer: CommandCompleter, text: str, expected: list[str]) -> None:
    found = completer.get_completions(Document(text), CompleteEvent())
    assert [completion.text for completion in found] == expected


def test_completion_of_files(completer: CommandCompleter, tmp_path: Path) -> None:
    (tmp_path / "results.safetensors").touch()
    for text in ("load resu", "run resu", "export-lora known resu"):
        (found,) = completer.get_completions(Document(text), CompleteEvent())
        assert found.text == "lts.safetensors"


@pytest.mark.slow
def test_a_session_on_a_terminal(files: tuple[Path, Path], tmp_path: Path) -> None:
    """Completion, history, Ctrl-C, Ctrl-D and errors."""
    arguments = [
        "-m", "npt_fast", "interact", "--device", "cpu", "--model_name", str(files[0]),
        "--checkpoint", str(files[1]),
    ]  # fmt: skip
    environment = {
        **os.environ, "XDG_STATE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1",
        "TERM": "xterm-256color",
    }  # fmt: skip
    environment.pop("NO_COLOR", None)
    child = pexpect.spawn(
        sys.executable, arguments, env=environment, encoding="utf-8", timeout=120,
        dimensions=(40, 120),
    )  # fmt: skip
    said = io.StringIO()
    child.logfile_read = said

    def type_in(keys: str) -> None:
        """Answer where the cursor is, which each prompt asks the terminal, and type."""
        child.expect_exact("\x1b[6n")
        child.send("\x1b[1;1R")
        child.send(keys)

    def complete(keys: str, rest: str) -> None:
        """Press Tab and wait for what it adds."""
        type_in(f"{keys}\t")
        child.expect_exact(rest)

    child.expect("Knowledge transfer")
    child.expect("Layer 1: triple, 2 ranks of 3")
    child.expect("Log: .*jsonl")
    complete("extract-s", "eq")
    child.send(' knowledge "The capital of France is Paris"\r')
    child.expect("Processing 30 token positions...")
    child.expect("\x1b\\[32m✓ Extracted sequence modulation 'knowledge' \\(30 tokens averaged\\)")
    child.expect(r"Layer 1: magnitude=\d+\.\d{6}")
    complete("inject kno", "wledge")
    child.send(' "The capital of Germany is"\r')
    child.expect("Injected 'knowledge' .* into layers \\[1, 2\\], tokens 24 's' of 25")
    child.expect("Baseline .* With knowledge")
    child.expect("Top-5 Predictions:")
    child.expect(r"KL Divergence: \d+\.\d{6}")

    type_in("injekt knowledge text\r")
    child.expect("Error: Unknown command: injekt; did you mean 'inject'?")
    type_in('inject knowledge "" \r')
    child.expect("Error: the text is empty")

    type_in("inject knowledge Once upon a time -tokens 10000\r")
    child.expect("10000")
    child.expect(pexpect.TIMEOUT, timeout=2)
    child.sendintr()
    if child.expect(["Interrupted", "Exception ignored in"]) == 1:  # Python drops it in a __del__
        child.sendintr()
        child.expect("Interrupted")
    type_in("\x03")
    child.expect("Use 'exit' to quit")
    type_in("half a li\x03")
    child.expect("Use 'exit' to quit")

    type_in("list\r")
    child.expect(r"knowledge \|\s+1,2 \| triple")
    type_in("\x1b[A\x1b[A\x1b[A\r")  # three lines up: the empty text
    child.expect("Error: the text is empty")

    type_in("\x04")
    child.expect("Goodbye!")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    for shelf in (0, 1):
        assert f"base | float32 | layers 1,2 | shelf {shelf} | greedy" in said.getvalue()
    history = (tmp_path / "npt_fast" / "history").read_text()
    assert '+extract-seq knowledge "The capital of France is Paris"' in history
