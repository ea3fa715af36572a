"""The commands of ``npt-fast interact``: from arguments to a session's method and back to lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from npt_fast.checkpoint.source_file import read_file
from npt_fast.cli import shell_views as views
from npt_fast.cli.shell_line import Arguments, parse
from npt_fast.errors import TransferError, suggestion
from npt_fast.paths import user_path
from npt_fast.schema import shown
from npt_fast.tables import markdown_table

if TYPE_CHECKING:
    from npt_fast.transfer.generate import Sampling
    from npt_fast.transfer.modulation import Modulation
    from npt_fast.transfer.session import Session

Base = Literal["replace", "blend", "add"]

_HISTORY = 20
_MAX_SCRIPT = 4 << 20
SAMPLING = {
    "-tokens": "tokens",
    "-temp": "temperature",
    "-strategy": "strategy",
    "-top_k": "top_k",
    "-top_p": "top_p",
}
CHOICES = {
    "-strategy": ["greedy", "top_k", "top_p", "sample"],
    "-when": ["prefill", "decode", "both"],
    "-pos": ["last", "first", "all"],
}
"""Values that can be completed."""
_INJECTION = ("-pos", "-when", "-alpha", "-strength", *SAMPLING)


@dataclass
class Context:
    """What commands work on.

    Attributes:
        session: state of the model and the shelf.
        history: lines, each recorded before it runs.
    """

    session: Session
    history: list[str] = field(default_factory=list)


@dataclass
class Reply:
    """What a command answers.

    Attributes:
        data: the result, as JSON has it.
        lines: the same for people.
        changed: names of modulations that are new on the shelf.
        script: lines that are to run next.
        leave: whether the shell ends.
    """

    data: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    script: list[str] | None = None
    leave: bool = False


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        name: first word of a line.
        kinds: of arguments, see `npt_fast.cli.shell_line.parse`.
        options: with a value.
        flags: without one.
        help: a line.
        run: carries it out.
        log: ``"again"``: replayed; ``"written"``: logged, but not replayed, as it writes files;
            ``"no"``: not logged.
    """

    name: str
    kinds: tuple[str, ...]
    options: tuple[str, ...]
    flags: tuple[str, ...]
    help: str
    run: Callable[[Context, Arguments], Reply]
    log: Literal["again", "written", "no"] = "again"

    @property
    def usage(self) -> str:
        """How it is written."""
        text = "NEW = EXPRESSION" if self.kinds == ("REST",) else " ".join(self.kinds)
        options = [f"[{option} X]" for option in self.options] + [f"[{f}]" for f in self.flags]
        return " ".join(part for part in (self.name, text, *options) if part)

    def parse(self, rest: str) -> Arguments:
        """Arguments of a line, without the command."""
        return parse(rest, self.usage, self.kinds, self.options, self.flags)


COMMANDS: dict[str, Command] = {}
Function = Callable[[Context, Arguments], Reply]


def command(
    name: str,
    kinds: str = "",
    *,
    options: tuple[str, ...] = (),
    flags: tuple[str, ...] = (),
    log: Literal["again", "written", "no"] = "again",
) -> Callable[[Function], Function]:
    """Register a function; the first line of its docstring is the help."""

    def register(function: Function) -> Function:
        text = (function.__doc__ or "").splitlines()[0]
        COMMANDS[name] = Command(name, tuple(kinds.split()), options, flags, text, function, log)
        return function

    return register


@command("track", "[TOKEN...]")
def _track(c: Context, a: Arguments) -> Reply:
    """Follow the probability of tokens; without any, list them. Spaces count: " Paris"."""
    session, texts = c.session, a.values["TOKEN"]
    if not texts:
        tracked = list(session.state.tracked)
        line = f"Tracked tokens: {_quoted(tracked)}" if tracked else "No tokens being tracked"
        return Reply({"tracked": tracked}, [line])
    known = [text for text in texts if text in session.state.tracked]
    new = [text for text in dict.fromkeys(texts) if text not in known]
    session.track(texts)
    lines = [f"✓ Tracking tokens: {_quoted(new)}"] if new else []
    lines += [f"Already tracking: {text}" for text in known]
    for text in new:
        piece, count = session.first_piece(text)
        if count > 1:
            lines.append(f"Warning: {text!r} is {count} tokens; the first, {piece!r}, is followed")
    return Reply({"tracked": list(session.state.tracked)}, lines)


@command("untrack", "TOKEN...")
def _untrack(c: Context, a: Arguments) -> Reply:
    """Follow tokens no more."""
    before = c.session.state.tracked
    c.session.untrack(a.values["TOKEN"])
    lines = [
        f"✓ Stopped tracking: {text}" if text in before else f"Token not tracked: {text}"
        for text in a.values["TOKEN"]
    ]
    return Reply({"tracked": list(c.session.state.tracked)}, lines)


@command("clear")
def _clear(c: Context, a: Arguments) -> Reply:
    """Follow no tokens."""
    c.session.untrack(c.session.state.tracked)
    return Reply({"tracked": []}, ["✓ Cleared all tracked tokens"])


@command("tokens", "TEXT")
def _tokens(c: Context, a: Arguments) -> Reply:
    """A text's tokens with their positions and ids."""
    from npt_fast.transfer.extract import tokenize

    ids, texts = tokenize(c.session.tokenizer, a["TEXT"])
    count = len(ids)
    rows = [
        [str(n), str(n - count), str(i), repr(t)]
        for n, (i, t) in enumerate(zip(ids, texts, strict=True))
    ]
    table = markdown_table(["Position", "From the end", "Id", "Token"], rows)
    return Reply({"ids": ids, "tokens": texts}, table.splitlines())


@command("extract", "NAME TEXT", options=("-pos",))
def _extract(c: Context, a: Arguments) -> Reply:
    """Put the modulation of a text's token (default: the last) on the shelf."""
    position = a.options.get("pos", "-1")
    found = c.session.extract(a["NAME"], a["TEXT"], position=position)
    (place,) = found.origin["positions"]
    lines = [
        f"✓ Extracted modulation '{a['NAME']}'",
        *views.magnitudes(found),
        f"  Token {place} of {len(found.origin['tokens'])}: {found.origin['tokens'][place]!r}",
    ]
    return _kept(a["NAME"], found, lines)


@command("extract-seq", "NAME TEXT")
def _extract_seq(c: Context, a: Arguments) -> Reply:
    """Put the mean of each vector over all of a text's tokens on the shelf."""
    found = c.session.extract(a["NAME"], a["TEXT"], sequence=True)
    count = len(found.origin["tokens"])
    lines = [
        f"Processing {count} token positions...",
        f"✓ Extracted sequence modulation '{a['NAME']}' ({count} tokens averaged)",
        *views.magnitudes(found),
    ]
    return _kept(a["NAME"], found, lines)


@command("list")
def _list(c: Context, a: Arguments) -> Reply:
    """What is on the shelf."""
    shelf = dict(c.session.state.shelf)
    data = [
        {
            "name": name,
            "layers": sorted(item.modulation.layers),
            "type": views.kind(item.modulation),
            "ranks": item.modulation.terms,
            "source": item.modulation.description,
        }
        for name, item in shelf.items()
    ]
    lines = views.shelf_table(shelf) if shelf else ["No saved modulations"]
    return Reply({"modulations": data}, lines)


@command("info", "NAME")
def _info(c: Context, a: Arguments) -> Reply:
    """All that is known of a modulation."""
    item = c.session.item(a["NAME"])
    data = {**_described(a["NAME"], item.modulation), "created": item.created}
    return Reply(data, views.details(a["NAME"], item))


@command("delete", "NAME")
def _delete(c: Context, a: Arguments) -> Reply:
    """Take a modulation off the shelf."""
    c.session.delete(a["NAME"])
    return Reply({"deleted": a["NAME"]}, [f"✓ Deleted modulation '{a['NAME']}'"])


@command("calc", "REST")
def _calc(c: Context, a: Arguments) -> Reply:
    """Exact arithmetic on dW: calc new = 0.7*a - b, mean(a, b); names, numbers, + - * ( )."""
    name, equals, expression = a["REST"].partition("=")
    name = name.strip()
    if not equals or not name or len(name.split()) > 1 or not expression.strip():
        raise TransferError("it goes like: calc new = 0.7*a - b")
    return _made(name, c.session.calculate(name, expression), expression.strip())


@command("add", "A B NEW")
def _add(c: Context, a: Arguments) -> Reply:
    """NEW = A + B, exact on dW."""
    found = c.session.modulation(a["A"]) + c.session.modulation(a["B"])
    return _made(a["NEW"], c.session.combine(a["NEW"], found), f"{a['A']} + {a['B']}")


@command("subtract", "A B NEW")
def _subtract(c: Context, a: Arguments) -> Reply:
    """NEW = A - B, exact on dW."""
    found = c.session.modulation(a["A"]) - c.session.modulation(a["B"])
    return _made(a["NEW"], c.session.combine(a["NEW"], found), f"{a['A']} - {a['B']}")


@command("average", "A... NEW")
def _average(c: Context, a: Arguments) -> Reply:
    """NEW = the mean of two or more, exact on dW."""
    from npt_fast.transfer.modulation import mean

    names = a.values["A"]
    if len(names) < 2:
        raise TransferError(f"average takes two modulations or more: {COMMANDS['average'].usage}")
    found = mean([c.session.modulation(name) for name in names])
    return _made(a["NEW"], c.session.combine(a["NEW"], found), f"mean({', '.join(names)})")


@command("scale", "A FACTOR NEW")
def _scale(c: Context, a: Arguments) -> Reply:
    """NEW = FACTOR * A, exact on dW."""
    factor = _number("FACTOR", a["FACTOR"])
    found = factor * c.session.modulation(a["A"])
    return _made(a["NEW"], c.session.combine(a["NEW"], found), f"{factor:g} * {a['A']}")


@command("negate", "A NEW")
def _negate(c: Context, a: Arguments) -> Reply:
    """NEW = -A, exact on dW."""
    found = -c.session.modulation(a["A"])
    return _made(a["NEW"], c.session.combine(a["NEW"], found), f"-{a['A']}")


@command("test", "TEXT", options=tuple(SAMPLING))
def _test(c: Context, a: Arguments) -> Reply:
    """What the model says, nothing injected."""
    found = c.session.predict(a["TEXT"], _sampling(c, a))
    return Reply(asdict(found), views.prediction(found))


@command("inject", "NAME TEXT", options=_INJECTION)
def _inject(c: Context, a: Arguments) -> Reply:
    """Continue a text, the modulation in place of the last token's own."""
    return _injected(c, a, "replace", "strength", unused="alpha")


@command("inject-blend", "NAME TEXT", options=_INJECTION, flags=("-exact",))
def _inject_blend(c: Context, a: Arguments) -> Reply:
    """Likewise, mixed: alpha v_source + (1 - alpha) v, as the original; -exact: on dW."""
    return _injected(c, a, "blend", "alpha", unused="strength")


@command("inject-add", "NAME TEXT", options=_INJECTION, flags=("-exact",))
def _inject_add(c: Context, a: Arguments) -> Reply:
    """Likewise, added: v + strength v_source, as the original; -exact: on dW."""
    return _injected(c, a, "add", "strength", unused="alpha")


@command("compare", "NAME TEXT", options=("-pos",))
def _compare(c: Context, a: Arguments) -> Reply:
    """Likeliest next tokens with and without, side by side."""
    sampling = replace(c.session.state.settings, tokens=1)
    found = c.session.inject(
        a["NAME"], a["TEXT"], position=a.options.get("pos", "-1"), sampling=sampling
    )
    lines = views.comparison(a["NAME"], found.comparison) + views.left_out(found.left_out)
    return Reply({**asdict(found.comparison), "left_out": found.left_out}, lines)


@command("sweep", "NAME TEXT", options=("-pos", "-strength"))
def _sweep(c: Context, a: Arguments) -> Reply:
    """Every layer by itself and all, at several strengths (-strength 0.5,1,2)."""
    given = a.options.get("strength", "0.25,0.5,1,2").split(",")
    strengths = [_number("-strength", text) for text in given]
    found = c.session.sweep(
        a["NAME"], a["TEXT"], strengths=strengths, position=a.options.get("pos", "-1")
    )
    return Reply(asdict(found), views.sweep(found))


@command("layers", "[LAYERS]")
def _layers(c: Context, a: Arguments) -> Reply:
    """Which layers are on; with 11,13 or all: have these on and all others off."""
    session, text = c.session, a.get("LAYERS")
    if text == "all":
        session.activate(session.available)
    elif text is not None:
        try:
            session.activate([int(part) for part in text.split(",")])
        except ValueError:
            raise TransferError(
                f"layers are numbers like 11,13, or all, not {shown(text)}"
            ) from None
    on = list(session.state.layers)
    off = [layer for layer in session.available if layer not in on]
    line = f"Active layers: {on}" + (f" (off: {off})" if off else "")
    return Reply({"on": on, "off": off}, [f"✓ {line}" if text else line])


@command("bake", "NAME", options=("-strength",))
def _bake(c: Context, a: Arguments) -> Reply:
    """Add the modulation to the base weights, for every token, until undo."""
    strength = _number("-strength", a.options.get("strength", "1"))
    found = c.session.bake(a["NAME"], strength)
    layers = sorted(found.layers)
    return Reply(
        {"baked": a["NAME"], "strength": strength, "layers": layers},
        [f"✓ Baked '{a['NAME']}' x{strength:g} into layers {layers}; undo takes it out"],
    )


@command("export-lora", "NAME DIR", log="written")
def _export_lora(c: Context, a: Arguments) -> Reply:
    """Write the modulation as a LoRA adapter that PEFT and vLLM load."""
    path = c.session.export_lora(a["NAME"], a["DIR"])
    rank = c.session.modulation(a["NAME"]).terms
    return Reply(
        {"path": str(path), "rank": rank}, [f"✓ Wrote '{a['NAME']}' as LoRA of rank {rank}: {path}"]
    )


@command("undo")
def _undo(c: Context, a: Arguments) -> Reply:
    """Take the last change back: of the shelf, the weights, layers, tokens or settings."""
    what = c.session.undo()
    return Reply({"undone": what}, [f"✓ Undone: {what}"])


@command("reset")
def _reset(c: Context, a: Arguments) -> Reply:
    """As at the start, weights too; undo brings all back but what was baked."""
    baked = c.session.bakes
    c.session.reset()
    more = f", {baked} bakes taken out" if baked else ""
    return Reply({"bakes_undone": baked}, [f"✓ Reset: the shelf is empty, all layers on{more}"])


@command("set", "[KEY=VALUE...]")
def _set(c: Context, a: Arguments) -> Reply:
    """Defaults of tokens, strategy, temperature, top_k, top_p and seed: set seed=3."""
    values = {}
    for pair in a.values["KEY=VALUE"]:
        key, equals, value = pair.partition("=")
        if not equals:
            raise TransferError(f"it goes like: set seed=3, not {shown(pair)}")
        values.update(_setting(c, {"temp": "temperature"}.get(key, key), value))
    if values:
        c.session.set(**values)
    settings = asdict(c.session.state.settings)
    line = ", ".join(f"{key}={value}" for key, value in settings.items())
    return Reply(settings, [f"✓ {line}" if values else line])


@command("save", "FILE [NAME]", log="written")
def _save(c: Context, a: Arguments) -> Reply:
    """Write the session into a folder (safetensors and JSON), or one modulation into a file."""
    name, path = a.get("NAME"), a["FILE"]
    if name is not None:
        target = user_path(path if path.endswith(".safetensors") else f"{path}.safetensors")
        c.session.modulation(name).save(target)
        return Reply({"path": str(target)}, [f"✓ Saved modulation '{name}' to {target}"])
    target = c.session.save(path)
    count = len(c.session.state.shelf)
    lines = [f"✓ Session saved to {target} ({count} modulations)"]
    if c.session.bakes:
        lines.append("Warning: what is baked into the base weights is not part of it")
    return Reply({"path": str(target), "modulations": count}, lines)


@command("load", "FILE")
def _load(c: Context, a: Arguments) -> Reply:
    """Read a saved session in place of this one, or a modulation's file onto the shelf."""
    names = c.session.load(a["FILE"])
    line = f"✓ Loaded {len(names)} modulations from {a['FILE']}: {', '.join(names)}"
    return Reply({"loaded": names}, [line], changed=names)


@command("run", "FILE", log="no")
def _run(c: Context, a: Arguments) -> Reply:
    """Carry out the lines of a file."""
    lines = read_script(a["FILE"])
    return Reply({"lines": len(lines)}, [f"Running {a['FILE']}"], script=lines)


@command("history", log="no")
def _history(c: Context, a: Arguments) -> Reply:
    """The last 20 lines."""
    start = max(len(c.history) - _HISTORY, 0)
    recent = c.history[start:]
    lines = [f"  {number}. {line}" for number, line in enumerate(recent, start + 1)]
    return Reply({"history": recent}, lines)


@command("clear-history", log="no")
def _clear_history(c: Context, a: Arguments) -> Reply:
    """Forget the lines."""
    c.history.clear()
    return Reply({}, ["✓ History cleared"])


@command("help", "[COMMAND]", log="no")
def _help(c: Context, a: Arguments) -> Reply:
    """All commands, or one."""
    name = a.get("COMMAND")
    if name is not None:
        found = find(name)
        return Reply({"usage": found.usage, "help": found.help}, [found.usage, f"  {found.help}"])
    width = max(len(" ".join((x.name, *x.kinds))) for x in COMMANDS.values() if x.name != "calc")
    lines = ["Commands:"]
    for x in COMMANDS.values():
        head = x.usage if x.name == "calc" else " ".join((x.name, *x.kinds))
        lines.append(f"  {head:<{width}}  {x.help}")
    lines += [
        "NAME and TEXT may be in double quotes; help COMMAND has the options.",
        "Positions: a number (-1 is the last), 2:5, 1,4, last, first, all, at:WORD, after:WORD.",
    ]
    return Reply({"commands": {x.name: x.usage for x in COMMANDS.values()}}, lines)


@command("exit", log="no")
def _exit(c: Context, a: Arguments) -> Reply:
    """Leave; Ctrl-D does too."""
    return Reply({}, ["Goodbye!"], leave=True)


COMMANDS["quit"] = replace(COMMANDS["exit"], name="quit")


def find(name: str) -> Command:
    """The command of a name.

    Raises:
        TransferError: there is none.
    """
    if name.lower() not in COMMANDS:
        hint = suggestion(name.lower(), COMMANDS) or "; help lists them"
        raise TransferError(f"Unknown command: {name:.40}{hint}")
    return COMMANDS[name.lower()]


def read_script(path: str) -> list[str]:
    """Lines of a file.

    Raises:
        CheckpointError: it cannot be read.
        TransferError: it is no text.
    """
    data = read_file(user_path(path), _MAX_SCRIPT, follow_links=True)
    try:
        return data.decode("utf-8").splitlines()
    except UnicodeDecodeError:
        raise TransferError(f"{path}: cannot be read: it is no text") from None


def _quoted(texts: list[str]) -> str:
    return ", ".join(map(repr, texts))


def _number(name: str, text: str) -> float:
    with _value(name, text, "a number"):
        return float(text)


@contextmanager
def _value(name: str, text: str, what: str) -> Iterator[None]:
    try:
        yield
    except ValueError:
        raise TransferError(f"{name} must be {what}, not {shown(text)}") from None


def _setting(c: Context, key: str, value: str) -> dict[str, Any]:
    kinds: dict[str, Any] = {f.name: type(f.default) for f in fields(c.session.state.settings)}
    if key not in kinds:
        hint = suggestion(key, kinds) or f"; there are {', '.join(kinds)}"
        raise TransferError(f"no setting is called {shown(key)}{hint}")
    what = "a whole number" if kinds[key] is int else "a number"
    with _value(key, value, what):
        return {key: kinds[key](value)}


def _sampling(c: Context, a: Arguments) -> Sampling:
    changes: dict[str, Any] = {}
    for option, key in SAMPLING.items():
        if option[1:] in a.options:
            changes.update(_setting(c, key, a.options[option[1:]]))
    return replace(c.session.state.settings, **changes)


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


def _made(name: str, found: Modulation, formula: str) -> Reply:
    data = {
        "name": name,
        "formula": formula,
        "ranks": found.terms,
        "magnitudes": {str(n): found.magnitude(n) for n in sorted(found.layers)},
    }
    lines = [f"✓ Created modulation '{name}' = {formula} (exact, on dW)", *views.magnitudes(found)]
    return Reply(data, lines, changed=[name])


def _injected(c: Context, a: Arguments, base: Base, factor: str, *, unused: str) -> Reply:
    from npt_fast.config import InjectionMode, InjectionTime

    modes: dict[str, InjectionMode] = {mode: mode for mode in get_args(InjectionMode)}
    times: dict[str, InjectionTime] = {when: when for when in get_args(InjectionTime)}
    mode = modes[f"exact-{base}" if "exact" in a.options else base]
    when = a.options.get("when", "prefill")
    if when not in times:
        raise TransferError(f"-when must be one of {', '.join(times)}, not {shown(when)}")
    strength = _number(f"-{factor}", a.options.get(factor, "1"))
    found = c.session.inject(
        a["NAME"], a["TEXT"], position=a.options.get("pos", "-1"), mode=mode, strength=strength,
        when=times[when], sampling=(sampling := _sampling(c, a)),
    )  # fmt: skip
    how = f"{mode}, {factor} {strength:g}, {when}, {sampling.strategy}"
    if sampling.strategy != "greedy":
        how += f", temperature {sampling.temperature:g}, seed {sampling.seed}"
    lines = views.injection(a["NAME"], found, how, times[when])
    if unused in a.options:
        lines.insert(0, f"Warning: -{unused} has no meaning for {base}; -{factor} has")
    data = {
        "name": a["NAME"],
        "mode": mode,
        "strength": strength,
        "when": when,
        **asdict(found.comparison),
        "left_out": found.left_out,
        "no_effect": found.no_effect,
    }
    return Reply(data, lines)
