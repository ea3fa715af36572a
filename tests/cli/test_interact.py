"""``npt-fast interact``: through a pipe, from a script, on a terminal; logs that are run again."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pexpect
import pytest
import torch
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

import npt_fast as npt
from npt_fast.cli.shell_commands import COMMANDS, Context
from npt_fast.cli.shell_line import parse, words
from npt_fast.cli.shell_terminal import CommandCompleter
from npt_fast.cli.shell_views import arrow
from npt_fast.errors import TransferError
from npt_fast.transfer import journal
from npt_fast.transfer.session import Session
from tests import hostile_models
from tests.checkpoints import run
from tests.training import runs, tiny

DATA = Path(__file__).parent.parent / "data" / "smollm2_135m"


@dataclass
class Shell:
    """Runs the verb in this process on the tiny model."""

    capsys: Any
    monkeypatch: pytest.MonkeyPatch
    base: Path
    checkpoint: Path

    @property
    def options(self) -> list[object]:
        return ["interact", "--checkpoint", self.checkpoint, "--model_name", self.base]

    def pipe(self, *lines: str, options: list[object] | None = None) -> tuple[int, str, str]:
        text = "".join(f"{line}\n" for line in lines)
        self.monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        more = options or []
        device = [] if "--device" in more else ["--device", "cpu"]
        code, out, err = run(self.capsys, *self.options, *device, *more)
        notice = f"Loading model from {self.base}...\n"
        assert err.startswith(notice)
        return code, out, err.removeprefix(notice)

    def json(
        self, *lines: str, options: list[object] | None = None
    ) -> tuple[int, list[dict[str, Any]]]:
        code, out, err = self.pipe(*lines, options=["--json", *(options or [])])
        assert err == ""
        return code, [json.loads(line) for line in out.splitlines()]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("model")
    base = tiny.save(folder / "base", initializer_range=0.2, eos_token_id=None)  # never ends
    return base, runs.start(folder / "np", 1, 2)


@pytest.fixture
def shell(
    files: tuple[Path, Path], capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Shell]:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    yield Shell(capsys, monkeypatch, *files)
    signal.signal(signal.SIGTERM, before)


def test_words() -> None:
    found = words(r'inject  a "The capital" plain "say \"hi\"" ""')
    assert [word.text for word in found] == [
        "inject", "a", "The capital", "plain", 'say "hi"', "",
    ]  # fmt: skip
    assert [word.quoted for word in found] == [False, False, True, False, True, True]


INJECT = COMMANDS["inject"]


@pytest.mark.parametrize(
    ("rest", "text", "options"),
    [
        ('a "The capital of" -tokens 5', "The capital of", {"tokens": "5"}),
        ("a The  capital of -tokens 5", "The  capital of", {"tokens": "5"}),
        ("a -pos -2 The capital", "The capital", {"pos": "-2"}),
        ('-temp 0.5 a "x"', "x", {"temp": "0.5"}),
        ("a minus -1 degrees", "minus -1 degrees", {}),
        ('a "-tokens 5"', "-tokens 5", {}),
        ('a ""', "", {}),
        ('a "x" -pos "at:New York"', "x", {"pos": "at:New York"}),
    ],
)
def test_text_with_and_without_quotes(rest: str, text: str, options: dict[str, str]) -> None:
    found = INJECT.parse(rest)
    assert (found["NAME"], found["TEXT"], found.options) == ("a", text, options)


@pytest.mark.parametrize(
    ("rest", "problem"),
    [
        ("", "NAME is missing: inject NAME TEXT"),
        ("a", "TEXT is missing"),
        ('a "The capital', r"a quote \(\"\) is not closed"),
        ('a The "capital" of', "not clear where the text ends; put it in quotes"),
        ("a The -tokens 5 capital", "not clear where the text ends"),
        ('a "x" "y"', "not clear where the text ends"),
        ('a "x" -tokens', "-tokens needs a value"),
        ('a "x" -tokens -temp 1', "-tokens needs a value"),
        ('a "x" -token 5', "unknown option -token; did you mean '-tokens'"),
        ('a "x" --tokens 5', None),
        ('a "x" -pos 1 -pos 2', "-pos is given twice"),
        ("a the -ing form", "text with a word like that goes in quotes"),
    ],
)
def test_lines_that_do_not_fit(rest: str, problem: str | None) -> None:
    if problem is None:
        assert INJECT.parse(rest).options == {"tokens": "5"}
        return
    with pytest.raises(TransferError, match=problem):
        INJECT.parse(rest)


def test_repeated_arguments() -> None:
    found = parse("a b c d", "", ["A...", "NEW"], [], [])
    assert (found.values["A"], found["NEW"]) == (["a", "b", "c"], "d")
    assert parse("", "", ["[TOKEN...]"], [], []).values == {"TOKEN": []}
    with pytest.raises(TransferError, match="'b' is one too many"):
        parse("a b", "", ["NAME"], [], [])


@pytest.mark.parametrize(
    ("before", "after", "sign"),
    [(0.1, 0.3, "↑↑"), (0.1, 0.13, "↑"), (0.1, 0.11, "="), (0.13, 0.1, "↓"), (0.3, 0.1, "↓↓"),
     (0.0, 0.1, "↑↑"), (0.0, 0.0, "=")],
)  # fmt: skip
def test_arrows(before: float, after: float, sign: str) -> None:
    assert arrow(before, after, 1.0, 0.2) == sign


def test_the_commands_of_the_guide(shell: Shell) -> None:
    code, out, err = shell.pipe(
        'track "i" "y"',
        'extract-seq knowledge "The capital of France is Paris"',
        'inject knowledge "The capital of Germany is"',
    )
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[:3] == [
        "✓ Tracking tokens: 'i', 'y'",
        "Processing 30 token positions...",
        "✓ Extracted sequence modulation 'knowledge' (30 tokens averaged)",
    ]
    for line, layer in zip(lines[3:5], (1, 2), strict=True):
        assert re.fullmatch(rf"  Layer {layer}: magnitude=\d+\.\d{{6}}", line)
    assert lines[5].startswith(
        "Injected 'knowledge' (replace, strength 1, prefill, greedy) into layers [1, 2], "
        "tokens 24 's' of 25, "
    )
    assert lines[6].split() == ["Baseline", "|", "With", "knowledge"]
    assert lines[8] == "Top-5 Predictions:"
    number = r"\d\.\d{4}"
    for place, line in enumerate(lines[9:14], 1):
        assert re.fullmatch(rf"  {place}\. .{{12}}.*: {number} → {number}  \[.*%\] [↑↓=]+", line)
    assert lines[14] == "Tracked Tokens:"
    assert lines[15].startswith("  'i'") and lines[16].startswith("  'y'")
    assert re.fullmatch(r"KL Divergence: \d+\.\d{6}", lines[17])
    assert "\x1b" not in out


def test_one_json_object_per_command(shell: Shell) -> None:
    """The figures are those of the library."""
    code, found = shell.json(
        "# a comment", "", "/track x", '!extract a "first"', 'inject a "other" -tokens 3', "exit",
        "never reached",
    )  # fmt: skip
    assert code == 0
    assert [entry["command"] for entry in found] == [
        "track x", 'extract a "first"', 'inject a "other" -tokens 3', "exit",
    ]  # fmt: skip
    assert all(entry["ok"] for entry in found)
    result = found[2]["result"]
    model, tokenizer = tiny.model(initializer_range=0.2), tiny.tokenizer()
    npt.load(model, shell.checkpoint)
    modulation = npt.extract(model, tokenizer, "first")
    ids = tokenizer("other", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        before = model(ids).logits[0, -1].softmax(-1)
        with npt.inject(model, modulation):
            after = model(ids).logits[0, -1].softmax(-1)
    assert result["kl"] == pytest.approx((before * (before / after).log()).sum().item(), abs=1e-5)
    (x,) = tokenizer("x")["input_ids"]
    assert result["tracked"] == [
        {"text": "x", "before": pytest.approx(before[x].item(), abs=1e-6),
         "after": pytest.approx(after[x].item(), abs=1e-6)},
    ]  # fmt: skip
    assert (result["layers"], result["positions"], len(result["injected"])) == ([1, 2], [4], 3)


def test_every_command_answers(shell: Shell) -> None:
    """Plain and as JSON; what is written can be read again."""
    lines = [
        "help", "help inject", "track x yy", "track x", "track", "untrack x z", "tokens some text",
        "extract a first", "extract b second -pos 1", "extract-seq s third", "list", "info a",
        "add a b c", "subtract a b c", "average a b s c", "scale a -0.5 c", "negate a c",
        "calc d = 0.5*a - mean(b, s)", "delete c", "test text", "test text -tokens 3",
        "inject a text -strategy top_k -top_k 3 -temp 0.7 -tokens 4",
        "inject a text -strategy top_p -top_p 1.0 -pos 0:2 -when both -tokens 2",
        "inject-blend a text -alpha 0.5", "inject-blend d text -alpha 0.5 -exact",
        "inject-add a text -strength 2", "inject-add d text -exact -strength -1",
        "compare a text", "sweep a text", "sweep a text -strength 1,3 -pos first",
        "layers", "layers 2", "layers all", "set", "set seed=3 temp=0.5", "bake a -strength 2",
        "undo", "export-lora a lora", "save session", "save one a", "load one.safetensors",
        "load session", "history", "clear-history", "clear", "reset", "undo", "quit",
    ]  # fmt: skip
    assert {line.split()[0] for line in lines} | {"run", "exit"} == set(COMMANDS)
    code, out, err = shell.pipe(*lines)
    assert (code, err) == (0, "")
    for label in (
        "Already tracking: x", "✓ Stopped tracking: x", "Token not tracked: z",
        "✓ Cleared all tracked tokens", "Warning: 'yy' is 2 tokens; the first, 'y', is followed",
        "✓ Created modulation 'd' = 0.5*a - mean(b, s) (exact, on dW)", "✓ Deleted modulation 'c'",
        "Complete generation:", "  Token   4: ", "tokens 0 't', 1 'e', the generated ones of 4",
        "Tracked Tokens, injected, token by token:", "✓ Active layers: [2] (off: [1])",
        "✓ Baked 'a' x2 into layers [1, 2]; undo takes it out", "✓ Undone: bake a",
        "✓ Session saved to session (4 modulations)", "strategy=greedy, temperature=0.5",
        "✓ Undone: reset", "Goodbye!",
    ):  # fmt: skip
        assert label in out, label
    for name in ("lora", "session"):
        for file in Path(name).iterdir():
            file.unlink()
        Path(name).rmdir()
    code, found = shell.json(*lines)
    assert (code, len(found)) == (0, len(lines))


_LONG = "x" * 5000
BAD = [
    ("injekt a text", "Unknown command: injekt; did you mean 'inject'?"),
    ("extract", "NAME is missing: extract NAME TEXT [-pos X]"),
    ("inject b text", "no modulation is called 'b'; there are a, narrow, sum"),
    ("inject summ text", "no modulation is called 'summ'; did you mean 'sum'?"),
    ('inject a ""', "the text is empty"),
    ('inject a "text', 'a quote (") is not closed'),
    ('inject a some "text"', "it is not clear where the text ends"),
    ("extract c text -pos 4", "position 4 is outside the text, which has 4 tokens"),
    ("inject a text -pos -5", "position -5 is outside the text"),
    ("inject a text -pos at:x:y", "'x:y' does not occur"),
    ("inject a text -pos middle", "'middle' is no position"),
    ("extract c text -pos all", "4 positions give as many modulations"),
    ("inject a text -tokens 0", "must be at least 1"),
    ("inject a text -tokens two", "tokens must be a whole number, not 'two'"),
    ("inject a text -temp 0", "temperature must be positive"),
    ("inject a text -strategy best", "strategy must be greedy, top_k, top_p or sample"),
    ("inject a text -strenght 1", "unknown option -strenght; did you mean '-strength'?"),
    ("inject a text -when never", "-when must be one of prefill, decode, both"),
    ("inject a text -when decode", "nothing was injected"),
    ("inject-add sum text", "this modulation is a sum of others; take exact-add"),
    ("subtract a narrow new", "different layers"),
    ("add a a", "NEW is missing: add A B NEW"),
    ("average a new", "average takes two modulations or more"),
    ("scale a big new", "FACTOR must be a number, not 'big'"),
    ("scale a inf new", "cannot be multiplied by inf"),
    ("calc a", "it goes like: calc new = 0.7*a - b"),
    ("layers 3", "layer 3 is not loaded; there are 1, 2"),
    ("layers one", "layers are numbers like 11,13, or all"),
    ("set sed=1", "no setting is called 'sed'; did you mean 'seed'?"),
    ("set seed", "it goes like: set seed=3"),
    ("load missing", "missing: cannot be opened: No such file"),
    ("load old.pkl", "is a pickle, which can run code"),
    ("load corrupt.safetensors", "corrupt.safetensors: not a safetensors file"),
    ("load other.safetensors", "is of another base model"),
    ("run missing", "missing: cannot be opened: No such file"),
    ("export-lora a taken", "taken: exists already"),
    ("save taken", "taken: exists and is no saved session"),
    ("save nowhere/deep/one a", "cannot be written"),
    ('track ""', "the text is empty"),
    ("clear all", "'all' is one too many"),
    # a script is a file: what is in it does not fill the screen
    (_LONG, "Unknown command: xxx"),
    (f"extract a text {_LONG} -pos {_LONG}", "is no position"),
    (f"extract a text -pos at:{_LONG}", "does not occur in 'text'"),
    (f"inject a text -{_LONG}", "unknown option -xxx"),
    (f"inject {_LONG} text", "no modulation is called 'xxx"),
    (f"inject a text -pos {'9' * 5000}", "is no position"),
    (f"inject a text -when {_LONG}", "-when must be one of"),
    (f"inject a text -strategy {_LONG}", "strategy must be greedy"),
    (f"scale a {_LONG} new", "FACTOR must be a number"),
    (f"layers {_LONG}", "layers are numbers"),
    (f"set {_LONG}=1", "no setting is called"),
    (f"set {_LONG}", "it goes like: set seed=3"),
    (f"clear {_LONG}", "is one too many"),
]


def test_bad_input_is_one_line_and_the_shell_lives_on(shell: Shell, tmp_path: Path) -> None:
    Path("taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    (tmp_path / "old.pkl").write_bytes(pickle.dumps({}))
    (tmp_path / "corrupt.safetensors").write_bytes(b"\x10" * 40)
    other = tiny.model(vocab_size=300)
    npt.load(other, shell.checkpoint)
    npt.extract(other, tiny.tokenizer(), "text").save(tmp_path / "other.safetensors")
    before = ["extract a first", "calc sum = a + a", "layers 1", "extract narrow first"]
    lines = [*before, "layers all", *(line for line, _ in BAD), "list"]
    code, found = shell.json(*lines, options=["--keep-going"])
    assert code == 1
    assert [entry["command"] for entry in found] == lines
    assert all(entry["ok"] for entry in found[:5])
    for (line, problem), entry in zip(BAD, found[5:-1], strict=True):
        assert not entry["ok"], line
        assert problem in entry["error"] and "\n" not in entry["error"], entry
        assert len(entry["error"]) < 500, line
        assert "unexpected" not in entry["error"]
    assert [m["name"] for m in found[-1]["result"]["modulations"]] == ["a", "sum", "narrow"]


def test_layers_that_are_off(shell: Shell) -> None:
    code, out, err = shell.pipe(
        "extract a first", "layers 2", "inject a text", "extract c first", "layers 1",
        "inject c text",
    )  # fmt: skip
    assert code == 1
    assert "Warning: layers [1] of it are off and were left out" in out
    assert err.startswith("Error: line 6: 'c' changes layers [2], which are off; on are [1]")
    assert err.count("\n") == 1


def test_no_effect_says_why(shell: Shell) -> None:
    _, out, _ = shell.pipe("extract a text", "inject a text", "inject-add a text -strength 0")
    reasons = [line for line in out.splitlines() if line.startswith("No effect")]
    assert reasons == [
        "No effect: what was injected is what the token has of its own",
        "No effect: the strength is 0",
    ]


def test_options_without_meaning_are_said_so(shell: Shell) -> None:
    code, out, _ = shell.pipe("extract a first", "inject a text -alpha 0.5")
    assert code == 0
    assert "Warning: -alpha has no meaning for replace; -strength has" in out


def test_the_first_error_stops(shell: Shell) -> None:
    code, out, err = shell.pipe("extract a first", "inject b text", "list")
    assert (code, err) == (1, "Error: line 2: no modulation is called 'b'; there are a\n")
    assert "Name" not in out
    code, out, err = shell.pipe("inject b text", "list", options=["--keep-going"])
    assert (code, out) == (1, "No saved modulations\n")
    assert err == "Error: line 1: no modulation is called 'b'; extract one first\n"


def test_scripts(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "inner").write_text("extract a first\n")
    (tmp_path / "outer").write_text("# é\n\nrun inner\nlist\n")
    code, found = shell.json(options=["--script", "outer"])
    assert code == 0
    assert [entry["command"] for entry in found] == ["run inner", "extract a first", "list"]
    (tmp_path / "circle").write_text("run circle\n")
    code, out, err = shell.pipe(options=["--script", "circle"])
    assert code == 1 and err.count("\n") == 1 and "scripts that run each other" in err
    (tmp_path / "inner").write_text("extract\nlist\n")
    code, out, err = shell.pipe(options=["--script", "outer"])
    assert (code, out) == (1, "Running inner\n")
    assert err == (
        "Error: line 3: run inner, line 1: NAME is missing: extract NAME TEXT [-pos X]\n"
    )
    code, out, err = shell.pipe(options=["--script", "outer", "--keep-going"])
    assert (code, out) == (1, "Running inner\nNo saved modulations\nNo saved modulations\n")


def test_a_bug_does_not_end_the_session(shell: Shell) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("shapes\ndo not fit")

    shell.monkeypatch.setattr(Session, "predict", broken)
    code, out, err = shell.pipe("test text", "list", options=["--keep-going"])
    assert (code, out) == (1, "No saved modulations\n")
    assert err == ("Error: line 1: unexpected RuntimeError: shapes do not fit; please report it\n")


SESSION = [
    "track x", "extract a first", "extract-seq s second", "set seed=5", "calc c = a - 0.5*s",
    "inject c text -strategy top_p -tokens 6 -temp 2", "inject d text", "nonsense", "bake a",
    "test text", "undo", "layers 2", "save session", "compare a text", "sweep a text", "info c",
    "list",
]  # fmt: skip


def test_a_log_is_run_again(shell: Shell, tmp_path: Path) -> None:
    """With the same results; what differs is named."""
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
    assert "Not run again, as it writes files: save session" in out

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


def test_a_bad_modulation_leaves_the_shelf_as_it_was(shell: Shell) -> None:
    shell.json("extract a first", "save a.safetensors a")
    good = Path("a.safetensors").read_bytes()
    length = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + length])
    described = json.loads(header["__metadata__"]["npt_modulation"])
    deep: Any = {}
    for _ in range(850):
        deep = {"factor": 1.0, "of": deep}
    origins = {"deep": deep, "large": {"factor": 10**400, "of": {}}, "wrong": [5]}
    for name, origin in origins.items():
        header["__metadata__"]["npt_modulation"] = json.dumps({**described, "origin": origin})
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        Path(name).write_bytes(len(text).to_bytes(8, "little") + text + good[8 + length :])
    os.mkfifo("pipe")
    bad = [f"load {name}" for name in (*origins, "pipe", "/dev/zero")] + ["run pipe"]
    code, found = shell.json("extract a first", *bad, "list", options=["--keep-going"])
    assert code == 1 and [entry["ok"] for entry in found] == [True, *[False] * len(bad), True]
    assert [item["name"] for item in found[-1]["result"]["modulations"]] == ["a"]
    assert not any("please report" in entry.get("error", "") for entry in found)


def test_a_log_that_cannot_go_on_does_not_end_the_session(shell: Shell) -> None:
    shell.monkeypatch.setattr("npt_fast.transfer.journal._MAX_BYTES", 3000)
    code, out, err = shell.pipe("extract a first", *["list"] * 20, options=["--log", "log"])
    assert code == 1 and out.count("Extracted") == 1
    assert err.count("\n") == 1 and "log: is full" in err and "not logged any more" in err
    assert len(journal.read("log")[1]) >= 1


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
    code, _, err = shell.pipe(options=["--layers", "2,3"])
    assert code == 1 and "has no layer 3, only [1, 2]" in err


def test_a_terminal_needs_prompt_toolkit(shell: Shell) -> None:
    from npt_fast.cli import interact

    shell.monkeypatch.setattr(interact, "_is_terminal", lambda: True)
    shell.monkeypatch.setattr(interact, "find_spec", lambda name: None)
    code, _, err = run(shell.capsys, *shell.options)
    assert code == 1 and "pip install 'npt_fast[interact]'" in err and err.count("\n") == 1


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
    assert "--keep-going" in result.stdout and "--assert" in result.stdout
    assert not {"torch", "transformers", "prompt_toolkit"} & set(result.stderr.split())


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
        "-c", "from npt_fast.cli.main import main; main()", "interact", "--device", "cpu",
        "--model_name", str(files[0]), "--checkpoint", str(files[1]),
    ]  # fmt: skip
    environment = {
        **os.environ, "XDG_STATE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1",
        "TERM": "xterm-256color",
    }  # fmt: skip
    environment.pop("NO_COLOR", None)
    child = pexpect.spawn(
        sys.executable, arguments, env=environment, encoding="utf-8", timeout=40,
        dimensions=(40, 120),
    )  # fmt: skip
    said = io.StringIO()
    child.logfile_read = said

    def type_in(keys: str) -> None:
        """As the prompt appears, a terminal is asked where its cursor is."""
        child.expect_exact("\x1b[6n")
        child.send("\x1b[1;1R")
        child.send(keys)

    def complete(keys: str, rest: str) -> None:
        """Tab, and what it adds."""
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


@pytest.mark.slow
def test_a_pipe_to_a_real_model(tmp_path: Path) -> None:
    lines = [
        'extract a "The capital of France is"', 'inject a "The capital of Germany is" -tokens 4',
        "inject", 'test "The capital of Germany is"',
    ]  # fmt: skip
    command = [
        sys.executable, "-c", "from npt_fast.cli.main import main; main()", "interact", "--json",
        "--model_name", "smollm2-135m", "--device", "cpu", "--layers", "13",
        "--checkpoint", str(DATA / "layer13" / "checkpoint-600"),
    ]  # fmt: skip
    result = subprocess.run(
        command, input="\n".join(lines), capture_output=True, text=True, check=False,
        env={**os.environ, "XDG_STATE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 1
    assert result.stderr == "Loading model from smollm2-135m...\n"
    extract, inject, error = map(json.loads, result.stdout.splitlines())
    assert extract["result"]["tokens"] == ["The", " capital", " of", " France", " is"]
    assert inject["result"]["positions"] == [4] and inject["result"]["layers"] == [13]
    assert len(inject["result"]["injected"]) == 4
    assert error["ok"] is False and error["error"].startswith("line 3: NAME is missing")
