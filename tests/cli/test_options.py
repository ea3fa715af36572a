"""One policy for the options of all verbs: spelling, checkpoints, help, and what every verb has."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from cyclopts.argument import Argument
from rich.console import Console

from npt_fast.cli.main import app
from npt_fast.cli.train import TrainArguments
from tests.checkpoints import run
from tests.training.runs import Place

ROOT = Path(__file__).parent.parent.parent
VERBS = [name for name in app if not name.startswith("-")]
COMMON = ["--config", "--quiet", "-q"]
RUN_A_MODEL = (
    *("train", "sample", "evaluate", "plan", "trace", "compare", "sweep", "study", "check"),
    "interact",
)


def options(verb: str) -> list[Argument]:
    """The options and arguments of a verb, those of ``npt-fast kernels roofline`` apart."""
    with app.app_stack([app, app[verb]]):
        found = app[verb].assemble_argument_collection(parse_docstring=True)
    return [one for one in found if not one.children and one.show]


def table() -> str:
    verbs_of: dict[str, list[str]] = {}
    for verb in VERBS:
        for option in options(verb):
            names = [name for name in option.names if name.startswith("--")]
            if names:
                verbs_of.setdefault(", ".join(sorted(names)), []).append(verb)
    rows = [f"| `{names}` | {', '.join(verbs)} |" for names, verbs in sorted(verbs_of.items())]
    return "\n".join(["| option | verbs |", "| --- | --- |", *rows]) + "\n"


def test_the_documentation_has_the_table() -> None:
    assert table() in (ROOT / "docs" / "options.md").read_text()


@pytest.mark.parametrize("verb", VERBS)
def test_options_are_spelled_as_in_the_guides_and_described(verb: str) -> None:
    for option in options(verb):
        for name in option.names:
            assert re.fullmatch(r"--[a-z0-9_]+|[A-Z]+", name), name
        assert option.parameter.help, option.name
        text = " ".join(option.parameter.help.split())
        assert re.match(r"[A-Z0-9]", text) and text.endswith("."), text


@pytest.mark.parametrize("verb", RUN_A_MODEL)
def test_a_verb_that_runs_a_model_takes_a_device(verb: str) -> None:
    names = {name for option in options(verb) for name in option.names}
    assert {"--device", "--cpu", "--model_name", "--base_dtype"} <= names


def test_each_option_of_train_has_a_part_of_the_help() -> None:
    groups: dict[str, list[str]] = {}
    for option in options("train"):
        (group,) = option.parameter.group  # type: ignore[misc]
        groups.setdefault(group.name, []).append(option.field_info.name)
    assert list(groups) != [] and "Parameters" not in groups
    assert {name for names in groups.values() for name in names} == {
        *TrainArguments.__dataclass_fields__, "device", "json", "push_to_hub",
    }  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("width", ["60", "80", "200"])
def test_help_fits_the_terminal(
    verb: str, width: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "console", Console(width=int(width)))  # else it is made only once
    code, out, err = run(capsys, verb, "--help")
    assert (code, err) == (0, "")
    assert all(len(line) <= int(width) for line in out.splitlines())
    assert "Usage: npt-fast " + verb in out
    for name in COMMON if verb != "serve" else ():
        assert name in out


CHECKPOINTS = {
    "analyze": ["analyze", "--json"],
    "merge": ["merge", "--dry_run", "--json", "--output", "out"],
    "verify": ["verify", "--json"],
}


@pytest.mark.parametrize("verb", CHECKPOINTS)
def test_checkpoints_are_given_alike(
    verb: str, capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layer11: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    merged = tmp_path / "merged"
    run(capsys, "merge", layer11, "--output", merged, "--verify")
    found = [
        run(capsys, *CHECKPOINTS[verb], *given, merged)
        for given in ([], ["--checkpoint"], ["--checkpoints"])
    ]
    assert [code for code, *_ in found] == [0] * 3
    assert len({re.sub(r'"(seconds|free_bytes)": .*', "", out) for _, out, _ in found}) == 1


def test_both_spellings_are_taken(capsys: Any, tmp_path: Path, layer11: Path) -> None:
    for spelling in ("--dry_run", "--dry-run"):
        code, out, _ = run(capsys, "merge", layer11, "--output", tmp_path / "out", spelling)
        assert code == 0 and "Nothing was written." in out


def test_quiet_leaves_results_and_errors(capsys: Any, tmp_path: Path, layer11: Path) -> None:
    loud = run(capsys, "merge", layer11, "--output", tmp_path / "a")
    for word in ("-q", "--quiet"):
        code, out, err = run(capsys, "analyze", tmp_path / "nowhere", word)
        assert (code, out, err) == (1, "", f"Error: Checkpoint not found: {tmp_path / 'nowhere'}\n")
    code, out, err = run(capsys, "merge", layer11, "--output", tmp_path / "b", "-q")
    assert (code, err) == (0, "")
    assert len(out.splitlines()) == len(loud[1].splitlines())


def test_devices_that_there_are_not(
    capsys: Any, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    sample = ["sample", "--model_name", place.base, "--tokens", 8, "--output", tmp_path / "a.jsonl"]
    train = [word for word in place.arguments(tmp_path / "out") if word != "--cpu"]
    for arguments, expected, problem in (
        ([*sample, "--device", "nowhere"], 1, "cannot be put on 'nowhere'"),
        ([*sample, "--device", "cuda", "--cpu"], 2, "--cpu and --device cuda exclude each other"),
        ([*train, "--device", "cuda"], 1, "torch sees no GPU"),
        ([*train, "--device", "cuda", "--cpu"], 1, "--cpu and --device cuda exclude each other"),
        ([*train, "--device", "cuda:1"], 2, "cuda:1"),
    ):
        code, out, err = run(capsys, *arguments)
        assert (code, out) == (expected, "")
        assert err.startswith("Error: ") and err.count("\n") == 1 and problem in err
    assert list(tmp_path.iterdir()) == []


def test_a_device_that_there_is(capsys: Any, place: Place, tmp_path: Path) -> None:
    train = [word for word in place.arguments(tmp_path / "out", max_steps=1) if word != "--cpu"]
    code, *_ = run(capsys, *train, "--device", "cpu")
    assert code == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["cpu"] is True


def test_completion_is_installed(
    capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("cyclopts.completion.detect.detect_shell", lambda: "bash")
    code, out, err = run(capsys, "--install-completion")
    assert (code, err) == (0, "")
    script = Path(out.removeprefix("Written to ").partition(";")[0])
    assert script.is_relative_to(tmp_path)
    assert {"merge", "interact", "--max_steps", "--on_conflict"} <= set(
        re.findall(r"[\w-]+", script.read_text())
    )
    script.unlink()
    script.mkdir()
    code, out, err = run(capsys, "--install-completion")
    assert (code, out) == (1, "")
    assert err.startswith("Error: completion cannot be installed: ") and err.count("\n") == 1
