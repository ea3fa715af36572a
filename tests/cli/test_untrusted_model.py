"""No verb runs a model's code without --trust_remote_code, even if stdin says yes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

from tests import hostile_models
from tests.cli.test_check import HOLDS, facts
from tests.fork_server import Finished, ForkServer
from tests.training import tiny
from tests.training.runs import Place
from tests.transfer.known import known_relations

VERBS = (
    *("models", "trace", "evaluate", "check", "compare", "sweep", "study", "train", "sample"),
    *("plan", "interact", "replay"),
)


class Program:
    """Runs verbs, each in a process of its own.

    Attributes:
        canary: what the prepared models write when their code runs.
    """

    def __init__(
        self, folder: Path, place: Place, checkpoint: Path, fork_server: ForkServer
    ) -> None:
        self.folder = folder
        self._fork_server = fork_server
        self.canary = folder / "ran"
        self._place = place
        self.checkpoint = str(checkpoint)
        self._facts = str(facts(folder, HOLDS))

    def plant(self, name: str, spoil: Callable[[Path, Path], None]) -> str:
        base = hostile_models.plant(self.folder / name, self.canary)
        spoil(base, self.canary)
        return str(base)

    def arguments(self, verb: str, model: str) -> list[str]:
        named = ["--model_name", model]
        loaded = ["--checkpoint", self.checkpoint, *named]
        texts = ["--from", "abc", "--prompt", "dead"]
        if verb == "train":
            output = self.folder / f"{Path(model).name}-trained"
            train = self._place.arguments(output, model_name=model, max_steps=1)
            return [str(argument) for argument in train]
        if verb == "replay":
            header = {"npt_session": 1, "model_name": model, "checkpoint": self.checkpoint}
            log = self.folder / f"{Path(model).name}.jsonl"
            log.write_text(f"{json.dumps({**header, 'trust_remote_code': True})}\n")
            return ["interact", "--replay", str(log), "--device", "cpu"]
        data = ["--data", str(self._place.text), "--max_length", "24", "--num_eval_samples", "1"]
        sizes = ["--tokens", "8", "--max_length", "8"]
        return {
            "models": ["models", model],
            "trace": ["trace", "--from", "abc", "--to", "abd", *named, "--cpu"],
            "evaluate": ["evaluate", *loaded, *data, "--cpu"],
            "plan": ["plan", *loaded, *data, "--cpu"],
            "sample": ["sample", *named, "--output", str(self.folder / "s.jsonl"), *sizes, "--cpu"],
            "check": ["check", self._facts, *loaded, "--cpu"],
            "compare": ["compare", *loaded, *texts, "--tokens", "1", "--cpu"],
            "sweep": ["sweep", *loaded, *texts, "--strength", "1", "--cpu"],
            "study": ["study", *loaded, *self._study(model), "--cpu"],
            "interact": ["interact", *loaded, "--device", "cpu"],
        }[verb]

    def _study(self, model: str) -> list[str]:
        suite = self.folder / "suite.yaml"
        relations = known_relations(tiny.model(), tiny.tokenizer(), n="{}")
        suite.write_text(yaml.safe_dump({"relations": relations}))
        return ["--suite", str(suite), "--output", str(self.folder / f"{Path(model).name}-study")]

    def run(self, runs: list[list[str]], stdin: str = "y\n" * 99) -> list[Finished]:
        found = [self._fork_server.run(arguments, input=stdin) for arguments in runs]
        assert not any("Traceback" in each.err for each in found)
        return found


@pytest.fixture
def program(tmp_path: Path, place: Place, checkpoint: Path, fork_server: ForkServer) -> Program:
    return Program(tmp_path, place, checkpoint, fork_server)


def errors(err: str) -> list[str]:
    return [line for line in err.splitlines() if not line.startswith("Loading model from")]


def reads_config(name: str) -> bool:
    """Whether a hostile model's config is to blame, all that `models` reads."""
    return hostile_models.REFUSED.get(name, (None, "", ""))[1] == "config.json"


SPOILT = {name: spoil for name, (spoil, *_) in hostile_models.REFUSED.items()}
SPOILT |= hostile_models.UNREADABLE


def models_for(verb: str) -> list[str]:
    """Hostile models that a verb is tried with: `evaluate` and `models` with all that they read.

    All verbs check a base model's files by the same function, so the others are tried with the
    first model of each file that is to blame, and with the unreadable ones.
    """
    if verb == "evaluate":
        return list(SPOILT)
    if verb == "models":
        return [name for name in SPOILT if reads_config(name)]
    first = {file: name for name, (_, file, _) in reversed(hostile_models.REFUSED.items())}
    return [*first.values(), *hostile_models.UNREADABLE]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_refuses_models(program: Program, verb: str) -> None:
    for name in models_for(verb):
        model = program.plant(name, SPOILT[name])
        (found,) = program.run([program.arguments(verb, model)])
        assert (found.code, found.out) == (1, ""), (name, found.err)
        (line,) = errors(found.err)
        assert line.startswith(f"Error: {model}: "), name
        if name in hostile_models.REFUSED:
            _, file, key = hostile_models.REFUSED[name]
            assert f": {file}: {key} " in line and "--trust_remote_code" in line, name
    assert not program.canary.exists()


def test_every_verb_uses_the_class_that_transformers_has(program: Program) -> None:
    """The model's code does not run, and the lines on stdin reach the shell."""
    model = program.plant("base", lambda folder, canary: None)
    for spoil in hostile_models.HARMLESS.values():
        spoil(Path(model), program.canary)
    verbs = [verb for verb in VERBS if verb != "replay"]
    found = program.run([program.arguments(verb, model) for verb in verbs], "y\n" + "status\n" * 9)
    for verb, each in zip(verbs, found, strict=True):
        if verb == "interact":
            assert (each.code, each.out) == (1, "")
            assert errors(each.err)[0].startswith("Error: line 1: Unknown command: y")
        else:
            assert each.code == 0 and each.out, (verb, each.err)
    assert not program.canary.exists()


def test_an_export_runs_nothing_and_takes_no_code(program: Program) -> None:
    """It reads no code, so it has no flag; what it does not refuse, it copies without the code."""
    for name, (spoil, file, _) in hostile_models.REFUSED.items():
        model = program.plant(name, spoil)
        out = program.folder / f"{name}-exported"
        arguments = ["--checkpoint", program.checkpoint, "--model_name", model, "--output", out]
        (found,) = program.run([["export", *map(str, arguments)]])
        assert (found.code == 0) == (file == "tokenizer_config.json"), (name, found.err)
        assert out.exists() == (found.code == 0)
        assert not list(out.glob("**/*.py"))
    assert not program.canary.exists()


def test_every_verb_has_the_flag(program: Program) -> None:
    """The planted code works: the first test can fail."""
    spoil = hostile_models.REFUSED["config"][0]
    runs = []
    for verb in VERBS:
        program.canary = program.folder / f"ran-{verb}"
        model = program.plant(f"base-{verb}", spoil)
        named = ["--model_name", model] if verb == "replay" else []  # a log does not choose it
        runs.append([*program.arguments(verb, model), *named, "--trust_remote_code"])
    found = program.run(runs)
    for verb, each in zip(VERBS, found, strict=True):
        assert each.code == 1 and "has no attribute 'Own'" in errors(each.err)[0], verb
        assert (program.folder / f"ran-{verb}").exists(), verb


OWN = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "ours"
class Own(LlamaForCausalLM):
    config_class = OwnConfig
"""


def own_model(program: Program) -> str:
    """A model with code that works."""
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    model = program.plant(
        "base",
        lambda folder, _: hostile_models.change(
            folder, "config.json", model_type="ours", auto_map=auto_map
        ),
    )
    (Path(model) / "own.py").write_text(OWN)
    (Path(model) / "custom_generate" / "generate.py").unlink()
    return model


def test_no_file_remembers_the_flag(program: Program) -> None:
    """Resuming a trusted run does not trust its model again."""
    train = program.arguments("train", own_model(program))
    output = Path(train[train.index("--output_dir") + 1])
    more = [*train, "--resume_from", str(output / "checkpoints" / "checkpoint-1")]
    more[more.index("--max_steps") + 1] = "2"
    first, second, third = program.run(
        [[*train, "--trust_remote_code"], more, [*more, "--trust_remote_code"]]
    )
    assert first.code == 0, first
    assert second.code == 1 and errors(second.err)[-1].endswith("run it with all your rights")
    assert third.code == 0, third
    for file in output.rglob("*"):
        assert not file.is_file() or b"trust_remote" not in file.read_bytes(), file


@pytest.mark.slow
def test_all_processes_of_a_training_get_the_flag(program: Program) -> None:
    train = program.arguments("train", own_model(program))
    train += ["--parallel", "layers", "--num_processes", "2"]
    (found,) = program.run([[*train, "--trust_remote_code"]])
    assert found.code == 0, found.err
