"""Processes of `multiprocessing` that share their imports, which are most of what a short one does.

They are forks of a server, of which a process has one only, and which must know what to import
before it forks for the first time; so all tests ask for the same.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import BaseContext

IMPORTED = [
    "npt_fast.benchmarks.gpu_parts",
    "npt_fast.training.run",
    "tests.kernels.test_parallel",
    "tests.kernels.test_sharded_change",
    "tests.vllm.test_layer",
]


def forkserver() -> BaseContext:
    """What starts such processes; ``start_method="forkserver"`` of torch does, after this call."""
    multiprocessing.set_forkserver_preload(IMPORTED)
    return multiprocessing.get_context("forkserver")
