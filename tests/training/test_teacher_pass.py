"""The teacher's cache and check; `test_distillation.py` tests the pass itself."""

from __future__ import annotations

from itertools import count

import pytest
import torch
from torch import Tensor

import npt_fast as npt
from npt_fast.training.teacher_pass import Activations, TeacherCache, check_teacher
from tests.hf.test_probe import FAULTS, faulty
from tests.training import tiny

TEXT = torch.arange(40).view(2, 20)


def test_every_window_is_computed_by_itself() -> None:
    """A window's last bits may depend on its batch, which is another one after a restart."""
    calls: list[tuple[list[list[int]], list[list[int]] | None]] = []

    def compute(ids: Tensor, mask: Tensor | None) -> dict[int, Activations]:
        calls.append((ids.tolist(), None if mask is None else mask.tolist()))
        rows = ids[..., None].double()
        return {5: Activations(rows, 2 * rows, 3 * rows)}

    cache = TeacherCache(10**6)
    ids, mask = torch.tensor([[1, 2], [3, 0], [5, 6]]), torch.tensor([[1, 1], [1, 0], [1, 1]])
    found = cache.get(torch.tensor([8, 9, 7]), ids, mask, compute)
    assert calls == [([[1, 2]], [[1, 1]]), ([[3, 0]], [[1, 0]]), ([[5, 6]], [[1, 1]])]
    assert torch.equal(found[5].attention, 2 * ids[..., None].double())
    found = cache.get(torch.tensor([7, 4, 8]), ids[[2, 1, 0]], None, compute)
    assert calls[3:] == [([[3, 0]], None)]
    assert torch.equal(found[5].mlp, 3 * ids[[2, 1, 0]][..., None].double())


def test_the_cache_keeps_to_its_limit() -> None:
    """Two windows fit and stay; the others are computed each time."""
    runs = count()
    tensors = Activations(*(torch.ones(1, 2, 3) for _ in range(3)))  # 72 bytes

    def compute(ids: Tensor, mask: Tensor | None) -> dict[int, Activations]:
        next(runs)
        return {5: Activations(*(t * ids for t in tensors))}

    cache = TeacherCache(2 * 72 + 71)
    for epoch in range(2):
        for window in range(4):
            found = cache.get(torch.tensor([window]), torch.full((1, 1), window), None, compute)
            assert all(torch.equal(t, torch.full((1, 2, 3), float(window))) for t in found[5])
            assert cache.size <= cache.limit
        assert (cache.hits, cache.misses) == ((0, 4), (2, 6))[epoch]
    assert cache.size == 144 and next(runs) == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_base_layer_is_its_input_attention_and_mlp(dtype: torch.dtype) -> None:
    model = npt.convert(tiny.model().to(dtype), npt.NPTConfig(layers=[1, 2], rank=2))
    assert list(check_teacher(model, TEXT)) == [1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_base_layer_that_does_more_is_not_trained(dtype: torch.dtype) -> None:
    """Whoever converts a layer of another kind without the probe is told on the first text."""
    model = faulty(FAULTS["attention scaled"][0], dtype)
    npt.convert(model, npt.NPTConfig(layers=[1], rank=2), probe=False)
    with pytest.raises(npt.ModelError, match=r"layer 1: on this text .* input \+ attention \+ MLP"):
        check_teacher(model, TEXT)
