"""Fake tensors on GPUs that do not exist, for calls that a stub driver launches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from npt_fast.benchmarks.stub_driver import StubDriver


def use_fake_gpus(stub: StubDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake GPU tensors have addresses, and the stub knows the current device."""

    @contextmanager
    def guard(device: torch.device) -> Iterator[None]:
        before, stub.device = stub.device, str(device)
        yield
        stub.device = before

    monkeypatch.setattr(torch.cuda, "device", guard)
    monkeypatch.setattr(FakeTensor, "data_ptr", lambda tensor: 4096, raising=False)
