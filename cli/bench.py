"""``npt-fast bench``: time one modulated MLP."""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from npt_fast.cli.arguments import PathText
from npt_fast.cli.output import print_json, say
from npt_fast.errors import BenchmarkError
from npt_fast.tables import markdown_table

Size = Annotated[int | None, Parameter(validator=Number(gte=1))]
Row = dict[str, Any]


def _listed(_: type, value: str | None) -> None:
    if value is not None and not all(value.split(",")):
        raise ValueError(f"names separated by commas, got {value!r}")


def _numbers(_: type, value: str | None) -> None:
    if value is not None and not re.fullmatch(r"[1-9][0-9]{0,8}(,[1-9][0-9]{0,8})*", value):
        raise ValueError(f"positive numbers separated by commas, got {value!r}")


Names = Annotated[str | None, Parameter(validator=_listed)]
Numbers = Annotated[str | None, Parameter(validator=_numbers)]


def bench(
    *,
    op: Names = None,
    model: str = "llama-3.2-1b",
    tokens: Numbers = None,
    num_ranks: Size = None,
    np_rank: Size = None,
    dtype: Literal["bfloat16", "float16", "float32"] | None = None,
    against: Names = None,
    budget: float | None = None,
    plot: PathText | None = None,
    host: bool = False,
    json: bool = False,
) -> int:
    """Time every way to compute one modulated MLP, on a GPU or a CPU.

    npt-fast bench --model llama-3.2-1b --tokens 1,64,2048 --plot bench.png

    The values of every way are compared with float64 first. A wrong one is not timed, and the exit
    code is 3. Times are medians over rounds in which all ways take turns.

    Parameters
    ----------
    op
        Operations to time, separated by commas: modulated_mlp, decode, swiglu, coefficients,
        modulated_linear, probe. Defaults to modulated_mlp, and on a GPU decode too.
    model
        Name of a model whose sizes to take, or its widths as D,F.
    tokens
        Numbers of tokens, separated by commas. Defaults to 1,64,2048 on a GPU and 1,16,128 on a
        CPU.
    num_ranks
        Number of components of a weight change; defaults to the model's.
    np_rank
        Rank of a component; defaults to the model's.
    dtype
        Dtype of all tensors; defaults to bfloat16 on a GPU and float32 on a CPU.
    against
        Ways to compare our kernels with: eager, reference, base, compile, compile-gemm,
        compile-reference, compile-base, liger. Defaults to reference,base for ops that have them.
    budget
        Seconds after which no further timing starts; the rest is reported as not run.
    plot
        Picture file to write: time against tokens, and the least time this device could take.
    host
        Show the host's microseconds and launches per call instead. This needs no GPU.
    json
        Print everything as JSON.
    """
    begin = time.monotonic()
    if host:
        others = (op, tokens, num_ranks, np_rank, dtype, against, budget, plot)
        if any(value is not None for value in others):
            raise BenchmarkError("--host uses fixed sizes: combine it with --json only")
        return _host(json)
    from npt_fast.benchmarks import bench as library
    from npt_fast.benchmarks.device import INTERPRETED, INTERPRETER, device_facts
    from npt_fast.benchmarks.harness import machine_facts
    from npt_fast.benchmarks.rows import BAD, NOT_RUN
    from npt_fast.pictures.figure import check

    if budget is not None and not budget >= library.LEAST:
        raise BenchmarkError(
            f"budget {budget:g}: nothing can be timed in less than {library.LEAST:g} s"
        )
    given: dict[str, Any] = {
        "ops": op and op.split(","),
        "tokens": tokens and [int(word) for word in tokens.split(",")],
        "dtype": dtype,
        "against": against and against.split(","),
    }
    wanted = library.Bench(
        model=model, num_ranks=num_ranks, rank=np_rank,
        **{name: value for name, value in given.items() if value},
    )  # fmt: skip
    if plot is not None and INTERPRETED:
        raise BenchmarkError(f"{plot}: nothing to draw: {INTERPRETER}")
    if plot is not None:
        check(plot)  # fail now rather than after minutes of work
    facts = machine_facts("torch", "triton") | device_facts()
    rows: list[Row] = []
    for row in wanted.rows(begin + budget if budget else math.inf):
        rows.append(row)
        if sys.stderr.isatty():
            print(f"{row['what']}, {row['provider']}: {row['status']}", file=sys.stderr)
    if all(row["status"] == NOT_RUN for row in rows):
        raise BenchmarkError(f"budget {budget:g}: nothing could be timed in it")
    if json:
        limits = wanted.ceilings()
        print_json({"machine": facts, "ceilings": limits and limits.numbers, "rows": rows})
    else:
        say(library.title(wanted, facts))
        if INTERPRETED:
            say(f"Times are not shown: {INTERPRETER}")
        _print(rows, wanted.ceilings())
    if plot is not None:
        library.plot(wanted, rows, facts, plot)
    return 3 if any(row["status"] in BAD for row in rows) else 0


def _print(rows: Sequence[Row], limits: Any) -> None:
    if limits:
        say(
            f"Ceilings measured in this run: {limits.bytes_per_second / 1e9:.0f} GB/s, "
            f"{limits.flops_per_second / 1e12:.2f} TFLOP/s"
        )
    from npt_fast.benchmarks.rows import cell

    tables: dict[str, list[Row]] = {}
    for row in rows:
        tables.setdefault(f"{row['op']}, {row['direction']}", []).append(row)
    for name, found in tables.items():
        baseline = f"x {found[0]['baseline']}"
        heads = ("tokens", "by", "launch", "ms", "p20", "p80", baseline, "of ceiling", "status")
        body = [
            (
                str(row["tokens"]), row["provider"], row["launch"] or "-",
                *(_number(row, key) for key in ("ms", "p20", "p80")),
                _number(row, "ratio", ".2f"), _number(row, "of ceiling", ".0%"),
                cell(f"{row['status']} {row['detail']}".strip()),
            )
            for row in found
        ]  # fmt: skip
        say()
        say(f"{name}:")
        for line in markdown_table(heads, body).splitlines():
            say(line)


def _number(row: Row, key: str, form: str = "") -> str:
    if key not in row:
        return "-"
    return format(row[key], form or (".0f" if row[key] >= 1000 else ".3g"))


def _host(json: bool) -> int:
    from npt_fast.benchmarks.device import ON_GPU
    from npt_fast.benchmarks.host import measure
    from npt_fast.benchmarks.rows import table

    rows = measure()
    if json:
        print_json(rows)
    else:
        say(
            "Host microseconds per call with tiny tensors, on a GPU"
            if ON_GPU
            else "Process microseconds per call with tiny tensors; kernels are launched through a "
            "driver that does nothing, and torch's operations run on the CPU"
        )
        say()
        for line in table(rows).splitlines():
            say(line)
    return 0
