"""``npt-fast bench``"""

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

    The values of every way are compared with float64 first. A way with wrong values is not timed,
    and the exit code is 3. Times are medians over rounds in which all ways take turns.

    Parameters
    ----------
    op
        Operations to time, separated by commas: modulated_mlp, decode, swiglu, coefficients,
        modulated_linear, probe. If not given, modulated_mlp, and on a GPU also decode.
    model
        Model whose sizes are taken, by name, or its widths as D,F.
    tokens
        Numbers of tokens to time, separated by commas; if not given, 1,64,2048 on a GPU and
        1,16,128 on a CPU.
    num_ranks
        Number k of components; the model's if not given.
    np_rank
        Rank r of a component; the model's if not given.
    dtype
        Type of all tensors; if not given, bfloat16 on a GPU and float32 on a CPU.
    against
        Baselines, separated by commas: eager, reference, base, compile, compile-gemm,
        compile-reference, compile-base, liger. If not given, reference,base for operations that
        have them.
    budget
        Seconds to spend; what has not started by then is reported as not run.
    plot
        Picture to write: time against tokens, with the least time this device could take.
    host
        Count the host's microseconds and launches per call instead; needs no GPU.
    json
        Print everything as JSON.
    """
    begin = time.monotonic()
    if host:
        others = (op, tokens, num_ranks, np_rank, dtype, against, budget, plot)
        if any(value is not None for value in others):
            raise BenchmarkError("--host has sizes of its own and takes no option but --json")
        return _host(json)
    from npt_fast.benchmarks import bench as library
    from npt_fast.benchmarks.device import INTERPRETED, INTERPRETER, device_facts
    from npt_fast.benchmarks.harness import machine_facts
    from npt_fast.benchmarks.rows import BAD, NOT_RUN
    from npt_fast.pictures import check

    if budget is not None and not budget >= library.LEAST:
        raise BenchmarkError(
            f"budget {budget:g}: timing anything takes at least {library.LEAST:g} s"
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
        raise BenchmarkError(f"{plot}: there is nothing to draw, for the {INTERPRETER}")
    if plot is not None:
        check(plot)  # before minutes of work
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
            say(f"The {INTERPRETER}, and are not shown")
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
            "Microseconds of host time per call with tiny tensors, on a GPU"
            if ON_GPU
            else "Microseconds of process time per call with tiny tensors; the driver that "
            "launches kernels does nothing, and torch's operations run on the CPU"
        )
        say()
        for line in table(rows).splitlines():
            say(line)
    return 0
