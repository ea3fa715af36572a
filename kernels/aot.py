"""Compile every kernel for named GPUs without having one, and report on the machine code.

The launches are real: `modulated_mlp` runs on meta tensors, and each recorded launch is compiled as
Triton would compile it on the device, including the divisibility of arguments. Registers, spills,
shared memory, matrix instructions and widths of global accesses are read from the machine code.
This needs Triton's compiler but no GPU, and says nothing about speed
(design.md#checks-without-a-gpu).
"""

from __future__ import annotations

import multiprocessing
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from npt_fast.kernels import _tuning
from npt_fast.kernels._launch import Launch, Target, recorded_launches
from npt_fast.kernels.factored import Factors, MLPWeights
from npt_fast.kernels.int8 import Int8Matrix
from npt_fast.kernels.modulated_mlp import Path as KernelPath
from npt_fast.kernels.modulated_mlp import modulated_mlp, multiplies

COMPILER = f"Triton {triton.__version__}"
TARGETS = ("sm_75", "sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")

_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int8: "*i8",
}
# by generation: mma of sm_80 and sm_120, wgmma of sm_90, tcgen05 of sm_100
_MATRIX = {"cuda": r"\b(HMMA|HGMMA|UTCHMMA|UTCQMMA)\b", "hip": r"\bv_mfma_\w+"}


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel as compiled for one kind of GPU.

    Attributes:
        kernel: name of the kernel.
        config: dtype, tiles and whatever else tells it from other cases of the kernel.
        arch: name of the target, such as ``sm_90`` or ``gfx942``.
        registers: registers per thread.
        spill_bytes: bytes per thread that are in memory for lack of registers.
        shared_bytes: bytes of shared memory per program.
        warps_per_sm: warps that fit into a multiprocessor, or compute unit, at a time.
        mma: number of matrix instructions.
        mma_kind: names of the matrix instructions.
        accesses: widths in bits of global loads and stores, and how often each occurs.
        problems: what is wrong, in words; empty if nothing is.
    """

    kernel: str
    config: str
    arch: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    warps_per_sm: int
    mma: int
    mma_kind: str
    accesses: str
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


class _Call(NamedTuple):
    """A call of `modulated_mlp` whose launches are compiled."""

    path: KernelPath
    tokens: int
    rank: int
    hidden: int = 2048  # as in Llama-3.2-1B
    intermediate: int = 8192
    num_ranks: int = 8
    dtype: torch.dtype = torch.bfloat16
    tf32: bool = False
    gradients: bool = False
    projections: int = 3
    bias: bool = False
    int8: bool = False
    activation: str = "silu"


_ODD = (5, 431, 1155, 3)
_CALLS = [
    *(
        call
        for dtype, tf32 in (
            (torch.bfloat16, False), (torch.float16, False), (torch.float32, True),
            (torch.float32, False),
        )
        for call in (
            _Call("gemm", 8192, 512, dtype=dtype, tf32=tf32, gradients=True),
            _Call("fused", 8192, 128, dtype=dtype, tf32=tf32, gradients=True),
            _Call("decode", 1, 512, dtype=dtype, tf32=tf32),
            _Call("decode", 64, 512, dtype=dtype, tf32=tf32),
            _Call("decode", 1, 512, dtype=dtype, tf32=tf32, int8=True),
            _Call("decode", 64, 512, dtype=dtype, tf32=tf32, int8=True),
        )
    ),
    _Call("fused", 8192, 16),
    _Call("fused", 8192, 32),
    _Call("fused", 8192, 64, gradients=True, bias=True),
    _Call("fused", 64, 64, gradients=True, bias=True),
    # odd sizes: all accesses are masked and narrow
    _Call("gemm", 8191, *_ODD, gradients=True),
    _Call("fused", 8191, *_ODD, gradients=True),
    _Call("fused", 8191, *_ODD, projections=1),
    _Call("decode", 3, *_ODD),
    _Call("decode", 3, *_ODD, int8=True),
    _Call("decode", 3, *_ODD, projections=1, bias=True),
    # relu has the fewest instructions of all
    _Call("gemm", 8192, 512, gradients=True, activation="relu"),
    *(
        call._replace(activation=activation)
        for activation in ("gelu", "gelu_pytorch_tanh")
        for call in (
            _Call("gemm", 8192, 512, gradients=True),
            _Call("fused", 8192, 128, gradients=True),
            _Call("decode", 1, 512),
            _Call("decode", 64, 512),
            _Call("decode", 1, 512, int8=True),
        )
    ),
]  # fmt: skip


class Case(NamedTuple):
    """One launch to compile, and its label."""

    launch: Launch
    config: str


@cache
def cases(target: Target) -> list[Case]:
    """Every distinct launch that those of `_CALLS` make that a target can be asked for."""
    found: dict[Any, Case] = {}
    labels: Counter[str] = Counter()
    for call in _CALLS:
        if call.path != "gemm" and not multiplies(target):
            continue
        for candidate in range(_tuning.MAX_CANDIDATES):
            # a rule with one tile only gives it again, which `found` drops
            with recorded_launches(target) as launches, _tuning.nth_candidate(candidate):
                _run_call(call)
            for launch in launches:
                source = _signature_of(launch)
                key = (launch.kernel.fn.__name__, *map(repr, source), *launch.options.items())
                if key in found:
                    continue
                label = _case_label(launch, call)
                labels[key[0] + label] += 1
                number = labels[key[0] + label]
                found[key] = Case(launch, label if number == 1 else f"{label} ({number})")
    return list(found.values())


def case_count(name: str) -> int:
    """Number of cases for a target such as ``sm_90``."""
    return len(cases(Target.parse(name)))


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _run_call(call: _Call) -> None:
    def tensor(*shape: int, requires_grad: bool = False) -> Tensor:
        return torch.empty(
            shape, dtype=call.dtype, device="meta", requires_grad=requires_grad and call.gradients
        )

    d, f, r, c = call.hidden, call.intermediate, call.num_ranks * call.rank, call.projections
    biases = (tensor(f), tensor(f), tensor(d)) if call.bias else ()
    weights = MLPWeights(tensor(f, d), tensor(f, d), tensor(d, f), *biases)
    factors = Factors(
        # one trained factor: the gradients of the others are torch's products, no launches of ours
        tensor(d, c * r, requires_grad=True),
        tensor(min(c, 2) * r, d),
        tensor(r, f) if c == 3 else None,
        tensor(r, f),
        tensor(r, f) if c > 1 else None,
        tensor(r, d) if c == 3 else None,
        call.num_ranks,
    )
    if call.int8:
        factors = Factors._make([*map(_int8, Factors._fields, factors[:-1]), call.num_ranks])
    x = tensor(call.tokens, d, requires_grad=True)
    h = tensor(call.tokens, d, requires_grad=True)
    with _tf32(call.tf32):
        y = modulated_mlp(x, h, weights, factors, activation=call.activation, path=call.path)
        if call.gradients:
            y.backward(tensor(call.tokens, d))


def _int8(name: str, like: Tensor | None) -> Any:
    """A factor of int8 numbers in the layout of `quantize`, without data."""
    if like is None:
        return None
    rows, columns = like.shape
    if name.startswith("w_a"):
        values = torch.empty(rows, columns, dtype=torch.int8, device="meta")
        return Int8Matrix(values, torch.empty(rows, 1, device="meta"))
    values = torch.empty(columns, rows, dtype=torch.int8, device="meta").t()
    return Int8Matrix(values, torch.empty(1, columns, device="meta"))


def _kernel_name(launch: Launch) -> str:
    name: str = launch.kernel.fn.__name__
    return name.strip("_").removesuffix("_kernel")


def _case_label(launch: Launch, call: _Call) -> str:
    """A label that tells a case from others of its kernel."""
    values = launch.arguments
    parts = ["tf32" if values.get("PRECISION") == "tf32" else _TYPES[call.dtype][1:]]
    if "BLOCK_K" in values:
        blocks = (values[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
        parts.append("x".join(map(str, blocks)))
    else:
        parts.append("x".join(str(v) for name, v in values.items() if name.startswith("BLOCK_")))
    parts.append(f"w{launch.options['num_warps']}")
    if launch.options["num_stages"] > 1:
        parts.append(f"s{launch.options['num_stages']}")
    parts.append(f"{call.path}{' int8' * call.int8} D{call.hidden} r{call.rank}")
    if values.get("ACTIVATION", "silu") != "silu":
        parts.append(call.activation)
    given = [name for name, value in values.items() if value is None]
    if given:
        parts.append("without " + ",".join(name.removesuffix("_ptr") for name in given))
    # which stride is 1 differs between calls of the same kernel
    parts += [name for name, v in values.items() if name.startswith("stride_b") and v == 1][:1]
    return " ".join(parts)


def _signature_of(launch: Launch) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any]]:
    """Signature, constants and attributes, as Triton's launcher derives them from the arguments."""
    signature: dict[str, str] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    rows_are_aligned = [["tt.divisibility", 16]]
    for index, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        value = launch.arguments[name]
        # Triton makes constants of None as well, and of the integer 1 unless told not to
        one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or one:
            signature[name], constants[(index,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name], attributes[(index,)] = _TYPES[value.dtype], rows_are_aligned
        else:
            # Triton's rule: an integer that fits is int32, so that offsets need int64 by our own
            # doing
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = rows_are_aligned
    return signature, constants, attributes


def compile_all(names: Sequence[str], *, jobs: int, max_spill: int = 0) -> Iterator[Compiled]:
    """Compile all cases for the named targets in separate processes; yield results in order.

    Args:
        names: names of targets, such as ``sm_90``.
        jobs: number of processes.
        max_spill: spilled bytes per thread that are no problem.

    Raises:
        ValueError: a name is not that of a target.
    """
    work = [(name, index) for name in names for index in range(case_count(name))]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        case = partial(compile_case, max_spill=max_spill)
        yield from pool.map(case, *zip(*work, strict=True))


def compile_case(name: str, index: int, *, max_spill: int = 0) -> Compiled:
    """Compile case `index` of a target, which may spill `max_spill` bytes per thread."""
    target = Target.parse(name)
    launch, config = cases(target)[index]
    try:
        return _compiled(target, launch, config, max_spill)
    except Exception as error:  # of Triton or a tool; the other cases still count
        reason = f"does not compile: {' '.join(str(error).split())[:200]}"
        return Compiled(_kernel_name(launch), config, name, 0, 0, 0, 0, 0, "", "", (reason,))


def _compiled(target: Target, launch: Launch, config: str, max_spill: int) -> Compiled:
    wave = 64 if target.backend == "hip" else 32
    compiled = triton.compile(
        ASTSource(launch.kernel, *_signature_of(launch)),
        target=GPUTarget(target.backend, target.arch, wave),
        options=launch.options,
    )
    read = _read_hip if target.backend == "hip" else _read_cuda
    registers, spill_bytes, code = read(compiled)
    shared = int(compiled.metadata.shared)
    matrix = Counter(re.findall(_MATRIX[target.backend], code))
    problems = []
    if spill_bytes > max_spill:
        problems.append(f"{spill_bytes} bytes are spilled")
    if shared > target.shared_bytes:
        problems.append(f"{shared} bytes of shared memory, {target.shared_bytes} at most")
    precise = launch.arguments.get("PRECISION") == "ieee" and config.startswith("fp32")
    if "dot" in compiled.asm["ttir"] and not matrix and not precise:
        problems.append("no matrix instructions")
    if re.search(r"\.f64\b", compiled.asm.get("ptx", "")):
        problems.append("arithmetic in float64")
    return Compiled(
        kernel=_kernel_name(launch),
        config=config,
        arch=str(target),
        registers=registers,
        spill_bytes=spill_bytes,
        shared_bytes=shared,
        warps_per_sm=_warps_per_sm(target, registers, shared, launch.options["num_warps"]),
        mma=sum(matrix.values()),
        mma_kind=", ".join(sorted(matrix)),
        accesses=_accesses(code),
        problems=tuple(problems),
    )


def _read_cuda(compiled: Any) -> tuple[int, int, str]:
    """Registers, spilled bytes and machine code."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(compiled.asm["cubin"])
        usage = _tool(triton.knobs.nvidia.cuobjdump.path, "-res-usage", file)
        # the analysis of the data flow takes as long as the rest, and changes nothing here
        code = _tool(triton.knobs.nvidia.nvdisasm.path, "-c", "-ndf", file)
    found = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", usage)}
    # ptxas spills to the stack frame, which is empty in every kernel of ours that does not spill
    return found["REG"], found["STACK"] + found.get("LOCAL", 0), code


def _tool(program: str, *arguments: object) -> str:
    command = [program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _read_hip(compiled: Any) -> tuple[int, int, str]:
    code = compiled.asm["amdgcn"]
    found = {
        name: int(value)
        for name, value in re.findall(r"^\s*\.(\w+):\s*(\d+)\s*$", code, re.MULTILINE)
    }
    return found["vgpr_count"], found["private_segment_fixed_size"], code


_CUDA_ACCESS = re.compile(r"\b(LDG|LDGSTS|STG)\.([A-Z0-9.]+)")
_HIP_ACCESS = re.compile(r"\b(?:global|buffer|flat)_(load|store)_(\w+)")
_HIP_BITS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "ushort": 16, "short": 16}


def _accesses(code: str) -> str:
    """Global accesses by width, such as ``load 128:12 16:3, store 128:4`` (bits:count)."""
    counts: dict[str, Counter[int]] = {"load": Counter(), "store": Counter()}
    for name, suffix in _CUDA_ACCESS.findall(code):
        parts = suffix.split(".")
        bits = next((int(part) for part in parts if part in ("64", "128", "256")), 32)
        bits = next((int(part[1:]) for part in parts if part in ("U8", "U16", "S16")), bits)
        counts["store" if name == "STG" else "load"][bits] += 1
    for name, suffix in _HIP_ACCESS.findall(code):
        bits = next((b for prefix, b in _HIP_BITS.items() if suffix.startswith(prefix)), 16)
        counts[name][bits] += 1
    return ", ".join(
        f"{name} " + " ".join(f"{bits}:{n}" for bits, n in sorted(widths.items(), reverse=True))
        for name, widths in counts.items()
        if widths
    )


def _warps_per_sm(target: Target, registers: int, shared: int, warps: int) -> int:
    """Warps that registers and shared memory allow, by the vendors' occupancy rules."""
    if target.backend == "hip":  # 4 SIMDs of 512 registers a lane, 8 waves each at most
        waves = 4 * min(8, 512 // max(1, -(-registers // 8) * 8))
        programs = min(waves // warps, target.shared_bytes // max(1, shared))
        return programs * warps
    consumer = int(target.arch) in (86, 89, 120, 121)
    # 1024 bytes of shared memory are reserved for each program
    limit, memory = (48, 102_400) if consumer else (64, target.shared_bytes + 1024)
    # a multiprocessor has 65,536 registers; a thread gets a multiple of 8
    by_registers = 65_536 // (-(-registers // 8) * 8 * 32) // warps
    return warps * min(by_registers, limit // warps, memory // (shared + 1024))
