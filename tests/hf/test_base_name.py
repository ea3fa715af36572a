"""The base model that is loaded if nobody names one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import npt_fast as npt
from npt_fast.checkpoint.checkpoint import open_checkpoint
from npt_fast.config import DEFAULT_MODEL
from npt_fast.hf.base_name import base_name
from tests.checkpoints import layer_weights, run, write_checkpoint
from tests.training import runs, tiny
from tests.training.runs import Place


def recording(folder: Path, name: str | None) -> Path:
    return write_checkpoint(folder, layer_weights(1), config=name and {"model_name": name})


def chosen(*paths: Path, given: str | None = None, code: bool = False) -> tuple[str, list[str]]:
    """The name, and what was said."""
    lines: list[str] = []
    opened = [open_checkpoint(path) for path in paths]
    return base_name(given, opened, lines.append, trust_remote_code=code), lines


def test_what_is_given_is_taken_without_a_word(tmp_path: Path) -> None:
    one = recording(tmp_path / "one", "org/one")
    assert chosen(one, given="org/two", code=True) == ("org/two", [])


def test_checkpoints_record_it(tmp_path: Path) -> None:
    one, same = (recording(tmp_path / name, "org/one") for name in ("one", "same"))
    silent = recording(tmp_path / "silent", None)
    name, lines = chosen(silent, one, same)
    assert name == "org/one"
    assert lines == [f"Note: the base model is org/one, which {one} records"]


def test_npt_config_records_it(tmp_path: Path) -> None:
    one = recording(tmp_path / "one", None)
    content = {"format_version": 1, "base_model": {"name": "org/one"}}
    (one / "npt_config.json").write_text(json.dumps(content))
    assert chosen(one)[0] == "org/one"


def test_without_a_checkpoint_it_is_the_default() -> None:
    name, (line,) = chosen()
    assert name == DEFAULT_MODEL and DEFAULT_MODEL in line and "--model_name" in line


def test_it_is_not_guessed(tmp_path: Path) -> None:
    one, two = (recording(tmp_path / name, f"org/{name}") for name in ("one", "two"))
    silent = recording(tmp_path / "silent", None)
    for paths, problem in (
        ([one, two], f"{one} records org/one and {two} records org/two; give it (--model_name)"),
        ([silent], f"{silent}: does not record its base model; give it (--model_name)"),
    ):
        with pytest.raises(npt.ModelError) as error:
            chosen(*paths)
        assert str(error.value).endswith(problem) and "\n" not in str(error.value)


def test_a_file_does_not_choose_whose_code_runs(tmp_path: Path) -> None:
    one = recording(tmp_path / "one", "org/one")
    with pytest.raises(npt.ModelError, match="to run its code, repeat the name"):
        chosen(one, code=True)
    assert chosen(code=True)[0] == DEFAULT_MODEL


@pytest.fixture(scope="module")
def trained(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return place.train(tmp_path_factory.mktemp("trained") / "run", max_steps=1)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with runs.place(tmp_path_factory.mktemp("place")) as found:
        yield found


def evaluated(capsys: Any, place: Place, *more: object) -> tuple[int, str, str]:
    return run(
        capsys, "evaluate", "--data", place.text, "--max_length", runs.LENGTH,
        "--num_eval_samples", 2, "--cpu", "--json", *more,
    )  # fmt: skip


def test_an_exported_folder_names_its_own(
    place: Place, trained: Path, capsys: Any, tmp_path: Path
) -> None:
    """The folder itself if it holds the base model, and otherwise the folder that it names."""
    code, out, err = evaluated(capsys, place, trained)
    assert (code, err) == (0, f"Note: the base model is {place.base}, which {trained} records\n")
    expected = json.loads(out)["results"][0]
    moved = Path(shutil.copytree(place.base, tmp_path / "moved"))
    for name, reference in (("whole", False), ("reference", True)):
        folder = tmp_path / name
        npt.export(trained, folder, model_name=str(moved), reference=reference)
        base = moved if reference else folder
        code, out, err = evaluated(capsys, place, folder)
        assert (code, err) == (0, f"Note: the base model is {base}, which {folder} records\n")
        assert json.loads(out)["results"][0]["kl"] == expected["kl"]


def test_a_resumed_run_and_an_export_go_by_the_checkpoint(
    place: Place, trained: Path, capsys: Any, tmp_path: Path
) -> None:
    note = f"Note: the base model is {place.base}, which {trained} records\n"
    arguments = place.arguments(tmp_path / "more", resume_from=trained, max_steps=2)
    where = arguments.index("--model_name")
    del arguments[where : where + 2]
    code, _, err = run(capsys, *arguments)
    assert code == 0 and err.count(note) == 1
    config = json.loads((tmp_path / "more" / "config.json").read_text())
    assert config["model_name"] == str(place.base)
    code, _, err = run(capsys, "export", trained, "--output", tmp_path / "out")
    assert code == 0 and note in err


def test_two_checkpoints_of_other_models_are_refused(
    place: Place, trained: Path, capsys: Any, tmp_path: Path
) -> None:
    other = tiny.save(tmp_path / "other", initializer_range=0.2)
    second = place.train(tmp_path / "run", model_name=str(other), max_steps=1)
    code, out, err = evaluated(capsys, place, trained, second)
    assert (code, out) == (1, "") and err.count("\n") == 1
    assert f"{trained} records {place.base} and {second} records {other}" in err
    code, *_ = evaluated(capsys, place, trained, second, "--model_name", place.base)
    assert code == 0
