"""The loop of ``npt-fast interact``: it reads lines, writes replies and keeps a log."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from npt_fast.cli.shell.command import Context, Reply
from npt_fast.cli.shell.commands import find
from npt_fast.errors import NPTError, TransferError, printable
from npt_fast.schema import finite

if TYPE_CHECKING:
    from npt_fast.transfer.journal import Journal

_DEEPEST = 8  # levels of scripts that run scripts


class Output(Protocol):
    """Where replies, errors and notes go."""

    def reply(self, line: str, data: dict[str, Any], lines: Sequence[str]) -> None:
        """Show the reply of a command."""

    def error(self, line: str, message: str, where: str) -> None:
        """Show that a command failed; `where` is its place in a script."""

    def note(self, line: str) -> None:
        """Show a line that is no reply."""


class PlainOutput:
    """Plain lines without colour; errors go to stderr."""

    def reply(self, line: str, data: dict[str, Any], lines: Sequence[str]) -> None:
        print(*map(printable, lines), sep="\n", flush=True)

    def error(self, line: str, message: str, where: str) -> None:
        print(f"Error: {where}{message}", file=sys.stderr, flush=True)

    def note(self, line: str) -> None:
        print(printable(line), flush=True)


class JsonOutput:
    """One JSON object per command; notes go to stderr."""

    def reply(self, line: str, data: dict[str, Any], lines: Sequence[str]) -> None:
        self._write({"command": line, "ok": True, "result": data})

    def error(self, line: str, message: str, where: str) -> None:
        self._write({"command": line, "ok": False, "error": f"{where}{message}"})

    def note(self, line: str) -> None:
        print(printable(line), file=sys.stderr, flush=True)

    def _write(self, value: dict[str, Any]) -> None:
        # flushed: a program that reads the replies waits for each
        print(json.dumps(value, ensure_ascii=False, allow_nan=False), flush=True)


class Shell:
    """Runs lines.

    Args:
        context: What commands work on.
        output: Where replies go.
        journal: The log, or None.
        keep_going: Whether scripts continue after a line has failed.

    Attributes:
        left: Whether ``exit`` was given.
        failed: Whether a line has failed.
    """

    def __init__(
        self,
        context: Context,
        output: Output,
        journal: Journal | None = None,
        *,
        keep_going: bool = False,
    ) -> None:
        self.context = context
        self.output = output
        self.journal = journal
        self.keep_going = keep_going
        self.left = False
        self.failed = False

    def run_lines(self, lines: Iterable[str], *, where: str = "", depth: int = 0) -> bool:
        """Run the lines of a script or of stdin, up to the first failure; True if all succeeded."""
        good = True
        for number, line in enumerate(lines, 1):
            if not self.run_line(line, where=f"{where}line {number}: ", depth=depth):
                good = False
                if not self.keep_going:
                    break
            if self.left:
                break
        return good

    def run_line(self, line: str, *, where: str = "", depth: int = 0) -> bool:
        """Run one line; True if it succeeded."""
        line = bare(line)
        if not line:
            return True
        self.context.history.append(line)
        reply, entry = outcome(self.context, line)
        if self.journal is not None and logged(line):
            self._log(self.journal, entry, where)
        if reply is None:
            self.failed = True
            self.output.error(line, entry["error"], where)
            return False
        self.output.reply(line, entry["result"], reply.lines)
        self.left = self.left or reply.leave
        if reply.script is None:
            return True
        if depth == _DEEPEST:
            self.failed = True
            self.output.error(line, f"scripts run each other more than {_DEEPEST} deep", "")
            return False
        return self.run_lines(reply.script, where=f"{where}{line}, ", depth=depth + 1)

    def _log(self, journal: Journal, entry: dict[str, Any], where: str) -> None:
        """Log a line, or give up the log: losing it must not cost the session and its shelf."""
        try:
            journal.write(entry)
        except NPTError as error:
            self.journal = None
            self.failed = True
            self.output.error(entry["command"], f"{error}; the session is no longer logged", where)


def bare(line: str) -> str:
    """The line without spaces around it and a leading slash or !; empty for a comment."""
    line = line.strip()
    if line.startswith(("/", "!")):
        line = line[1:].lstrip()
    return "" if line.startswith("#") else line


def outcome(context: Context, line: str) -> tuple[Reply | None, dict[str, Any]]:
    """Run a line: its reply, or None if it failed, and its entry for the log."""
    entry: dict[str, Any] = {"command": line, "seed": context.session.state.settings.seed}
    name, _, rest = line.partition(" ")
    try:
        command = find(name)
        reply = command.run(context, command.parse(rest))
        digests = context.session.digests(reply.changed)
        # as it reads from a log: tuples are lists, keys are text; a replay compares both
        result = json.loads(json.dumps(finite(reply.data)))
    except NPTError as error:
        return None, {**entry, "error": str(error)}
    except Exception as error:  # a bug must not cost the user the shelf
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        return None, {**entry, "error": printable(f"unexpected {problem:.300}; please report it")}
    return reply, {**entry, "digests": digests, "result": result}


def logged(line: str) -> bool:
    """Whether a line belongs in the log; an unknown command does."""
    try:
        return find(line.split(" ", 1)[0]).log != "never"
    except TransferError:
        return True
