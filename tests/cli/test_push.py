"""``npt-fast push`` and ``--push_to_hub``: what they print, and that options arrive."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import run, trained_checkpoint
from tests.hub import TOKEN, Hub
from tests.training.runs import Place


@pytest.fixture
def logged_in(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


def test_what_a_push_says(capsys: Any, tmp_path: Path, logged_in: Hub) -> None:
    folder = trained_checkpoint(tmp_path / "a", 5)
    code, out, err = run(capsys, "push", folder, "me/np")
    repo = logged_in.repos["me/np"]
    commit = repo.refs["main"]
    assert (code, err) == (0, "")
    first, last = out.splitlines()
    assert first.startswith("Pushed 4 files, ")
    assert first.endswith(f": {logged_in.endpoint}/me/np/commit/{commit}")
    assert last == f"Load it with: hf://me/np@{commit}"
    code, out, _ = run(
        capsys, "merge", folder, "--output", tmp_path / "b", "--format", "safetensors"
    )
    code, out, err = run(capsys, "push", tmp_path / "b", "me/np", "--json")
    assert (code, err) == (0, "") and json.loads(out)["removed"] == ["npt_weights.pt"]
    code, out, err = run(
        capsys, "push", "--checkpoint", tmp_path / "b", "--repo", "me/other",
        "--private", "--revision", "v1", "--message", "One",
    )  # fmt: skip
    assert (code, err) == (0, "") and logged_in.repos["me/other"].private
    assert set(logged_in.repos["me/other"].refs) == {"main", "v1"}


def test_what_is_written_is_pushed(capsys: Any, tmp_path: Path, logged_in: Hub) -> None:
    folder = trained_checkpoint(tmp_path / "a", 5)
    code, out, err = run(
        capsys, "merge", folder, "--output", tmp_path / "b", "--push_to_hub", "me/np", "--json"
    )
    commit = logged_in.repos["me/np"].refs["main"]
    assert (code, err) == (0, f"Pushed to the Hub: hf://me/np@{commit}\n")
    assert json.loads(out)["output"] == str(tmp_path / "b")
    code, out, err = run(capsys, "merge", "me/np", "--output", tmp_path / "c")
    assert (code, err) == (0, "") and f"Layer 5: hf://me/np@{commit}" in out


def test_what_was_written_is_reported_if_the_hub_fails(
    capsys: Any, tmp_path: Path, logged_in: Hub
) -> None:
    folder, output = trained_checkpoint(tmp_path / "a", 5), tmp_path / "it's"
    logged_in.down = 403
    code, out, err = run(capsys, "merge", folder, "--output", output, "--push_to_hub", "me/np")
    assert code == 1 and f"Output saved to: {output}\n" in out and output.exists()
    assert err.startswith("Error: hf://me/np: the Hub answers 403") and err.count("\n") == 1
    again = err.partition("push it later: npt-fast ")[2]
    logged_in.down = 0
    code, _, err = run(capsys, *shlex.split(again))
    assert (code, err) == (0, "") and "npt_weights.pt" in logged_in.repos["me/np"].files


def test_a_run_and_an_export_are_pushed(
    capsys: Any, tmp_path: Path, place: Place, logged_in: Hub
) -> None:
    arguments = place.arguments(tmp_path / "run", max_steps=2, train_layers="1")
    code, _, err = run(capsys, *arguments, "--push_to_hub", "me/run")
    assert code == 0 and "Pushed to the Hub: hf://me/run@" in err
    assert "training_state.pt" in logged_in.repos["me/run"].files
    code, _, err = run(
        capsys, "export", "me/run", "--output", tmp_path / "out", "--push_to_hub", "me/served"
    )
    assert code == 0 and "Pushed to the Hub: hf://me/served@" in err
    assert "model.safetensors" in logged_in.repos["me/served"].files
    code, out, err = run(
        capsys, "evaluate", "me/run", "me/served", "--data", place.text, "--max_length", "24",
        "--num_eval_samples", "2", "--cpu", "--json",
    )  # fmt: skip
    assert code == 0, err
    first, second = json.loads(out)["results"]
    assert first["layers"] == second["layers"] == [1] and first["kl"] == second["kl"]
    more = place.arguments(tmp_path / "more", max_steps=4, train_layers="1", resume_from="me/run")
    code, out, err = run(capsys, *more)
    assert code == 0 and out.endswith("checkpoint-4\n"), err


def test_mistakes_are_known_before_the_work(
    capsys: Any, tmp_path: Path, hub: Hub, place: Place
) -> None:
    folder, out = trained_checkpoint(tmp_path / "a", 5), tmp_path / "out"
    merge = ["merge", folder, "--output", out, "--push_to_hub"]
    export = ["export", folder, "--output", out, "--push_to_hub"]
    train = [*place.arguments(out), "--push_to_hub"]
    for verb in (merge, export, train):
        for repo, expected, problem in (
            ("np", 2, "'np' is not the name of a repository, ORG/REPO"),
            ("me/np", 1, "hf://me/np: log in (hf auth login, or HF_TOKEN) to push"),
        ):
            code, printed, err = run(capsys, *verb, repo)
            assert (code, printed) == (expected, "")
            assert err.startswith("Error: ") and err.count("\n") == 1 and problem in err
            assert not out.exists() and not hub.repos
    code, _, err = run(capsys, *merge, "me/np", "--dry_run")
    assert code == 1 and "leave out one of them" in err
