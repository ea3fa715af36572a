"""Commands that continue a text with and without a modulation."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from npt_fast.cli.shell import views
from npt_fast.cli.shell.command import Commands, Context, Reply, number, setting
from npt_fast.cli.shell.line import Arguments
from npt_fast.config import Injection, InjectionMode, InjectionTime
from npt_fast.errors import TransferError
from npt_fast.schema import shown

if TYPE_CHECKING:
    from npt_fast.transfer.generate import Sampling

CommandMode = Literal["replace", "blend", "add"]
"""The mode in a command's name; -exact turns blend into exact-blend and add into exact-add."""

_SAMPLING = {
    "-tokens": "tokens",
    "-temp": "temperature",
    "-strategy": "strategy",
    "-top_k": "top_k",
    "-top_p": "top_p",
}
_INJECTION = ("-pos", "-when", "-alpha", "-strength", *_SAMPLING)

COMMANDS = Commands()


@COMMANDS.command("test", "TEXT", options=tuple(_SAMPLING))
def _test(c: Context, a: Arguments) -> Reply:
    """Continue a text with nothing injected."""
    found = c.session.predict(a["TEXT"], _sampling(c, a))
    return Reply(asdict(found), views.prediction(found))


@COMMANDS.command("inject", "NAME TEXT", options=_INJECTION)
def _inject(c: Context, a: Arguments) -> Reply:
    """Continue a text with the modulation in place of the last token's own."""
    return _injected(c, a, "replace", "strength", unused="alpha")


@COMMANDS.command("inject-blend", "NAME TEXT", options=_INJECTION, flags=("-exact",))
def _inject_blend(c: Context, a: Arguments) -> Reply:
    """Continue a text with both mixed: alpha v_source + (1 - alpha) v; -exact: mix dW."""
    return _injected(c, a, "blend", "alpha", unused="strength")


@COMMANDS.command("inject-add", "NAME TEXT", options=_INJECTION, flags=("-exact",))
def _inject_add(c: Context, a: Arguments) -> Reply:
    """Continue a text with the modulation added: v + strength v_source; -exact: add dW."""
    return _injected(c, a, "add", "strength", unused="alpha")


@COMMANDS.command("compare", "NAME TEXT", options=("-pos",))
def _compare(c: Context, a: Arguments) -> Reply:
    """Show the likeliest next tokens without and with the modulation, side by side."""
    sampling = replace(c.session.state.settings, tokens=1)
    found = c.session.inject(
        a["NAME"], a["TEXT"], Injection(position=a.options.get("pos", "-1")), sampling
    )
    lines = views.comparison(a["NAME"], found.comparison) + views.left_out(found.left_out)
    return Reply({**asdict(found.comparison), "left_out": found.left_out}, lines)


@COMMANDS.command("sweep", "NAME TEXT", options=("-pos", "-strength"))
def _sweep(c: Context, a: Arguments) -> Reply:
    """Inject into each layer alone and into all, at several strengths (-strength 0.5,1,2)."""
    given = a.options.get("strength", "0.25,0.5,1,2").split(",")
    strengths = [number("-strength", text) for text in given]
    found = c.session.sweep(
        a["NAME"], a["TEXT"], Injection(position=a.options.get("pos", "-1")), strengths
    )
    return Reply(asdict(found), views.sweep(found))


def _sampling(c: Context, a: Arguments) -> Sampling:
    changes: dict[str, Any] = {}
    for option, key in _SAMPLING.items():
        if option[1:] in a.options:
            changes.update(setting(c, key, a.options[option[1:]]))
    return replace(c.session.state.settings, **changes)


def _injected(c: Context, a: Arguments, named: CommandMode, factor: str, *, unused: str) -> Reply:
    modes: dict[str, InjectionMode] = {mode: mode for mode in get_args(InjectionMode)}
    times: dict[str, InjectionTime] = {when: when for when in get_args(InjectionTime)}
    mode = modes[f"exact-{named}" if "exact" in a.options else named]
    when = a.options.get("when", "prefill")
    if when not in times:
        raise TransferError(f"-when must be one of {', '.join(times)}, not {shown(when)}")
    strength = number(f"-{factor}", a.options.get(factor, "1"))
    injection = Injection(
        position=a.options.get("pos", "-1"), mode=mode, strength=strength, when=times[when]
    )
    found = c.session.inject(
        a["NAME"], a["TEXT"], injection, sampling=(sampling := _sampling(c, a))
    )
    how = f"{mode}, {factor} {strength:g}, {when}, {sampling.strategy}"
    if sampling.strategy != "greedy":
        how += f", temperature {sampling.temperature:g}, seed {sampling.seed}"
    lines = views.injection(a["NAME"], found, how, times[when])
    if unused in a.options:
        lines.insert(0, f"Warning: -{unused} has no effect on {named}; use -{factor}")
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
