"""Fake tensors and half-compiled kernels for GPUs that exist only as stub drivers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from triton.backends.nvidia.compiler import CUDABackend

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


def compile_without_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Triton's compiler end after its first stage, which checks types.

    The others take 95 % of the time, and no stub runs the code that they make.
    """
    add_stages = CUDABackend.add_stages

    def first_stage(backend: CUDABackend, stages: dict[str, Any], *options: Any) -> None:
        add_stages(backend, stages, *options)
        first = stages["ttir"]
        stages.clear()
        stages.update(ttir=first, cubin=no_code)

    def no_code(_: Any, metadata: dict[str, Any]) -> bytes:
        metadata.update(name="", shared=0)
        return b""

    monkeypatch.setattr(CUDABackend, "add_stages", first_stage)
