"""Singular values of factors, against torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from npt_fast.checkpoint.checkpoint import open_checkpoint
from npt_fast.checkpoint.spectra import spectra
from tests.checkpoints import layer_weights, write_checkpoint


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("modulation", ["single", "triple", "plain"])
def test_singular_values_are_those_of_torch(
    tmp_path: Path, dtype: torch.dtype, modulation: str
) -> None:
    weights = layer_weights(3, num_ranks=2, modulation=modulation, dtype=dtype)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "a", weights))
    found = spectra(checkpoint.modules[3])
    assert len(found) == len(weights) / 2
    for (projection, stem), values in found.items():
        assert values.shape == (2, 4)
        for component in range(2):
            name = f"layer_3_np.{stem}{'_' * bool(projection)}{projection}.{component}"
            expected = torch.linalg.svdvals(weights[name].double())
            assert values[component] == pytest.approx(expected.numpy(), rel=1e-9)


def test_what_has_no_spectrum_is_left_out(tmp_path: Path) -> None:
    weights = layer_weights(3, num_ranks=2, modulation="dual")
    weights["layer_3_np.W_down_up.1"][0, 0] = float("inf")
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "a", weights))
    found = spectra(checkpoint.modules[3])
    assert ("up", "W_down") not in found and len(found) == 5
