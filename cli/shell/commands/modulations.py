"""Commands that make modulations, from a text or from others by arithmetic, and show them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from npt_fast.cli.shell import views
from npt_fast.cli.shell.command import Commands, Context, Reply, number
from npt_fast.cli.shell.line import Arguments
from npt_fast.errors import TransferError
from npt_fast.transfer.positions import named

if TYPE_CHECKING:
    from npt_fast.transfer.modulation import Modulation

COMMANDS = Commands()
_EXACT = "exact, on dW"


@COMMANDS.command("extract", "NAME TEXT", options=("-pos",))
def _extract(c: Context, a: Arguments) -> Reply:
    """Extract the modulation at a token of a text (default: the last) and put it on the shelf."""
    position = a.options.get("pos", "-1")
    found = c.session.extract(a["NAME"], a["TEXT"], position=position)
    places, tokens = found.origin["positions"], found.origin["tokens"]
    lines = [
        f"✓ Extracted modulation '{a['NAME']}'",
        *views.magnitudes(found),
        f"  Token {named(places, tokens)} of {len(tokens)}",
    ]
    return _kept(a["NAME"], found, lines)


@COMMANDS.command("extract-seq", "NAME TEXT")
def _extract_seq(c: Context, a: Arguments) -> Reply:
    """Extract the mean of each vector over all tokens of a text and put it on the shelf."""
    found = c.session.extract(a["NAME"], a["TEXT"], sequence=True)
    count = len(found.origin["tokens"])
    lines = [
        f"Processing {count} token positions...",
        f"✓ Extracted sequence modulation '{a['NAME']}' ({count} tokens averaged)",
        *views.magnitudes(found),
    ]
    return _kept(a["NAME"], found, lines)


@COMMANDS.command("list")
def _list(c: Context, a: Arguments) -> Reply:
    """List the modulations on the shelf."""
    shelf = dict(c.session.state.shelf)
    data = [
        {
            "name": name,
            "layers": sorted(item.modulation.layers),
            "type": views.kind(item.modulation),
            "ranks": item.modulation.terms,
            "position": views.position(item.modulation.origin),
            "source": item.modulation.description,
        }
        for name, item in shelf.items()
    ]
    lines = views.shelf_table(shelf) if shelf else ["No saved modulations"]
    return Reply({"modulations": data}, lines)


@COMMANDS.command("info", "NAME")
def _info(c: Context, a: Arguments) -> Reply:
    """Show everything known about a modulation."""
    item = c.session.item(a["NAME"])
    data = {**_described(a["NAME"], item.modulation), "created": item.created}
    return Reply(data, views.details(a["NAME"], item))


@COMMANDS.command("delete", "NAME")
def _delete(c: Context, a: Arguments) -> Reply:
    """Delete a modulation from the shelf."""
    c.session.delete(a["NAME"])
    return Reply({"deleted": a["NAME"]}, [f"✓ Deleted modulation '{a['NAME']}'"])


@COMMANDS.command("calc", "REST")
def _calc(c: Context, a: Arguments) -> Reply:
    """Compute exactly on dW: calc new = 0.7*a - b, mean(a, b); names, numbers, + - * ( )."""
    name, equals, expression = a["REST"].partition("=")
    name = name.strip()
    if not equals or not name or len(name.split()) > 1 or not expression.strip():
        raise TransferError("write it like calc new = 0.7*a - b")
    return _made(name, c.session.calculate(name, expression), expression.strip())


_VECTORS = ("-vectors",)


@COMMANDS.command("add", "A B NEW", flags=_VECTORS)
def _add(c: Context, a: Arguments) -> Reply:
    """NEW = A + B, exact on dW; -vectors: on v_a and v_b, as the original does."""
    formula = f"{a['A']} + {a['B']}"
    return _combined(c, a, [a["A"], a["B"]], [1, 1], formula, lambda x, y: x + y)


@COMMANDS.command("subtract", "A B NEW", flags=_VECTORS)
def _subtract(c: Context, a: Arguments) -> Reply:
    """NEW = A - B, exact on dW; -vectors: on v_a and v_b, as the original does."""
    formula = f"{a['A']} - {a['B']}"
    return _combined(c, a, [a["A"], a["B"]], [1, -1], formula, lambda x, y: x - y)


@COMMANDS.command("average", "A... NEW", flags=_VECTORS)
def _average(c: Context, a: Arguments) -> Reply:
    """NEW = the mean of two or more modulations, exact on dW; -vectors: of v_a and v_b."""
    from npt_fast.transfer.modulation import mean

    names = a.values["A"]
    if len(names) < 2:
        raise TransferError(f"average takes two modulations or more: {COMMANDS['average'].usage}")
    shares = [1 / len(names)] * len(names)
    return _combined(c, a, names, shares, f"mean({', '.join(names)})", lambda *parts: mean(parts))


@COMMANDS.command("scale", "A FACTOR NEW", flags=_VECTORS)
def _scale(c: Context, a: Arguments) -> Reply:
    """NEW = FACTOR * A, exact on dW; -vectors: on v_a and v_b, FACTOR squared on dW."""
    factor = number("FACTOR", a["FACTOR"])
    formula = f"{factor:g} * {a['A']}"
    return _combined(c, a, [a["A"]], [factor], formula, lambda x: factor * x)


@COMMANDS.command("negate", "A NEW", flags=_VECTORS)
def _negate(c: Context, a: Arguments) -> Reply:
    """NEW = -A, exact on dW; -vectors: on v_a and v_b, which leaves dW as it is."""
    return _combined(c, a, [a["A"]], [-1], f"-{a['A']}", lambda x: -x)


def _combined(
    c: Context,
    a: Arguments,
    names: Sequence[str],
    factors: Sequence[float],
    formula: str,
    exact: Callable[..., Modulation],
) -> Reply:
    from npt_fast.transfer.modulation import combine_vectors

    parts = [c.session.modulation(name) for name in names]
    on_vectors = "vectors" in a.options
    found = combine_vectors(parts, factors) if on_vectors else exact(*parts)
    c.session.combine(a["NEW"], found)
    return _made(a["NEW"], found, formula, "on vectors" if on_vectors else _EXACT)


def _described(name: str, found: Modulation) -> dict[str, Any]:
    return {
        "name": name,
        "layers": {str(n): {"magnitude": found.magnitude(n)} for n in sorted(found.layers)},
        "type": views.kind(found),
        "ranks": found.terms,
        "origin": dict(found.origin),
        "shapes": {
            f"{layer}.{projection}": [list(terms.v_a.shape), list(terms.v_b.shape)]
            for layer, projection, terms in found.walk()
        },
    }


def _kept(name: str, found: Modulation, lines: list[str]) -> Reply:
    data = {
        "name": name,
        "tokens": found.origin["tokens"],
        "positions": found.origin["positions"],
        "magnitudes": {str(n): found.magnitude(n) for n in sorted(found.layers)},
    }
    return Reply(data, lines, changed=[name])


def _made(name: str, found: Modulation, formula: str, how: str = _EXACT) -> Reply:
    data = {
        "name": name,
        "formula": formula,
        "ranks": found.terms,
        "magnitudes": {str(n): found.magnitude(n) for n in sorted(found.layers)},
    }
    lines = [f"✓ Created modulation '{name}' = {formula} ({how})", *views.magnitudes(found)]
    return Reply(data, lines, changed=[name])
