"""All commands of the shell. Each maps arguments to a call of the session, and results to lines."""

from __future__ import annotations

from dataclasses import replace

from npt_fast.cli.shell.command import Command, Commands, Context, Reply
from npt_fast.cli.shell.commands import injections, modulations, scripts, session, tokens
from npt_fast.cli.shell.line import Arguments
from npt_fast.errors import TransferError, suggestion

COMMANDS = Commands()
# in this order help lists them
for _group in (tokens, modulations, injections, session, scripts):
    COMMANDS |= _group.COMMANDS


@COMMANDS.command("help", "[COMMAND]", log="never")
def _help(c: Context, a: Arguments) -> Reply:
    """List all commands, or explain one."""
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


@COMMANDS.command("exit", log="never")
def _exit(c: Context, a: Arguments) -> Reply:
    """Leave the shell; Ctrl-D does too."""
    return Reply({}, ["Goodbye!"], leave=True)


COMMANDS["quit"] = replace(COMMANDS["exit"], name="quit")


def find(name: str) -> Command:
    """Find a command by name, in either case.

    Raises:
        TransferError: no command has this name.
    """
    if name.lower() not in COMMANDS:
        hint = suggestion(name.lower(), COMMANDS) or "; help lists them"
        raise TransferError(f"Unknown command: {name:.40}{hint}")
    return COMMANDS[name.lower()]
