"""Runs the program in forks of a process that has imported torch and transformers already.

Importing them takes 5 s of CPU time, a run of the program on a tiny model a fifth of one. A fork
has its own memory, folder, environment, streams and signals, ends as any process does, and its CPU
time and memory are counted from the fork. The processes that a training starts are forks too. Tests
of how the program starts need a real process.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import pkgutil
import runpy
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import npt_fast

ROOT = Path(__file__).parent.parent
NOT_PRELOADED = ("npt_fast.__main__", "npt_fast.benchmarks", "npt_fast.kernels", "npt_fast.vllm")
"""What is run, what chooses between Triton's compiler and its interpreter as it is imported, and
what only vLLM imports."""
LIBRARIES = (
    "datasets.io.generator",
    "datasets.packaged_modules.generator.generator",
    "matplotlib.figure",
    "pyarrow.parquet",
    "rich.markdown",
    "transformers.models.llama.modeling_llama",
)
"""What the program imports when it needs it."""


@dataclass(frozen=True)
class Finished:
    """A run that has ended.

    Attributes:
        code: as of `subprocess.Popen.returncode`.
        seconds: of CPU time.
        memory: bytes at the peak above those of the fork as it began.
    """

    code: int
    out: str
    err: str
    seconds: float
    memory: int


class ForkServer:
    """Runs programs, one at a time.

    Args:
        folder: an empty one, for what libraries keep outside of the folders of a test.
    """

    def __init__(self, folder: Path) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.environment = {
            **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
            "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # a fork takes 16 ms instead of 27
            "OMP_NUM_THREADS": "1",
            "XDG_CACHE_HOME": str(folder / "cache"),
            "XDG_STATE_HOME": str(folder / "state"),
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": str(folder / "modules"),
            "PYTHONWARNINGS": "ignore",
        }
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.fork_server", str(theirs.fileno())],
                cwd=ROOT,
                env=self.environment,
                pass_fds=[theirs.fileno()],
            )

    def start(
        self,
        arguments: Sequence[object],
        streams: Sequence[IO[Any]],
        *,
        script: Path | None = None,
        folder: Path = ROOT,
        environment: Mapping[str, str] | None = None,
    ) -> int:
        """Start ``npt-fast``, or a script, with stdin, stdout and stderr; its process id.

        `wait` must follow.
        """
        job = {
            "script": script and str(script),
            "arguments": [str(argument) for argument in arguments],
            "folder": str(folder),
            "environment": {**self.environment, **(environment or {})},
        }
        with TemporaryFile() as file:  # a message would be limited in size
            file.write(json.dumps(job).encode())
            file.flush()
            descriptors = [file.fileno(), *(stream.fileno() for stream in streams)]
            socket.send_fds(self._channel, [b"run"], descriptors)
            self._begun = json.loads(self._channel.recv(1000))
        return int(self._begun["pid"])

    def wait(self, seconds: float = 300) -> dict[str, Any]:
        """How the run has ended; after so many seconds it is killed."""
        self._channel.settimeout(seconds)
        try:
            ended = self._channel.recv(1000)
        except TimeoutError:
            os.kill(self._begun["pid"], signal.SIGKILL)
            self._channel.settimeout(None)
            ended = self._channel.recv(1000)
        self._channel.settimeout(None)
        found: dict[str, Any] = json.loads(ended)
        found["memory"] = found.pop("peak") - self._begun["resident"]
        return found

    def run(
        self, arguments: Sequence[object], *, input: str = "", seconds: float = 300, **options: Any
    ) -> Finished:
        """Run ``npt-fast``, or a script, to its end."""
        with TemporaryFile() as stdin, TemporaryFile() as stdout, TemporaryFile() as stderr:
            stdin.write(input.encode())
            stdin.seek(0)
            self.start(arguments, (stdin, stdout, stderr), **options)
            ended = self.wait(seconds)
            texts = []
            for stream in (stdout, stderr):
                stream.seek(0)
                texts.append(stream.read().decode(errors="surrogateescape"))
        return Finished(out=texts[0], err=texts[1], **ended)

    def pytest(self, *arguments: object, environment: Mapping[str, str]) -> Finished:
        """Run tests in a process of their own, for instance where Triton compiles."""
        import pytest  # not in the server, whose forks are as the program is in use

        script = Path(pytest.__file__).with_name("__main__.py")
        options = ("-q", "-p", "no:cacheprovider", *arguments)
        return self.run(options, script=script, environment=environment)

    def close(self) -> None:
        self._channel.close()
        self._process.wait()


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _modules() -> Iterator[str]:
    for module in pkgutil.walk_packages(npt_fast.__path__, "npt_fast."):
        if not module.name.startswith(NOT_PRELOADED):
            yield module.name


def _serve(channel: socket.socket) -> list[int]:
    """Fork for each message; returns in the fork, with the descriptors that came with it."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(channel, 10, 4)
        if not message:
            os._exit(0)
        child = os.fork()
        if child == 0:
            return descriptors
        for descriptor in descriptors:
            os.close(descriptor)
        _, status, usage = os.wait4(child, 0)
        ended = {
            "code": os.waitstatus_to_exitcode(status),
            "seconds": usage.ru_utime + usage.ru_stime,
            "peak": usage.ru_maxrss << 10,
        }
        channel.send(json.dumps(ended).encode())


def main() -> None:
    import torch
    from torch.multiprocessing.spawn import start_processes
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    gc.disable()  # all of it stays
    channel = socket.socket(fileno=int(sys.argv[1]))
    for name in (*LIBRARIES, *_modules()):
        importlib.import_module(name)
    get_checkpoint_conversion_mapping("llama")  # compiles 900 patterns in the first call: 0.1 s
    gc.collect()
    gc.freeze()
    gc.enable()
    job_file, *streams = _serve(channel)
    with open(job_file) as file:
        file.seek(0)
        job = json.load(file)
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["environment"])
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin = sys.__stdin__ = open(0, errors="surrogateescape")
    sys.stdout = sys.__stdout__ = open(1, "w", errors="strict")
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, errors="backslashreplace")
    torch.multiprocessing.spawn = partial(start_processes, start_method="fork")
    sys.argv = [job["script"] or "npt-fast", *job["arguments"]]
    with channel:
        begun = {"pid": os.getpid(), "resident": _resident()}
        channel.send(json.dumps(begun).encode())
    code: object = 0
    try:
        if job["script"]:
            runpy.run_path(job["script"], run_name="__main__")
        else:
            runpy.run_module("npt_fast", run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(code or 0))  # taking all modules down would take longer than most runs


if __name__ == "__main__":
    main()
