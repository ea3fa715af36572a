"""Several processes for one training: all on the same layers, or each on its own."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import multiprocessing

from npt_fast.checkpoint.merge import merge
from npt_fast.config import TrainOptions
from npt_fast.errors import NPTError, TrainingError

if TYPE_CHECKING:
    from npt_fast.training.train import TrainReport

_GRACE = 60.0  # seconds in which processes may save after one of them failed


def launch(options: TrainOptions) -> TrainReport:
    """Train in ``options.num_processes`` processes, one per GPU.

    Raises:
        NPTError: what went wrong in the first process that failed.
    """
    if options.parallel == "layers":
        return _layer_parallel(options)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environment = [
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(options.num_processes),
            "LOCAL_WORLD_SIZE": str(options.num_processes),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
        }
        for rank in range(options.num_processes)
    ]
    return _run([options] * options.num_processes, environment)[0]


def _layer_parallel(options: TrainOptions) -> TrainReport:
    """Every process trains its own layers, without a word to the others; then they are merged."""
    from npt_fast.training.run_directory import FINAL, RunDirectory
    from npt_fast.training.train import output_directory

    begun = time.monotonic()
    output = output_directory(options)
    count = min(options.num_processes, len(options.layers))
    shares = [options.layers[n::count] for n in range(count)]
    own = [
        dataclasses.replace(
            options,
            train_layers=share,
            num_processes=1,
            output_dir=output / f"layers_{'-'.join(str(layer) for layer in share)}",
            wandb_name=f"{output.name}_layers_{'-'.join(str(layer) for layer in share)}",
        )
        for share in shares
    ]
    if options.layer_weights not in ("uniform", "linear"):
        raise TrainingError("layer_weights mean nothing where every layer is trained by itself")
    run = RunDirectory(output, resuming=options.resume_from is not None)
    try:
        environment = [{"CUDA_VISIBLE_DEVICES": device} for device in _devices(count)]
        reports = _run(own, environment)
        last = min(reports, key=lambda report: report.global_step)
        target = run.checkpoint(last.global_step)
        if not any(report.stopped_by for report in reports):
            merge([report.checkpoint for report in reports], target, verify=True, force=True)
            run.link(last.global_step, FINAL)
        return dataclasses.replace(
            last,
            output=output,
            checkpoint=target,
            layers=tuple(sorted(layer for report in reports for layer in report.layers)),
            seconds=time.monotonic() - begun,
            evaluation=None,
        )
    finally:
        run.close()


def _devices(count: int) -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(n) for n in range(torch.cuda.device_count())]
    return [names[n % len(names)] if names else "" for n in range(count)]


def _run(tasks: list[TrainOptions], environment: list[dict[str, str]]) -> list[TrainReport]:
    """One process per task; the reports in order. A signal to this process goes to all of them."""
    results = multiprocessing.get_context("spawn").SimpleQueue()
    threads = max(1, (os.cpu_count() or 1) // len(tasks))
    context: Any = multiprocessing.spawn(  # type: ignore[no-untyped-call, attr-defined]
        _work, (tasks, environment, threads, results), nprocs=len(tasks), join=False
    )

    def forward(number: int, frame: Any) -> None:
        for process in context.processes:
            if process.is_alive():
                os.kill(process.pid, number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    failure: Exception | None = None
    try:
        while not context.join(grace_period=_GRACE):
            pass
    except Exception as error:  # how a process ended; why it did is in the queue
        failure = error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    found: dict[int, Any] = {}
    while not results.empty():
        index, result = results.get()
        if isinstance(result, NPTError):
            raise result
        found[index] = result
    if failure is not None or len(found) < len(tasks):
        raise TrainingError(f"a training process ended unexpectedly: {failure}")
    return [found[index] for index in range(len(tasks))]


def _work(
    index: int,
    tasks: list[TrainOptions],
    environment: list[dict[str, str]],
    threads: int,
    results: Any,
) -> None:
    os.environ.update(environment[index])
    os.environ["OMP_NUM_THREADS"] = str(threads)  # accelerate sets torch's threads by it
    torch.set_num_threads(threads)
    from npt_fast.training.train import train_here

    try:
        results.put((index, train_here(tasks[index])))
    except NPTError as error:
        results.put((index, error))
        raise SystemExit(error.exit_code) from None
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
