"""``npt-fast kernels``; roofline against an independent table of numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any, NamedTuple

import pytest

from npt_fast.kernels import aot
from tests.checkpoints import run

ROOFLINE = ("kernels", "roofline")


class Known(NamedTuple):
    """Known numbers of one shape (design.md#counts), for an H100 and 8192 tokens.

    Attributes:
        options: The model, k and r.
        mflop: MFLOP per token, forward and backward.
        product_ms: Time of the products, forward and backward.
        exposed_ms: Time of the elementwise launches, forward and backward.
        vectors_ms: Time to move v_a and v_b alone, forward and backward.
        decode: Weights in MB, and the microseconds that reading them takes.
        kept: MB kept by our backward, without probes, and by a checkpoint; None if unknown.
    """

    options: str
    mflop: tuple[float, float]
    product_ms: tuple[float, float]
    exposed_ms: tuple[float, float]
    vectors_ms: tuple[float, float]
    decode: tuple[float, float]
    kept: tuple[float, float, float] | None = None


TABLE = {
    "1B R=4096 k=8": Known(
        "--model llama-3.2-1b", (402.7, 704.6), (3.33, 5.83), (0.30, 0.60), (2.40, 4.81),
        (402.7, 120), (739, 538, 67),
    ),
    "8B R=64 k=1": Known(
        "--model llama-3.1-8b --num-ranks 1", (361.0, 369.6), (2.99, 3.06), (0.21, 0.43),
        (0.54, 1.08), (361, 108),
    ),
    "8B R=512 k=8": Known(
        "--model llama-3.1-8b", (421.5, 490.7), (3.49, 4.06), (0.23, 0.47), (4.33, 8.65),
        (421.5, 126), (655, 630, 134),
    ),
    "8B R=2048 k=8": Known(
        "--model llama-3.1-8b --rank 256", (629.1, 906.0), (5.21, 7.50), (0.30, 0.60),
        (4.33, 8.65), (629, 188),
    ),
    "8B R=8192 k=128": Known(
        "--model llama-3.1-8b --num-ranks 128", (1459.6, 2566.9), (12.1, 21.2), (0.57, 1.14),
        (69.2, 138.5), (1460, 436),
    ),
}  # fmt: skip


def document(capsys: Any, *options: object) -> dict[str, Any]:
    code, out, err = run(capsys, *ROOFLINE, *options, "--json")
    assert (code, err) == (0, "")
    found: dict[str, Any] = json.loads(out)
    return found


def passes(found: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["phase"], row["form"]): row for row in found["passes"]}


@pytest.mark.parametrize("known", TABLE.values(), ids=TABLE)
def test_numbers_of_the_table(capsys: Any, known: Known) -> None:
    """All figures agree to their digits; `exposed` counts coefficients too, which they omit."""
    found = document(capsys, *known.options.split(), "--tokens", 8192, "--gpu", "h100")
    rows, shape = passes(found), found["shape"]
    d, f, r = shape["hidden"], shape["intermediate"], shape["joined"]
    for index, phase in enumerate(("forward", "backward")):
        for form in ("gemm", "fused", "v_a/v_b at best", "v_a/v_b, eager"):
            row = rows[phase, form]
            assert row["flops"] / 8192 / 1e6 == pytest.approx(known.mflop[index], abs=0.06)
            assert row["compute_ms"] == pytest.approx(known.product_ms[index], rel=5e-3)
        exposed = rows[phase, "gemm"]["exposed"] - 8192 * 12 * shape["num_ranks"]
        assert exposed / 3.35e9 == pytest.approx(known.exposed_ms[index], abs=0.006)
        others = (7 * d + 6 * r + 11 * f, 10 * d + 12 * r + 14 * f)[index]
        vectors = rows[phase, "v_a/v_b at best"]["activations"] - 8192 * 2 * others
        assert vectors / 3.35e9 == pytest.approx(known.vectors_ms[index], rel=5e-3)
    row = rows["decode", "decode"]
    assert row["tokens"] == 1
    assert row["weights"] / 1e6 == pytest.approx(known.decode[0], abs=0.5)
    assert row["floor_ms"] * 1e3 == pytest.approx(known.decode[1], abs=1)
    if known.kept:
        *kept, _ = (value / 1e6 for value in found["kept_for_backward"].values())
        assert kept == pytest.approx(known.kept, abs=0.5)


def test_bytes_by_hand(capsys: Any) -> None:
    """D=2048, F=8192, R=4096; 2 bytes each, 12 k for coefficients, 8192 tokens."""
    rows = passes(document(capsys, "--model", "llama-3.2-1b"))
    gemm, fused = rows["forward", "gemm"], rows["backward", "fused"]
    assert gemm["activations"] == 8192 * (2 * (14_336 + 73_728 + 90_112) + 96)
    assert fused["activations"] == 8192 * (2 * (14_336 + 147_456 + 114_688) + 96)
    assert gemm["weights"] == 2 * (50_331_648 + 150_994_944)
    assert fused["weights"] == 2 * (50_331_648 + 2 * 150_994_944)
    assert gemm["memory_ms"] == pytest.approx(0.9919, abs=1e-4)
    assert gemm["floor_ms"] == gemm["compute_ms"] == pytest.approx(3.3318, abs=1e-4)
    assert gemm["in_turn_ms"] == pytest.approx(3.3318 + 0.3007, abs=2e-4)


def test_widths_by_hand_are_those_of_the_model(capsys: Any) -> None:
    model = document(capsys, "--model", "llama-3.1-8b", "--rank", 32, "--tokens", 100)
    widths = document(
        capsys, "--hidden", 4096, "--intermediate", 14336, "--rank", 32, "--num-ranks", 8,
        "--tokens", 100,
    )  # fmt: skip
    assert model.pop("model") == "llama-3.1-8b"
    assert widths.pop("model") is None
    assert model == widths


def test_tokens_of_decode(capsys: Any) -> None:
    for tokens, expected in ((1, 1), (64, 64), (65, 1)):
        rows = passes(document(capsys, "--model", "smollm2-135m", "--tokens", tokens))
        assert rows["decode", "decode"]["tokens"] == expected
        assert rows["forward", "gemm"]["tokens"] == tokens


def test_another_gpu(capsys: Any) -> None:
    """The GPU changes only the times, in proportion to its peaks."""
    first, second = (
        document(capsys, "--model", "llama-3.1-8b", "--gpu", gpu) for gpu in ("h100", "mi300x")
    )
    assert second["gpu"] == {
        "name": "mi300x", "peaks": "the vendor's", "tflops": 1307, "tb_per_s": 5.3,
    }  # fmt: skip
    for a, b in zip(first["passes"], second["passes"], strict=True):
        assert a["activations"] == b["activations"]
        assert a["compute_ms"] * 990 == pytest.approx(b["compute_ms"] * 1307)
        assert a["memory_ms"] * 3.35 == pytest.approx(b["memory_ms"] * 5.3)
        assert b["floor_ms"] == max(b["compute_ms"], b["memory_ms"]) <= b["in_turn_ms"]


def test_it_says_that_it_is_arithmetic(capsys: Any) -> None:
    code, out, err = run(capsys, *ROOFLINE, "--model", "llama-3.2-1b", "--gpu", "h100")
    assert (code, err) == (0, "")
    title, shape, gpu, *_ = lines = out.splitlines()
    assert title == "Roofline: arithmetic, not measured"
    assert shape == "llama-3.2-1b: D=2048, F=8192, k=8 components of rank r=512 (R=4096)"
    assert gpu == "h100: 990 TFLOP/s dense bfloat16, 3.35 TB/s"
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert ["decode, T=1", "decode", "0.4", "0.6", "402.7", "0.000", "0.120"] in [
        row[:7] for row in cells
    ]
    assert ["ours", "739.0"] in cells
    assert any("vendor" in line for line in lines)
    found = document(capsys, "--model", "llama-3.2-1b")
    assert "not measured" in found["title"]
    assert found["assumptions"]


USAGE = {
    "unknown-model": ("--model gpt-2", "'gpt-2'; known: llama-3.2-1b, llama-3.2-3b,"),
    "unknown-gpu": ("--model llama-3.2-1b --gpu abacus", "'abacus'; known: h100, h200, a100,"),
    "no-model": ("--gpu h100", "--model (llama-3.2-1b, "),
    "one-width": ("--hidden 64", "--hidden and --intermediate"),
    "both": ("--model llama-3.2-1b --hidden 64", "either --model, or --hidden"),
    "no-tokens": ("--model llama-3.2-1b --tokens 0", "--tokens"),
    "no-rank": ("--model llama-3.2-1b --rank 0", "--rank"),
    "unknown-option": ("--model llama-3.2-1b --warp", "--warp"),
}


@pytest.mark.parametrize("case", USAGE)
def test_wrong_usage(capsys: Any, case: str) -> None:
    options, expected = USAGE[case]
    code, out, err = run(capsys, *ROOFLINE, *options.split())
    assert (code, out) == (2, "")
    assert err.startswith("Error: ") and err.count("\n") == 1
    assert expected in err


def test_help(capsys: Any) -> None:
    code, out, _ = run(capsys, "kernels", "--help")
    assert code == 0 and "roofline" in out
    code, out, _ = run(capsys, *ROOFLINE, "--help")
    assert code == 0 and "qwen3-4b" in out and "rtx4090" in out


@pytest.mark.parametrize("last", ["--help", "--json"])
def test_it_loads_neither_torch_nor_triton(last: str) -> None:
    arguments = [*ROOFLINE, "--model", "llama-3.2-1b", last]
    code = f"""
import sys
from npt_fast.cli.main import main
try:
    main({arguments})
except SystemExit:
    print("modules", *sys.modules)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    modules = set(result.stdout.split("modules")[-1].split())
    assert "npt_fast.kernels.roofline" in modules
    assert not {"torch", "numpy", "triton", "transformers"} & modules


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[aot.Compiled]:
    """Stand in for the compiler: one result for every architecture that is asked for."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    fine = aot.Compiled("swiglu_fwd", "bf16", "", 32, 0, 0, 64, 0, "", "load 128:2", ())
    results = [fine]
    monkeypatch.setattr(aot, "case_count", lambda name: len(results))
    monkeypatch.setattr(
        aot,
        "compile_all",
        lambda names, jobs, max_spill: (
            replace(one, arch=name) for name in names for one in results
        ),
    )
    return results


def test_compiled_kernels(compiled: list[aot.Compiled], capsys: Any) -> None:
    code, out, err = run(capsys, "kernels", "--arch", "sm_90,gfx942")
    assert code == 0
    assert "without a GPU; says nothing about speed" in out
    assert [line.split()[1] for line in out.splitlines()[4:]] == ["sm_90", "gfx942"]
    assert err.strip() == "2 compiled, 0 with problems"
    code, out, _ = run(capsys, "kernels", "--arch", "sm_90", "--json")
    (found,) = json.loads(out)
    keys = {"kernel", "config", "arch", "registers", "spill_bytes", "shared_bytes", "mma", "ok"}
    assert keys <= set(found) and found["ok"] is True


def test_a_problem_is_a_failed_check(compiled: list[aot.Compiled], capsys: Any) -> None:
    compiled.append(replace(compiled[0], spill_bytes=8, problems=("8 bytes are spilled",)))
    code, out, err = run(capsys, "kernels", "--arch", "sm_90")
    assert code == 3
    assert "8 bytes are spilled" in out and "2 compiled, 1 with problems" in err


def test_where_nothing_is_compiled(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = run(capsys, "kernels", "--arch", "sm_90,sm_91")
    assert code == 2 and "sm_91: not one of" in err
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    code, _, err = run(capsys, "kernels")
    assert code == 1 and "unset it" in err
