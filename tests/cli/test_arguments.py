"""Text that is not a path is wrong usage, in every verb and before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import run

TEXTS = ["--from", "a", "--prompt", "b"]
USES = {
    "merge-checkpoints": ["merge", "--output", "o", "--checkpoints", "a"],
    "merge-output": ["merge", "--force", "--checkpoints", "a", "--output"],
    "merge-curriculum": [
        "merge",
        "--checkpoints",
        "a",
        "--output",
        "o",
        "--copy-multi-layer-state",
    ],
    "analyze": ["analyze", "--checkpoint", "a"],
    "analyze-plot": ["analyze", "--checkpoint", "a", "--plot"],
    "merge-plot": ["merge", "--checkpoints", "a", "--output", "o", "--plot"],
    "plot": ["plot", "a"],
    "plot-output": ["plot", "a", "--output"],
    "verify": ["verify"],
    "export": ["export", "--output", "o", "--checkpoint"],
    "export-output": ["export", "--checkpoint", "a", "--output"],
    "export-model": ["export", "--checkpoint", "a", "--output", "o", "--model_name"],
    "push": ["push", "--repo", "org/a", "--checkpoint"],
    "train-output": ["train", "--train_layers", "1", "--output_dir"],
    "train-resume": ["train", "--train_layers", "1", "--resume_from"],
    "train-model": ["train", "--train_layers", "1", "--model_name"],
    "train-data": ["train", "--train_layers", "1", "--data"],
    "train-eval-data": ["train", "--train_layers", "1", "--eval_data"],
    "sample-output": ["sample", "--output"],
    "sample-model": ["sample", "--output", "o.jsonl", "--model_name"],
    "evaluate": ["evaluate", "--checkpoint", "a"],
    "evaluate-model": ["evaluate", "--checkpoint", "a", "--model_name"],
    "evaluate-data": ["evaluate", "--checkpoint", "a", "--data"],
    "plan": ["plan", "--checkpoint"],
    "plan-data": ["plan", "--checkpoint", "a", "--data"],
    "plan-output": ["plan", "--checkpoint", "a", "--output"],
    "models": ["models"],
    "trace-plot": ["trace", "--from", "a", "--to", "b", "--plot"],
    "compare": ["compare", *TEXTS, "--checkpoint"],
    "compare-html": ["compare", *TEXTS, "--checkpoint", "a", "--html"],
    "sweep": ["sweep", *TEXTS, "--checkpoint"],
    "sweep-html": ["sweep", *TEXTS, "--checkpoint", "a", "--html"],
    "check-facts": ["check", "--checkpoint", "a"],
    "check": ["check", "facts.yaml", "--checkpoint"],
    "check-junit": ["check", "facts.yaml", "--checkpoint", "a", "--junit"],
    "study": ["study", "--output", "o", "--checkpoint"],
    "study-output": ["study", "--checkpoint", "a", "--output"],
    "study-suite": ["study", "--checkpoint", "a", "--output", "o", "--suite"],
    "interact": ["interact", "--checkpoint"],
    "interact-script": ["interact", "--checkpoint", "a", "--script"],
    "interact-log": ["interact", "--checkpoint", "a", "--log"],
    "interact-replay": ["interact", "--replay"],
    "bench-plot": ["bench", "--plot"],
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
    ("given", "problem"), [("", "empty"), ("  ", "empty"), ("~nosuchuser/a", "~nosuchuser has no")]
)
def test_what_is_no_path(
    use: str, given: str, problem: str, capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "keep").touch()
    code, out, err = run(capsys, *USES[use], given)
    assert (code, out) == (2, "")
    assert err.startswith("Error: ") and err.count("\n") == 1
    assert problem in err
    assert [path.name for path in tmp_path.iterdir()] == ["keep"]
