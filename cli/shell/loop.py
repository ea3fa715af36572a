"""The loop of ``npt-fast interact``: lines in, answers out, a log beside it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from npt_fast.cli.output import finite
from npt_fast.cli.shell.command import Context, Reply
from npt_fast.cli.shell.commands import find
from npt_fast.errors import NPTError, TransferError, printable

if TYPE_CHECKING:
    from npt_fast.transfer.journal import Journal

_DEEPEST = 8  # scripts that run scripts


class Output(Protocol):
    """Where answers go."""

    def reply(self, line: str, data: dict[str, Any], lines: Sequence[str]) -> None:
        """A command has answered."""

    def error(self, line: str, message: str, where: str) -> None:
        """A command has failed; `where` is the place in a script."""

    def note(self, line: str) -> None:
        """Something besides."""


class PlainOutput:
    """Lines without colour; errors go to stderr."""

    def reply(self, line: str, data: dict[str, Any], lines: Sequence[str]) -> None:
        print(*map(printable, lines), sep="\n", flush=True)

    def error(self, line: str, message: str, where: str) -> None:
        print(f"Error: {where}{message}", file=sys.stderr, flush=True)

    def note(self, line: str) -> None:
        print(printable(line), flush=True)


class JsonOutput:
    """One object per command."""

    def reply(self, line: str, data: dict[str, Any], lines: Sequence[str]) -> None:
        self._write({"command": line, "ok": True, "result": data})

    def error(self, line: str, message: str, where: str) -> None:
        self._write({"command": line, "ok": False, "error": f"{where}{message}"})

    def note(self, line: str) -> None:
        print(printable(line), file=sys.stderr, flush=True)

    def _write(self, value: dict[str, Any]) -> None:
        print(json.dumps(value, ensure_ascii=False, allow_nan=False), flush=True)


class Shell:
    """Carries out lines.

    Args:
        context: what commands work on.
        output: where answers go.
        journal: the log, if there is one.
        keep_going: whether scripts go on after a line that has failed.

    Attributes:
        left: whether ``exit`` was given.
        failed: whether a line has failed.
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
        """Lines of a script or of stdin, up to the first that fails; whether all went well."""
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
        """One line; whether it went well."""
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
            self.output.error(line, f"scripts that run each other {_DEEPEST} deep", "")
            return False
        return self.run_lines(reply.script, where=f"{where}{line}, ", depth=depth + 1)

    def _log(self, journal: Journal, entry: dict[str, Any], where: str) -> None:
        """The shelf is worth more than the log: the session goes on without it."""
        try:
            journal.write(entry)
        except NPTError as error:
            self.journal = None
            self.failed = True
            self.output.error(
                entry["command"], f"{error}; the session is not logged any more", where
            )


def bare(line: str) -> str:
    """A line without what is ignored: spaces around, a slash or ! before, a comment."""
    line = line.strip()
    if line.startswith(("/", "!")):
        line = line[1:].lstrip()
    return "" if line.startswith("#") else line


def outcome(context: Context, line: str) -> tuple[Reply | None, dict[str, Any]]:
    """Carry out a line: the reply, None if it failed, and an entry for the log."""
    entry: dict[str, Any] = {"command": line, "seed": context.session.state.settings.seed}
    name, _, rest = line.partition(" ")
    try:
        command = find(name)
        reply = command.run(context, command.parse(rest))
        digests = context.session.digests(reply.changed)
        result = json.loads(json.dumps(finite(reply.data)))
    except NPTError as error:
        return None, {**entry, "error": str(error)}
    except Exception as error:  # the shell lives on, with all that is on its shelf
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        return None, {**entry, "error": printable(f"unexpected {problem:.300}; please report it")}
    return reply, {**entry, "digests": digests, "result": result}


def logged(line: str) -> bool:
    """Whether a line belongs into the log; what is no command does."""
    try:
        return find(line.split(" ", 1)[0]).log != "never"
    except TransferError:
        return True
