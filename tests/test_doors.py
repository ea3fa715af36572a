"""Whatever a file holds that the program reads: nothing runs, hangs, dies or takes the memory.

Every cell of the table, a kind of file, a verb and an attack, runs in a process of its own.
The table is in docs/security.md.
"""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pytest
import torch
import yaml  # type: ignore[import-untyped]
from pyarrow import parquet

import npt_fast as npt
from npt_fast.checkpoint import source_file
from npt_fast.hf.base_model import load_base_model
from npt_fast.tables import markdown_table
from tests.doors import ATTACKS, DOORS, SHELL, Attack, Door, attacks, cells, modulation
from tests.fork_server import Finished, ForkServer
from tests.training import runs, tiny
from tests.transfer.known import known_relations

ROOT = Path(__file__).parent.parent
WATCHED = Path(__file__).with_name("watched.py")
SECONDS = 20  # of CPU time: the slowest takes 2, and 5.6 was seen on a loaded machine
MEMORY = 256 << 20

SCRIPTS = {
    "script": "layers\n",
    "run-script": "run script\n",
    "load": "load m.safetensors\n",
    "load-session": "load session\n",
    "keep": "extract a abc\nsave session\n",
}
FACT = (
    "facts:\n  - prompt: dead\n    inject: {from: abc}\n    tokens: 1\n    must_not_change: [abc]\n"
)


def run(server: ForkServer, line: str, folder: Path, **options: Any) -> Finished:
    """Run a command line of the table, with an eager user."""
    line = line.replace("{}", str(folder)).replace("{out}", str(folder / "new"))
    return server.run(shlex.split(line), input="y\n" * 9, folder=folder, **options)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer) -> Path:
    """A folder with a sound file behind each door."""
    folder = tmp_path_factory.mktemp("sound")
    with runs.place(folder) as place:
        place.train(folder / "run", train_layers="1", max_steps=2)
    trained = folder / "run" / "checkpoints" / "checkpoint-2"
    npt.merge(trained, folder / "a", verify=True)
    (folder / "a" / "training_metadata.json").write_text('{"architecture_version": "v2"}')
    options = npt.MergeOptions(format="safetensors", max_shard_size=2000)
    npt.merge(trained, folder / "shards", verify=True, options=options)
    model, _ = load_base_model(str(folder / "base"))
    npt.load(model, trained).save_pretrained(folder / "whole")
    npt.export(trained, folder / "exported", model_name=str(folder / "base"))
    (folder / "bin").mkdir()
    shutil.copy(folder / "whole" / "config.json", folder / "bin")
    torch.save(model.state_dict(), folder / "bin" / "pytorch_model.bin")
    (folder / "m.safetensors").write_bytes(modulation())
    (folder / "facts.yaml").write_text(FACT)
    relations = known_relations(tiny.model(initializer_range=0.2), tiny.tokenizer(), n="{}")
    (folder / "suite.yaml").write_text(yaml.safe_dump({"relations": relations}))
    (folder / "run.yaml").write_text("checkpoints: a\noutput: new\n")
    for name, content in SCRIPTS.items():
        (folder / name).write_text(content)
    for name in ("rows.jsonl", "rows.json"):
        (folder / name).write_text('{"text": "a word and one more"}\n' * 50)
    chat = '{"messages": [{"role": "user", "content": "a word"}]}\n'
    (folder / "chats.jsonl").write_text(chat * 90)
    (folder / "chat.jinja").write_text("{% for m in messages %}{{ m.content }}.{% endfor %}")
    parquet.write_table(pa.table({"text": ["a word and one more"] * 50}), folder / "rows.parquet")
    line = SHELL.replace("{out}", "{}/log.jsonl") + " --script {}/keep"
    found = run(fork_server, line, folder)
    assert found.code == 0, found
    return folder


def copied(sound: Path, folder: Path, line: str, *files: str) -> Path:
    """A copy of that folder: of its folders, those that a command line or one of `files` names."""
    text = " /".join([line, "a", *files])
    folder.mkdir()
    for path in sound.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
        elif re.search(rf"[/-]{path.name}(?![\w.])", text):
            shutil.copytree(path, folder / path.name)
    return folder


CELLS = [
    pytest.param(door, verb, name, attack, id=f"{door.name}-{verb}-{name}")
    for number, door in enumerate(DOORS)
    for verb, name, attack in cells(door, number)
]
LINES = dict.fromkeys(
    line for door in DOORS if door.file != "base.gguf" for line in door.verbs.values()
)
NOT_READ = (("merge_digests.txt", "analyze"), ("multi_layer_state.pt", "train"))
"""Doors, and verbs that do not need the file."""


def test_there_is_a_file_behind_each_door(sound: Path) -> None:
    missing = [door.file for door in DOORS if not (sound / door.file).exists()]
    assert missing == ["base.gguf"]


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.split()[0])
def test_what_is_sound_is_read(
    line: str, fork_server: ForkServer, sound: Path, tmp_path: Path
) -> None:
    """So what happens below is the attack's doing. Many doors have the same command lines.

    `SourceFile` opens a file before anything else does, so not every verb need meet every attack.
    """
    folder = copied(sound, tmp_path / "folder", line)
    log = folder / "opened"
    found = run(fork_server, line, folder, script=WATCHED, environment={"LOG": str(log)})
    assert found.code == 0, found.err
    opened = dict(row.split("\t") for row in log.read_text().splitlines())
    for door in DOORS:
        for verb in (verb for verb, command in door.verbs.items() if command == line):
            first = opened.get(str(folder / door.file))
            if not door.opened_by_libraries and (door.name, verb) not in NOT_READ:
                assert first == source_file.__file__, (door.name, verb)


HARMLESS = (
    r".*json-.*-text",  # odd text under a key that nobody asks for
    r"config\.json-(evaluate|interact|export)-.*",  # these verbs do not need the file
    r"base model: tokenizer\.json-export-.*",  # copied; who loads it reads it
    r"base model: tokenizer_config\.json-export-code",  # copied, without the code that it names
    r"multi_layer_state\.pt-train-.*",
    r"training_log\.jsonl-train-.*",  # lines that are none are dropped: a killed run leaves some
    r"merge_digests\.txt-merge-width",  # digests of files that are not there
    r"data: \.txt-.*-width",
    r"data: \.parquet-.*-alias",  # read in pieces
)
"""Cells, as patterns, that a verb may pass over without a word."""


@pytest.mark.parametrize(("door", "verb", "name", "attack"), CELLS)
def test_nothing_runs_hangs_dies_or_takes_the_memory(
    door: Door,
    verb: str,
    name: str,
    attack: Attack,
    fork_server: ForkServer,
    sound: Path,
    tmp_path: Path,
) -> None:
    folder = copied(sound, tmp_path / "folder", door.verbs[verb], door.file)
    attack(folder / door.file)
    found = run(fork_server, door.verbs[verb], folder)
    printed = found.out + found.err
    assert not (folder / "canary").exists()
    assert found.code in (0, 1, 3) and "Traceback" not in printed, found
    assert all(line.isprintable() for line in found.err.splitlines()), found.err
    assert found.seconds < SECONDS and found.memory < MEMORY, found
    named = any(name in printed for name in (Path(door.file).name, *door.also_named))
    if found.code:
        assert named, printed
        assert sum(line.startswith("Error: ") for line in found.err.splitlines()) <= 1
    else:
        cell = f"{door.name}-{verb}-{name}"
        assert named or any(re.fullmatch(pattern, cell) for pattern in HARMLESS), printed


def test_the_documentation_has_the_table() -> None:
    header = ["file", "verbs", *ATTACKS]
    rows = []
    for door in DOORS:
        tried = {name for name, _ in attacks(door)}
        rows.append(
            [door.name, ", ".join(door.verbs), *("x" if a in tried else "" for a in ATTACKS)]
        )
    assert markdown_table(header, rows) in (ROOT / "docs" / "security.md").read_text()
