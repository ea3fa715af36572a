"""Results of the shell, as lines."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from npt_fast.checkpoint.keys import PROJECTIONS_OF, modulated
from npt_fast.errors import printable
from npt_fast.tables import markdown_table
from npt_fast.transfer.origin import readings
from npt_fast.transfer.positions import named, reached

if TYPE_CHECKING:
    from npt_fast.config import InjectionTime
    from npt_fast.hf.tokenizer import Reading
    from npt_fast.transfer.compare import Comparison, Sweep, Token
    from npt_fast.transfer.modulation import Modulation
    from npt_fast.transfer.session import InjectionResult, Prediction
    from npt_fast.transfer.session_state import Item

_COLUMN = 38  # characters of one of two texts side by side
_CELL = 20  # characters of one of two lists side by side
_STEPS = 20  # tokens whose probability is drawn as a bar


def magnitudes(modulation: Modulation) -> list[str]:
    return [
        f"  Layer {layer}: magnitude={modulation.magnitude(layer):.6f}"
        for layer in sorted(modulation.layers)
    ]


def kind(modulation: Modulation) -> str:
    """The modulation types, from the projections that change."""
    names = {frozenset(modulated(name)): name for name in PROJECTIONS_OF}
    changed = sorted(modulation.layers.values(), key=len)
    return "/".join(dict.fromkeys(names.get(frozenset(p), ",".join(p)) for p in changed))


def shelf_table(items: dict[str, Item]) -> list[str]:
    rows = [
        [
            name,
            ",".join(map(str, sorted(item.modulation.layers))),
            kind(item.modulation),
            str(item.modulation.terms),
            textwrap.shorten(printable(position(item.modulation.origin)), _CELL, placeholder="…"),
            printable(item.modulation.description)[:30],
        ]
        for name, item in items.items()
    ]
    return markdown_table(
        ["Name", "Layers", "Type", "Ranks", "Position", "Source"], rows
    ).splitlines()


def details(name: str, item: Item) -> list[str]:
    found = item.modulation
    lines = [
        f"Modulation '{name}'",
        f"  Source: {found.description}",
        f"  Position: {position(found.origin)}",
        f"  Tokens: {'; '.join(readings(found.origin)) or 'unknown'}",
        f"  Timestamp: {item.created}",
        f"  Base model: {found.base.name}",
    ]
    for layer in sorted(found.layers):
        projections = found.layers[layer]
        count = max(len(terms.v_a) for terms in projections.values())
        lines += [
            f"  Layer {layer}:",
            f"    Type: {('single', 'dual', 'triple')[len(projections) - 1]}",
            f"    Num ranks: {count}",
            f"    Magnitude: {found.magnitude(layer):.6f}",
            *(
                f"    {projection}: v_a {list(terms.v_a.shape)}, v_b {list(terms.v_b.shape)}"
                for projection, terms in projections.items()
            ),
        ]
    return lines


def other_reading(name: str, modulation: Modulation, reading: Reading) -> list[str]:
    """Note that a modulation's texts were read in another way than those of the session."""
    ways = [way for way in readings(modulation.origin) if not way.startswith(str(reading))]
    return [f"Note: '{name}' was read {way}; this session reads texts {reading}" for way in ways]


def position(origin: Mapping[str, Any]) -> str:
    """The tokens that a modulation was extracted at, for people."""
    try:
        return named(origin["positions"], origin["tokens"])
    except (LookupError, TypeError):  # of several, or from a file, which may hold anything
        return str(origin.get("positions", "of several"))


def arrow(before: float, after: float, much: float, some: float) -> str:
    """``↑↑`` for growth by more than `much`, ``↑`` by more than `some`, else ``=``; so ``↓``."""
    ratio = after / before if before else float("inf") if after else 1.0
    if ratio > 1 + much:
        return "↑↑"
    if ratio > 1 + some:
        return "↑"
    if ratio < 1 / (1 + much):
        return "↓↓"
    return "↓" if ratio < 1 / (1 + some) else "="


def percent(before: float, after: float) -> str:
    return f"{100 * (after / before - 1):+.1f}%" if before else "new"


def prediction(found: Prediction) -> list[str]:
    lines = []
    if len(found.continuation) > 1:
        lines += ["Complete generation:", f"  {printable(found.text)}"]
    lines.append(f"Top-{len(found.top)} Predictions:")
    lines += [
        f"  {number}. {printable(text):<12}: {value:.4f}"
        for number, (text, value) in enumerate(found.top, 1)
    ]
    if found.tracked:
        lines.append("Tracked Tokens:")
        lines += [f"  {text!r:<14}: {value:.4f}" for text, value in found.tracked]
    return lines


def injection(name: str, found: InjectionResult, how: str, when: InjectionTime) -> list[str]:
    """Everything that an injection did."""
    c = found.comparison
    lines = [
        f"Injected '{name}' ({how}) into layers {c.layers}, tokens "
        f"{reached(c.positions, c.prompt, when)} of {len(c.prompt)}, {c.seconds * 1000:.0f} ms "
        f"(baseline {c.no_injection_seconds * 1000:.0f} ms)"
    ]
    lines += left_out(found.left_out)
    lines += _side_by_side(c.no_injection_text, c.injected_text, name)
    if len(c.generated) > 1:
        lines += [
            f"  Token {number:3}: {token.text!r} [{token.before:.4f} → {token.after:.4f}] "
            f"{arrow(token.before, token.after, 0.5, 0.1)} "
            f"({percent(token.before, token.after)}) KL: {kl:.4f}"
            for number, (token, kl) in enumerate(zip(c.generated, c.kls, strict=True), 1)
        ]
        lines += ["Complete generation:", f"  {printable(''.join(c.prompt) + c.injected_text)}"]
    lines.append(f"Top-{len(c.top)} Predictions:")
    lines += [
        f"  {number}. {printable(token.text):<12}: {_change(token)}"
        for number, token in enumerate(c.top, 1)
    ]
    if c.tracked:
        lines.append("Tracked Tokens:")
        lines += [f"  {token.text!r:<14}: {_change(token)}" for token in c.tracked]
        if len(c.generated) > 1:
            lines.append("Tracked Tokens, injected, token by token:")
            pairs = zip(c.tracked, c.paths, strict=True)
            lines += [f"  {token.text!r:<14}: {_course(path)}" for token, path in pairs]
    lines.append(f"KL Divergence: {c.kl:.6f}")
    if len(c.kls) > 1:
        average = sum(c.kls) / len(c.kls)
        lines.append(
            f"KL statistics: mean {average:.6f}, max {max(c.kls):.6f}, min {min(c.kls):.6f}, "
            f"final {c.kls[-1]:.6f}"
        )
    if found.no_effect:
        lines.append(f"No effect: {found.no_effect}")
    return lines


def _change(token: Token) -> str:
    before, after = token.before, token.after
    return (
        f"{before:.4f} → {after:.4f}  [{percent(before, after)}] {arrow(before, after, 1.0, 0.2)}"
    )


def left_out(layers: Sequence[int]) -> list[str]:
    return (
        [f"Warning: layers {list(layers)} of the modulation are off and were left out"]
        if layers
        else []
    )


def _course(path: Sequence[float]) -> str:
    bars = "".join("▁▂▃▄▅▆▇█"[min(int(8 * value), 7)] for value in path[:_STEPS])
    return (
        f"initial {path[0]:.4f}, final {path[-1]:.4f}, max {max(path):.4f}, min {min(path):.4f}  "
        f"{bars}"
    )


def _side_by_side(base: str, injected: str, name: str) -> list[str]:
    columns = [
        [head, *(textwrap.wrap(printable(text), _COLUMN, drop_whitespace=False) or [""])]
        for head, text in (("Baseline", base), (f"With {name}", injected))
    ]
    height = max(map(len, columns))
    left, right = ([*column, *[""] * (height - len(column))] for column in columns)
    return [f"  {a:<{_COLUMN}} | {b}".rstrip() for a, b in zip(left, right, strict=True)]


def comparison(name: str, c: Comparison) -> list[str]:
    """Where it was injected, the likeliest tokens without and with it, and the tracked ones."""

    def cell(text: str, value: float) -> str:
        return f"{printable(text):<{_CELL - 7}} {value:.4f}"

    lines = [
        f"Tokens: {named(c.positions, c.prompt)} of {len(c.prompt)}",
        f"Top-{len(c.top)} Predictions:",
        f"  {'Baseline':<{_CELL}}  With {name}",
    ]
    lines += [
        f"  {cell(a.text, a.before):<{_CELL}}  {cell(b.text, b.after)}"
        for a, b in zip(c.no_injection_top, c.top, strict=True)
    ]
    if c.tracked:
        rows = [
            [repr(t.text), f"{t.before:.4f}", f"{t.after:.4f}", f"{t.after - t.before:+.4f}"]
            for t in c.tracked
        ]
        table = markdown_table(["Token", "Baseline", "Injected", "Change"], rows)
        lines += ["Tracked Tokens:", *table.splitlines()]
    return [*lines, f"KL Divergence: {c.kl:.6f}"]


def sweep(found: Sweep) -> list[str]:
    """Tables of layers by strengths: KL, then every tracked token."""
    heads = ["Layers", *found.columns]

    def table(values: Sequence[Sequence[float]]) -> list[str]:
        rows = [
            [",".join(map(str, layers)), *(f"{value:.4f}" for value in row)]
            for layers, row in zip(found.layers, values, strict=True)
        ]
        return markdown_table(heads, rows).splitlines()

    hit = f"Tokens: {named(found.positions, found.tokens)} of {len(found.tokens)}"
    lines = [hit, "KL Divergence:", *table(found.kl)]
    for text, values in found.tracked.items():
        lines += [f"{text!r} (baseline {found.no_injection[text]:.4f}):", *table(values)]
    return lines
