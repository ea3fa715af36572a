"""The device that benchmarks run on: a GPU, a CPU, or Triton's interpreter on a CPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from importlib.util import find_spec

import torch

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
"""Default dtype; the interpreter computes bfloat16 wrongly."""

_TRITON = find_spec("triton") is not None
INTERPRETED = _TRITON and not ON_GPU and os.environ.get("TRITON_INTERPRET", "0") != "0"
"""Whether kernels run in Triton's interpreter; they work there, but times mean nothing."""
RUNS_TRITON = _TRITON and (ON_GPU or INTERPRETED)

COMPILER = "aot_eager" if INTERPRETED else "inductor"
"""Backend of torch.compile; under the interpreter a quick one, since Inductor takes minutes."""
INTERPRETER = "interpreter: times mean nothing"
_QUERY = (
    "uuid,name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,"
    "temperature.gpu"
)


def device_facts() -> dict[str, str]:
    """Facts that a reader needs to judge times on this device."""
    facts = {"torch.compile": COMPILER}
    if not ON_GPU:
        named = {"device": INTERPRETER} if INTERPRETED else {"device": "cpu"}
        return named | facts | {"threads": str(torch.get_num_threads())}
    properties = torch.cuda.get_device_properties(DEVICE)
    sm = f"sm_{properties.major}{properties.minor}"
    return facts | {
        "device": properties.name,
        "uuid": str(getattr(properties, "uuid", "unknown")),
        "architecture": properties.gcnArchName if torch.version.hip else sm,
        "multiprocessors": str(properties.multi_processor_count),
        "memory": f"{properties.total_memory / 1e9:.1f} GB",
        "L2": f"{properties.L2_cache_size / 1e6:.1f} MB",
        "CUDA": str(torch.version.cuda),
        "ROCm": str(torch.version.hip),
        "TF32": str(torch.backends.cuda.matmul.allow_tf32),
    }


def device_state() -> list[str]:
    """Driver, clocks, power and temperature of all NVIDIA GPUs now; empty without nvidia-smi."""
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return (answer.stdout + answer.stderr).splitlines()


def synchronize() -> None:
    """Wait for all launched work."""
    if ON_GPU:
        torch.cuda.synchronize()


def device_error() -> str:
    """The error that makes the device unusable for this process, or an empty string."""
    try:
        synchronize()
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return ""


def milliseconds(function: Callable[[], object]) -> float:
    """Milliseconds that a call takes; on a GPU by the device's own clock."""
    if not ON_GPU:
        begin = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - begin)
    # events, since a launch returns before its kernel has run
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def peak_bytes(function: Callable[[], object]) -> int:
    """Peak bytes that a call allocates beyond what was there before; 0 without a GPU."""
    if not ON_GPU:
        function()
        return 0
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    synchronize()
    return torch.cuda.max_memory_allocated() - before
