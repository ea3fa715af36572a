"""Rules for the source of every kernel whose violation no test without a GPU can show."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import triton.language as tl

FOLDER = Path(__file__).parents[2] / "kernels"
SOURCES = {path.name: path.read_text() for path in sorted(FOLDER.glob("*.py"))}

SINCE_3_7_1 = {
    "arange", "broadcast_to", "cdiv", "constexpr", "dot", "erf", "exp", "float32", "full", "int64",
    "load", "minimum", "program_id", "reshape", "sigmoid", "static_assert", "static_range", "store",
    "sum", "zeros",
}  # fmt: skip
"""Names of `triton.language` that 3.7.1 (which torch 2.13 ships), 3.8.0 and 3.9.0 all have. Look a
name up in all three before adding it."""


def jitted(source: str) -> Iterator[ast.FunctionDef]:
    """Functions that Triton compiles."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            # `triton.jit`, or a call of it with options
            named = [getattr(found, "func", found) for found in node.decorator_list]
            if "triton.jit" in map(ast.unparse, named):
                yield node


def narrow_program_ids(source: str) -> list[str]:
    """A program id times a stride exceeds 2^31 in large tensors (design.md#triton-bugs)."""
    return re.findall(r"tl\.program_id\(\w+\)(?!\.to\(tl\.int64\)).*", source)


def products_into_one_accumulator(source: str) -> list[str]:
    """Two in one loop compile wrongly for sm_100 with some Tritons (design.md#triton-bugs)."""
    found = []
    for function in jitted(source):
        for loop in ast.walk(function):
            if not isinstance(loop, ast.For | ast.While):
                continue
            targets = Counter(
                ast.unparse(target)
                for node in ast.walk(loop)
                if isinstance(node, ast.Assign | ast.AugAssign)
                for call in ast.walk(node.value)
                if isinstance(call, ast.Call)
                and ast.unparse(call.func) in ("tl.dot", "dot", "accumulate")
                for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            )
            found += [f"{function.name}: {name}" for name, n in targets.items() if n > 1]
    return found


def miscompiled_or_gone(source: str) -> list[str]:
    """Block pointers are gone (design.md#triton); these loop options are unsafe."""
    return re.findall(
        r"\b(?:make_block_ptr|advance|flatten|warp_specialize)\b\s*[=(]",
        "".join(ast.unparse(function) for function in jitted(source)),
    )


def names_not_in_every_version(source: str) -> set[str]:
    return {
        node.attr
        for function in jitted(source)
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "tl"
    } - SINCE_3_7_1


def oracle_in_use(source: str) -> list[str]:
    """Code that is compared with the definition must not use it."""
    return re.findall(r".*import.*\breference\b.*|.*\breference\.\w+\(.*", source)


RULES = {
    narrow_program_ids: "tl.program_id(0) * BLOCK",
    products_into_one_accumulator: (
        "for k in range(K):\n  acc = dot(a, b, acc, P)\n  acc += tl.dot(c, d)"
    ),
    miscompiled_or_gone: "for k in tl.range(K, flatten=True):\n  pass",
    names_not_in_every_version: "tl.make_tensor_descriptor(p)",
    oracle_in_use: "from npt_fast.kernels import factored, reference",
}
"""Each rule, and code that breaks it."""
rules = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)


@rules
@pytest.mark.parametrize("name", SOURCES)
def test_source(name: str, rule: Callable[[str], object]) -> None:
    assert not rule(SOURCES[name])


@rules
def test_a_rule_can_be_broken(rule: Callable[[str], object]) -> None:
    lines = RULES[rule].replace("\n", "\n  ")
    assert rule(f"@triton.jit\ndef kernel():\n  {lines}\n")


def test_kernels_are_found() -> None:
    names = {function.name for source in SOURCES.values() for function in jitted(source)}
    assert len(names) >= 17
    assert sum(source.count("tl.program_id(") for source in SOURCES.values()) >= 12
    assert all(hasattr(tl, name) for name in SINCE_3_7_1)
