"""Whatever a file holds that the program reads: nothing runs, hangs, dies or takes the memory.

Every cell of the table, a kind of file, a verb and an attack, runs in a process that is forked from
one which has imported everything. What each does is the table in docs/security.md.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pytest
from pyarrow import parquet

import npt_fast as npt
from npt_fast.tables import markdown_table
from tests.doors import ATTACKS, DOORS, SHELL, Attack, Door, attacks, modulation
from tests.training import runs

ROOT = Path(__file__).parent.parent
SECONDS = 5
MEMORY = 256 << 20

SCRIPTS = {
    "script": "layers\n",
    "run-script": "run script\n",
    "load": "load m.safetensors\n",
    "load-session": "load session\n",
    "keep": "extract a abc\nsave session\n",
}
FACT = "facts:\n  - prompt: dead\n    inject: {from: abc}\n    must_not_change: [abc]\n"

SERVER = """
import json, os, signal, sys, time, traceback
import torch, transformers, pyarrow.parquet
import npt_fast.training.train, npt_fast.training.evaluation, npt_fast.transfer.session
import npt_fast.transfer.check, npt_fast.cli.shell.commands
from npt_fast.cli.main import main

def resident(name):
    status = dict(row.split(":", 1) for row in open("/proc/self/status"))
    return int(status[name].split()[0]) << 10

def run(arguments, folder):
    os.chdir(folder)
    start = resident("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak is counted from here
    for descriptor, name in ((0, "in"), (1, "out"), (2, "err")):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), descriptor)
    sys.stdin = sys.__stdin__ = open(0, closefd=False)
    try:
        main(arguments)
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    sys.stderr.flush()
    with open("memory", "w") as file:
        file.write(str(resident("VmHWM") - start))
    os._exit(code)

for line in sys.stdin:
    arguments, folder = json.loads(line)
    child = os.fork()
    if child == 0:
        run(arguments, folder)
    end = time.monotonic() + 60
    while True:
        found, status, usage = os.wait4(child, os.WNOHANG)
        if found or time.monotonic() > end:
            break
        time.sleep(0.005)
    if not found:
        os.kill(child, signal.SIGKILL)
        _, status, usage = os.wait4(child, 0)
    print(json.dumps({
        "code": os.waitstatus_to_exitcode(status),
        "seconds": usage.ru_utime + usage.ru_stime,
    }), flush=True)
"""


class Server:
    """Runs command lines, each in a fork of a process that has imported everything."""

    def __init__(self, state: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, cwd=ROOT,
            env={
                **os.environ, "OMP_NUM_THREADS": "1", "XDG_STATE_HOME": str(state),
                "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(state / "modules"),
                "PYTHONWARNINGS": "ignore",
            },
        )  # fmt: skip

    def run(self, line: str, folder: Path) -> dict[str, Any]:
        """Exit code, CPU seconds, bytes of memory above the start, and what was printed."""
        line = line.replace("{}", str(folder)).replace("{out}", str(folder / "new"))
        for name in ("out", "err", "memory"):
            (folder / name).unlink(missing_ok=True)
        (folder / "in").write_text("y\n" * 9)
        assert self._process.stdin and self._process.stdout
        print(json.dumps([shlex.split(line), str(folder)]), file=self._process.stdin, flush=True)
        found: dict[str, Any] = json.loads(self._process.stdout.readline())
        for name in ("out", "err"):
            found[name] = (folder / name).read_text(errors="surrogateescape")
        found["memory"] = int((folder / "memory").read_text())
        return found

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    found = Server(tmp_path_factory.mktemp("state"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, server: Server) -> Path:
    """A folder with a sound file behind each door."""
    folder = tmp_path_factory.mktemp("sound")
    with runs.place(folder) as place:
        place.train(folder / "run", train_layers="1", max_steps=2)
    trained = folder / "run" / "checkpoints" / "checkpoint-2"
    npt.merge(trained, folder / "a", verify=True)
    options = npt.MergeOptions(format="safetensors", max_shard_size=2000)
    npt.merge(trained, folder / "shards", verify=True, options=options)
    (folder / "m.safetensors").write_bytes(modulation())
    (folder / "facts.yaml").write_text(FACT)
    for name, content in SCRIPTS.items():
        (folder / name).write_text(content)
    for name in ("rows.jsonl", "rows.json"):
        (folder / name).write_text('{"text": "a word and one more"}\n' * 50)
    parquet.write_table(pa.table({"text": ["a word and one more"] * 50}), folder / "rows.parquet")
    found = server.run(SHELL.replace("{out}", "{}/log.jsonl") + " --script {}/keep", folder)
    assert found["code"] == 0, found
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "folder"))


CELLS = [
    pytest.param(door, verb, name, attack, id=f"{door.name}-{verb}-{name}")
    for door in DOORS
    for verb in door.verbs
    for name, attack in attacks(door)
]


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.name)
def test_what_is_sound_is_read(door: Door, server: Server, folder: Path) -> None:
    """So what happens below is the attack's doing."""
    for verb, line in door.verbs.items():
        found = server.run(line, folder)
        if door.file != "base.gguf":
            assert found["code"] == 0 and (folder / door.file).exists(), (verb, found["err"])
        if (folder / "new").is_dir():
            shutil.rmtree(folder / "new")
        (folder / "new").unlink(missing_ok=True)


HARMLESS = (
    r".*json-.*-text",  # odd text under a key that nobody asks for
    r"config\.json-(evaluate|interact)-.*",  # these verbs do not need the file
    r"multi_layer_state\.pt-train-.*",
    r"training_log\.jsonl-train-.*",  # lines that are none are dropped: a killed run leaves some
    r"merge_digests\.txt-merge-width",  # digests of files that are not there
    r"data: \.txt-.*-width",
    r"data: \.parquet-.*-alias",  # read in pieces
)
"""Cells, as patterns, that a verb may pass over without a word."""


@pytest.mark.parametrize(("door", "verb", "name", "attack"), CELLS)
def test_nothing_runs_hangs_dies_or_takes_the_memory(
    door: Door, verb: str, name: str, attack: Attack, server: Server, folder: Path
) -> None:
    attack(folder / door.file)
    found = server.run(door.verbs[verb], folder)
    printed = found["out"] + found["err"]
    assert not (folder / "canary").exists()
    assert found["code"] in (0, 1, 3) and "Traceback" not in printed, found
    assert all(line.isprintable() for line in found["err"].splitlines()), found["err"]
    assert found["seconds"] < SECONDS and found["memory"] < MEMORY, found
    named = any(name in printed for name in (Path(door.file).name, *door.also_named))
    if found["code"]:
        assert named, printed
        assert sum(line.startswith("Error: ") for line in found["err"].splitlines()) <= 1
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
