"""Replies of commands, and errors for bad input."""

from __future__ import annotations

import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import npt_fast as npt
from npt_fast.cli.shell.commands import COMMANDS
from tests.cli.shell.piped import Shell
from tests.training import tiny


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


def test_every_command_answers(shell: Shell) -> None:
    """Both as lines and as JSON; files that are written can be read again."""
    lines = [
        "help", "help inject", "track x yy", "track x", "track", "untrack x z", "tokens some text",
        "extract a first", "extract b second -pos 1", "extract-seq s third", "list", "info a",
        "add a b v -vectors", "subtract a b v -vectors", "average a b s v -vectors",
        "scale a 2 v -vectors", "negate a v -vectors", "inject-add v text -strength 0.5",
        "layers upper_half", "layers all", "inject a text -pos last_2", "delete v",
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
        "✓ Cleared all tracked tokens", "Warning: 'yy' is 2 tokens; the first, 'y', is tracked",
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
    ("inject a text -pos middle", "'middle' is not a position"),
    ("extract c text -pos all", "4 positions have a modulation each"),
    ("inject a text -tokens 0", "must be at least 1"),
    ("inject a text -tokens two", "tokens must be a whole number, not 'two'"),
    ("inject a text -temp 0", "temperature must be positive"),
    ("inject a text -strategy best", "strategy must be one of greedy, top_k, top_p, sample"),
    ("inject a text -strenght 1", "unknown option -strenght; did you mean '-strength'?"),
    ("inject a text -when never", "-when must be one of prefill, decode, both"),
    ("inject a text -when decode", "nothing was injected"),
    ("inject-add sum text", "which a combined modulation does not have; use exact-add"),
    ("subtract a narrow new", "different layers"),
    ("subtract a narrow new -vectors", "different layers"),
    ("add a sum new -vectors", "was combined on dW and has no vectors; leave out -vectors"),
    ("scale a inf new -vectors", "a number that is not finite"),
    ("add a a", "NEW is missing: add A B NEW"),
    ("average a new", "average takes two modulations or more"),
    ("scale a big new", "FACTOR must be a number, not 'big'"),
    ("scale a inf new", "cannot be multiplied by inf"),
    ("calc a", "write it like calc new = 0.7*a - b"),
    ("layers 3", "layer 3 is not loaded; loaded are 1, 2"),
    ("layers one", "not a list of layers such as 11,13 or 11-15 (all, upper_half"),
    ("set sed=1", "no setting is called 'sed'; did you mean 'seed'?"),
    ("set seed", "write it like set seed=3"),
    ("load missing", "missing: cannot be opened: No such file"),
    ("load old.pkl", "is a pickle, which can run code"),
    ("load corrupt.safetensors", "corrupt.safetensors: not a safetensors file"),
    ("load other.safetensors", "belongs to another base model"),
    ("run missing", "missing: cannot be opened: No such file"),
    ("export-lora a taken", "taken: exists already"),
    ("save taken", "taken: exists and is not a saved session"),
    ("save nowhere/deep/one a", "cannot be written"),
    ('track ""', "the text is empty"),
    ("clear all", "'all' is one argument too many"),
    # a script is a file: what is in it does not fill the screen
    (_LONG, "Unknown command: xxx"),
    (f"extract a text {_LONG} -pos {_LONG}", "is not a position"),
    (f"extract a text -pos at:{_LONG}", "does not occur in 'text'"),
    (f"inject a text -{_LONG}", "unknown option -xxx"),
    (f"inject {_LONG} text", "no modulation is called 'xxx"),
    (f"inject a text -pos {'9' * 5000}", "is not a position"),
    (f"inject a text -when {_LONG}", "-when must be one of"),
    (f"inject a text -strategy {_LONG}", "strategy must be one of greedy"),
    (f"scale a {_LONG} new", "FACTOR must be a number"),
    (f"layers {_LONG}", "is not a list of layers"),
    (f"set {_LONG}=1", "no setting is called"),
    (f"set {_LONG}", "write it like set seed=3"),
    (f"clear {_LONG}", "is one argument too many"),
]


def test_bad_input_is_one_line_and_the_shell_lives_on(shell: Shell, tmp_path: Path) -> None:
    Path("taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    (tmp_path / "old.pkl").write_bytes(pickle.dumps({}))
    (tmp_path / "corrupt.safetensors").write_bytes(b"\x10" * 40)
    other = tiny.model(num_hidden_layers=5)
    npt.convert(other, npt.NPTConfig(layers=[1], rank=2))
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
    assert "Warning: layers [1] of the modulation are off and were left out" in out
    assert err.startswith("Error: line 6: 'c' changes layers [2], which are off; on are [1]")
    assert err.count("\n") == 1


def test_no_effect_says_why(shell: Shell) -> None:
    _, out, _ = shell.pipe("extract a text", "inject a text", "inject-add a text -strength 0")
    reasons = [line for line in out.splitlines() if line.startswith("No effect")]
    assert reasons == [
        "No effect: the injected modulation is the token's own",
        "No effect: the strength is 0",
    ]


def test_options_without_meaning_are_said_so(shell: Shell) -> None:
    code, out, _ = shell.pipe("extract a first", "inject a text -alpha 0.5")
    assert code == 0
    assert "Warning: -alpha has no effect on replace; use -strength" in out


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


def test_bos_is_read_counted_and_shown(bos_shell: Shell) -> None:
    lines = ["tokens ab", "extract a ab -pos 1", "inject a ab -pos 1", "compare a ab", "sweep a ab"]
    code, out, err = bos_shell.pipe(*lines, "info a", "inject a <bos>ab -pos 1")
    assert (code, err) == (0, "")
    for line in (
        "|        0 |           -3 | 257 | '<bos>' |", "  Token 1 'a' of 3", "  Position: 1 'a'",
        "  Tokens: with special tokens", "Tokens: 2 'b' of 3",
        "No effect: the injected modulation is the token's own",
    ):  # fmt: skip
        assert line in out.splitlines(), line
    assert out.count("into layers [1, 2], tokens 1 'a' of 3, ") == 2
    assert out.count("Tokens: 2 'b' of 3") == 2


def test_how_texts_are_read_is_set(bos_shell: Shell) -> None:
    changes = ["set special_tokens=false", "set special_tokens=True chat=true", "undo", "undo"]
    _, found = bos_shell.json("tokens ab", *(line for c in changes for line in (c, "tokens ab")))
    texts = ["".join(entry["result"]["tokens"]) for entry in found[::2]]
    assert texts == ["<bos>ab", "ab", "<bos>user:ab;me:", "ab", "<bos>ab"]
    assert found[3]["result"]["special_tokens"] is found[3]["result"]["chat"] is True
    for option, text in (("--no-special-tokens", "ab"), ("--chat", "<bos>user:ab;me:")):
        _, (entry,) = bos_shell.json("tokens ab", options=[option])
        assert "".join(entry["result"]["tokens"]) == text
    for line, problem in (
        ("set chat=yes", "chat must be true or false, not 'yes'"),
        ("set chat=true special_tokens=false", "a chat template writes special tokens"),
    ):
        _, (entry,) = bos_shell.json(line)
        assert problem in entry["error"]


def test_what_was_read_in_another_way_is_said(bos_shell: Shell) -> None:
    """On loading it: a saved session goes on as it was, and a file of before has no BOS."""
    bos_shell.json("set special_tokens=false", "extract a ab", "save session", "save one a")
    _, out, _ = bos_shell.pipe("load one.safetensors", "load session", "tokens ab", "set")
    assert "Note: 'one' was read without special tokens; this session reads texts with" in out
    assert "Note: texts are read without special tokens now, as in the saved session" in out
    assert "'<bos>'" not in out and "special_tokens=False, chat=False" in out
    assert "Note: 'a'" not in out
    older = npt.load_modulation("one.safetensors")
    for key in ("special_tokens", "chat"):
        del older.origin[key]  # type: ignore[attr-defined]
    older.save("older.safetensors")
    _, out, _ = bos_shell.pipe("load older.safetensors", "calc b = 2 * older", "info b")
    assert "Note: 'older' was read without special tokens (older file); this session reads" in out
    assert "  Tokens: without special tokens (older file)" in out.splitlines()
