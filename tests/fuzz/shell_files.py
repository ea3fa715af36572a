"""Files that verbs read: modulations, sessions, journals, facts, options and scripts."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file

from npt_fast.cli.shell.commands import find, scripts
from npt_fast.cli.shell.loop import bare
from npt_fast.errors import NPTError
from npt_fast.transfer import journal
from npt_fast.transfer.modulation import Modulation, load_modulation
from npt_fast.transfer.session import Session
from npt_fast.transfer.strict_yaml import Setting, settings
from npt_fast.transfer.suite import Suite, read_suite
from tests.fuzz import mutations
from tests.fuzz.target import Target, check_line, fixed, same_values
from tests.second_readers import as_bytes
from tests.transfer import models


def _modulations(folder: Path) -> list[bytes]:
    found = []
    for layers, projections in (((1, 2), models.PROJECTIONS), ((2,), ("down",))):
        modulation = models.random_modulation(layers=layers, projections=projections)
        modulation.save(folder / "seed.safetensors")
        found.append((folder / "seed.safetensors").read_bytes())
    return found


def _modulation(path: Path) -> Modulation:
    """Read a modulation with its terms, which are checked when they are used."""
    found = load_modulation(path)
    for _ in found.walk():
        pass
    return found


def _same_terms(path: Path, found: Modulation) -> None:
    ours = {
        f"layer.{layer}.{projection}.{name}": tensor
        for layer, projection, terms in found.walk()
        for name, tensor in terms._asdict().items()
    }
    others = load_file(path)
    assert ours.keys() == others.keys()
    for name, tensor in others.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape)
        assert as_bytes(ours[name]) == as_bytes(tensor)


_MODEL: Any = None


def _session() -> Session:
    global _MODEL
    _MODEL = _MODEL or models.converted()
    return Session(_MODEL, models.tokenizer)


def _sessions(folder: Path) -> list[bytes]:
    found = []
    session = _session()
    for name in ("a", "b c"):
        session.extract(name, "the red house")
        session.track(["x", " y"])
        for file in session.save(folder / "saved").iterdir():
            shutil.copy(file, folder)
        found.append((folder / "session.json").read_bytes())
    return found


def _load_session(path: Path) -> Session:
    session = _session()
    session.load(path.parent)
    return session


def _same_session(path: Path, found: Session) -> None:
    index = json.loads(path.read_bytes())
    assert list(found.state.shelf) == [entry["name"] for entry in index["modulations"]]
    assert list(found.state.tracked) == index["tracked"]
    assert list(found.state.layers) == sorted(index["layers"])


def _journals(folder: Path) -> list[bytes]:
    log = journal.Journal(folder / "log", _session().description())
    entry = {"seed": 1, "digests": {"a": "0" * 64}, "result": {"tokens": ["é", 1.5, None]}}
    for command in ("extract a the red house", "list", 'inject a "x" -alpha 0.5'):
        log.write({"command": command, **entry})
    log.write({"command": "x", "seed": 1, "error": "Unknown command: x"})
    log.close()
    return [(folder / "log").read_bytes()]


def _journal(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a log, and compare each with the next like a replay does."""
    header, entries = journal.read(path)
    lines = [header, *entries]
    for one, other in pairwise(lines):
        journal.difference(one, other)
    return lines


def _same_journal(path: Path, found: list[dict[str, Any]]) -> None:
    *lines, _ = path.read_bytes().split(b"\n")
    for ours, other in zip(found, map(json.loads, lines), strict=True):
        same_values(ours, {key: other[key] for key in ours})


_FACTS = """facts:
  - name: Paris for Germany           # of the guide
    prompt: The capital of Germany is
    inject:
      from: The capital of France is
      sequence: false
      position: last
      mode: replace
      strength: 1.0
      when: prefill
    expect: {contains: Paris}
    must_not_change:
      - Two plus two is
      - |
        A text of
        two lines
    tokens: 10
  - {prompt: "a", inject: {from: 'b', position: 2:5}, expect: c}
relations:
  - capital
  - {name: n, prompt: "{} is", pairs: {a: b, c: "d"}, paraphrases: ["is {}"], at_least: 0.5}
controls: [x, "y z"]
"""


def _same_facts(path: Path, found: Suite) -> None:
    document = yaml.safe_load(path.read_text("utf-8"))
    for relation, other in zip(found.relations, document.get("relations", []), strict=True):
        if isinstance(other, dict):
            same_values(
                (relation.name, relation.prompt, dict(relation.pairs), list(relation.paraphrases)),
                (other["name"], other["prompt"], other["pairs"], other.get("paraphrases", [])),
            )
    for fact, other in zip(found.facts, document.get("facts", []), strict=True):
        injection, expected = other["inject"], other.get("expect") or {}
        expected = {"contains": expected} if isinstance(expected, str) else expected
        same_values(
            (fact.prompt, fact.source, fact.tokens, list(fact.must_not_change),
             fact.injection.strength),
            (
                other["prompt"], injection["from"], other.get("tokens", 10),
                other.get("must_not_change", []), injection.get("strength", 1.0),
            ),
        )  # fmt: skip
        same_values(
            (fact.contains, fact.begins, fact.injection.position),
            (
                expected.get("contains"), expected.get("begins"),
                injection.get("position", "last"),
            ),
        )  # fmt: skip


_OPTIONS = """# of a run
train_layers: [11, -13]
learning-rate: 1e-4
wandb_name: 'a: "b"'
resume_from: ~
data: |
  self:1000
fp16: no
seed: 0x10
"""


def _same_options(path: Path, found: dict[str, Setting]) -> None:
    """PyYAML's `BaseLoader` leaves values as they are written, null too."""
    document = yaml.load(path.read_text("utf-8"), Loader=yaml.BaseLoader) or {}
    nulls = {key for key, setting in found.items() if setting.value is None}
    assert {document.pop(key) for key in nulls} <= {"", "~", "null", "Null", "NULL"}
    assert document == {key: found[key].value for key in found.keys() - nulls}


SCRIPT = """# a comment
extract a "the red house"
/extract-seq b the blue boat
calc c = 2 * a - b / 3
inject a the red -pos at:red -alpha 0.5 -tokens 3

set temperature 0.7
compare a "x"
"""


def _script(path: Path) -> list[str]:
    """Read lines and parse each like the shell, without running it."""
    lines = scripts.read_script(str(path))
    for line in map(bare, lines):
        name, _, rest = line.partition(" ")
        try:
            find(name).parse(rest)
        except NPTError as error:
            check_line(str(error))
    return lines


def _same_script(path: Path, found: list[str]) -> None:
    assert "".join(found).split() == "".join(path.read_bytes().decode().splitlines()).split()


TARGETS = [
    Target("modulation", "m.safetensors", mutations.SAFETENSORS, _modulations,
           _modulation, _same_terms),
    Target("session", "session.json", mutations.JSON, _sessions, _load_session, _same_session),
    Target("journal", "log.jsonl", mutations.JSON_LINES, _journals, _journal, _same_journal),
    Target("facts", "facts.yaml", mutations.YAML, fixed(_FACTS), read_suite, _same_facts),
    Target("options", "run.yaml", mutations.YAML, fixed(_OPTIONS), settings, _same_options),
    Target("script", "script.txt", mutations.TEXT, fixed(SCRIPT), _script, _same_script),
]  # fmt: skip
