"""Values in the lines of metrics."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training import runs
from tests.training.runs import Place


def test_metrics(place: Place, tmp_path: Path) -> None:
    """Names as in design.md#metrics; each value is a mean over all tokens since the last line."""
    settings = {
        "curriculum_stages": "teacher:2,student:10",
        "fidelity_weight": 0.5,
        "lambda_reg": 0.1,
        "layer_weights": "2,1",
        "loss": "mse",  # it has no bounds and no virtual tokens, so the total is a sum of metrics
        "max_steps": 4,
        "eval_steps": 4,
    }
    place.train(tmp_path / "out", logging_steps=1, **settings)
    place.train(tmp_path / "rarely", logging_steps=2, **settings)
    lines = runs.log(tmp_path / "out")
    steps = [line for line in lines if "loss/total" in line]
    layered = {
        f"{name}/layer_{layer}"
        for layer in (1, 2)
        for name in (
            "mlp_direct_loss", "regularization", "v_a_attention_similarity", "v_a_norm", "v_b_norm"
        )
    }  # fmt: skip
    assert [set(line) - layered for line in steps] == [
        {
            "step", "loss/total", "loss/fidelity", "curriculum/stage", "curriculum/stage_index",
            "curriculum/mixing_ratio", "training/learning_rate", "training/grad_norm",
            "training/tokens_per_second",
        }
    ] * 4  # fmt: skip
    assert all(layered < set(line) for line in steps)
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert [line["curriculum/stage_index"] for line in steps] == [0, 0, 1, 1]
    assert [line["curriculum/mixing_ratio"] for line in steps] == [0, 0, 1, 1]
    for line in steps:
        total = sum(
            weight
            * (10 * line[f"mlp_direct_loss/layer_{n}"] + 0.1 * line[f"regularization/layer_{n}"])
            for n, weight in ((1, 2), (2, 1))
        )
        assert line["loss/total"] == pytest.approx(total + 0.5 * line["loss/fidelity"])
    (change,) = (line for line in lines if "curriculum/stage_transition" in line)
    assert change == {
        "step": 2,
        "curriculum/stage_transition": 1.0,
        "curriculum/attention_mixing_ratio": 1.0,
        "curriculum/mlp_mixing_ratio": 1.0,
    }
    (measured,) = (line for line in lines if "eval_loss/total" in line)
    assert {"eval_mlp_direct_loss/layer_1", "eval_mlp_direct_loss/layer_2"} < set(measured)
    rarely = {line["step"]: line for line in runs.log(tmp_path / "rarely") if "loss/total" in line}
    mean = (steps[2]["loss/fidelity"] + steps[3]["loss/fidelity"]) / 2
    assert rarely[4]["loss/fidelity"] == pytest.approx(mean)
    assert rarely[4]["v_a_norm/layer_1"] == steps[3]["v_a_norm/layer_1"]  # measured only then
