"""Train in several processes: all on the same layers, or each on its own layers."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import time
from collections.abc import Sequence
from multiprocessing import connection
from typing import TYPE_CHECKING, Any

import torch
from torch import multiprocessing
from torch.multiprocessing.spawn import ProcessException, ProcessRaisedException

from npt_fast.checkpoint.merge import merge
from npt_fast.checkpoint.publish import disk_errors
from npt_fast.checkpoint.training_run import FINAL
from npt_fast.config import TrainOptions
from npt_fast.errors import NPTError, TrainingError
from npt_fast.layer_names import is_name
from npt_fast.paths import user_path
from npt_fast.training.run_directory import RunDirectory, checkpoints

# A spawned process imports this file before it knows its GPU. Whatever may start CUDA, which reads
# CUDA_VISIBLE_DEVICES once, is imported after that: in `_train_one`.
if TYPE_CHECKING:
    from npt_fast.training.run import TrainReport

_GRACE = 60.0  # seconds that processes have to save after one of them failed


def launch(options: TrainOptions) -> TrainReport:
    """Train in ``options.num_processes`` processes, one per GPU.

    Raises:
        NPTError: the error of the first process that failed.
    """
    if options.parallel == "layers":
        return _layer_parallel(options)
    count = 0 if options.cpu else torch.cuda.device_count()
    if 0 < count < options.num_processes:
        raise TrainingError(f"num_processes {options.num_processes}: only {count} GPUs are visible")
    with socket.socket() as probe:
        # 0: the system gives a free port
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
    return _run_processes([options] * options.num_processes, environment)[0]


def _layer_parallel(options: TrainOptions) -> TrainReport:
    """Each process trains its own layers independently; then their checkpoints are merged.

    A stopped run leaves each process at its own step. Resumed from the run's folder, each process
    continues from its own last checkpoint.
    """
    from npt_fast.training.run import TrainReport, output_directory, write_configuration

    begun = time.monotonic()
    if options.layer_weights not in ("uniform", "linear"):
        raise TrainingError(
            "layer_weights have no effect where each layer is trained independently; leave them out"
        )
    if is_name(options.train_layers):
        raise TrainingError(
            f"train_layers: {options.train_layers} cannot be shared out by --parallel layers; "
            "give numbers such as 11-15"
        )
    output = output_directory(options)
    count = min(options.num_processes, len(options.layers))
    tasks = []
    done = []  # last checkpoints of processes that had finished
    for share in (options.layers[n::count] for n in range(count)):
        name = "layers_" + "-".join(map(str, share))
        start = options.resume_from
        own = checkpoints(user_path(start) / name) if start is not None else {}
        if options.max_steps in own:
            done.append(own[options.max_steps])
            continue
        task = dataclasses.replace(
            options,
            train_layers=share,
            num_processes=1,
            resume_from=str(own[max(own)]) if own else start,
            output_dir=output / name,
            wandb_name=f"{output.name}_{name}",
        )
        tasks.append(task)
    run = RunDirectory(output, resuming=options.resume_from is not None)
    try:
        with disk_errors(output, TrainingError):
            write_configuration(output, options)
        environment = [{"CUDA_VISIBLE_DEVICES": device} for device in _devices(len(tasks))]
        reports = _run_processes(tasks, environment) if tasks else []
        step = min((report.global_step for report in reports), default=options.max_steps)
        stopped_by = next((report.stopped_by for report in reports if report.stopped_by), 0)
        layers = sorted(layer for report in reports for layer in report.layers)
        checkpoint = output
        if not stopped_by:
            checkpoint = run.checkpoint(step)
            sources = [*done, *(report.checkpoint for report in reports)]
            merged = merge(sources, checkpoint, verify=True, force=True)
            layers = [info.layer for info in merged.layers]
            run.link(step, FINAL)
        return TrainReport(
            output=output,
            checkpoint=checkpoint,
            global_step=step,
            layers=tuple(layers),
            seconds=time.monotonic() - begun,
            evaluation=None,
            stopped_by=stopped_by,
            data=reports[0].data if reports else options.data,
        )
    finally:
        run.close()


def _devices(count: int) -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(n) for n in range(torch.cuda.device_count())]
    return [names[n % len(names)] if names else "" for n in range(count)]


def _run_processes(
    tasks: list[TrainOptions], environment: list[dict[str, str]]
) -> list[TrainReport]:
    """Run one process per task and return their reports in order.

    SIGTERM and Ctrl-C are forwarded to all processes.
    """
    # spawn: CUDA does not work in a forked process
    results = multiprocessing.get_context("spawn").SimpleQueue()
    # else each process would take all cores
    threads = max(1, (os.cpu_count() or 1) // len(tasks))
    received = 0
    context: Any = multiprocessing.spawn(  # type: ignore[no-untyped-call, attr-defined]
        _train_one, (tasks, environment, threads, results), nprocs=len(tasks), join=False
    )

    def forward(number: int, frame: Any = None) -> None:
        nonlocal received
        received = received or number
        for process in context.processes:
            if process.is_alive():
                os.kill(process.pid, number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    failure: Exception | None = None
    try:
        if not _all_succeeded(context.processes):
            for process in context.processes:
                process.terminate()  # save and end
        while not context.join(grace_period=_GRACE):
            pass
    except ProcessException as error:  # how a process ended; its error is in the queue
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
    if failure is None and len(found) == len(tasks):
        return [found[index] for index in range(len(tasks))]
    if received:  # a signal before training began: there is nothing to save
        raise KeyboardInterrupt if received == signal.SIGINT else SystemExit(128 + received)
    if isinstance(failure, ProcessRaisedException):
        raise failure  # a bug of ours, with its traceback
    raise TrainingError(f"a training process ended unexpectedly: {failure}")


def _all_succeeded(processes: Sequence[Any]) -> bool:
    """Wait until all processes have ended; return False as soon as one has failed."""
    while True:
        codes = [process.exitcode for process in processes]  # None: still running
        if any(codes):
            return False
        running = [p.sentinel for p, code in zip(processes, codes, strict=True) if code is None]
        if not running:
            return True
        connection.wait(running)


def _train_one(
    index: int,
    tasks: list[TrainOptions],
    environment: list[dict[str, str]],
    threads: int,
    results: Any,
) -> None:
    # Until training defers signals, Ctrl-C ends the process at once. Python's own handler would
    # wait for C++ code, which may be waiting for another process.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ.update(environment[index])
    os.environ["OMP_NUM_THREADS"] = str(threads)  # accelerate sets torch's threads from it
    torch.set_num_threads(threads)
    from npt_fast.training.run import train_here

    try:
        results.put((index, train_here(tasks[index])))
    except NPTError as error:
        results.put((index, error))
        raise SystemExit(error.exit_code) from None
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
