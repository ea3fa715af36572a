"""What a command of the shell is: arguments in, a reply out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from npt_fast.cli.shell.line import Arguments, parse
from npt_fast.errors import TransferError, suggestion
from npt_fast.schema import shown

if TYPE_CHECKING:
    from npt_fast.transfer.session import Session

Log = Literal["replayed", "recorded", "never"]
"""What the log does with a command: record and replay it, record it only, or neither."""


@dataclass
class Context:
    """What commands work on.

    Attributes:
        session: The model, the shelf and the settings.
        history: Lines given so far, each recorded before it runs.
    """

    session: Session
    history: list[str] = field(default_factory=list)


@dataclass
class Reply:
    """What a command answers.

    Attributes:
        data: The result, as JSON.
        lines: The result, as lines for people.
        changed: Names of modulations that are new on the shelf.
        script: Lines to run next.
        leave: Whether the shell ends.
    """

    data: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    script: list[str] | None = None
    leave: bool = False


Function = Callable[[Context, Arguments], Reply]


@dataclass(frozen=True)
class Command:
    """A command: how it is written, and the function that runs it.

    Attributes:
        name: First word of a line.
        kinds: Kinds of its arguments, see `npt_fast.cli.shell.line.parse`.
        options: Options that take a value.
        flags: Options that take none.
        help: One line of help.
        run: Function that runs it.
        log: ``"replayed"``; ``"recorded"``: logged but not replayed, since it writes files;
            ``"never"``: not logged.
    """

    name: str
    kinds: tuple[str, ...]
    options: tuple[str, ...]
    flags: tuple[str, ...]
    help: str
    run: Function
    log: Log = "replayed"

    @property
    def usage(self) -> str:
        """How the command is written, for help and messages."""
        text = "NEW = EXPRESSION" if self.kinds == ("REST",) else " ".join(self.kinds)
        options = [f"[{option} X]" for option in self.options] + [f"[{f}]" for f in self.flags]
        return " ".join(part for part in (self.name, text, *options) if part)

    def parse(self, rest: str) -> Arguments:
        """Parse a line without its first word."""
        return parse(rest, self.usage, self.kinds, self.options, self.flags)


class Commands(dict[str, Command]):
    """Commands by name, in the order in which help lists them."""

    def command(
        self,
        name: str,
        kinds: str = "",
        *,
        options: tuple[str, ...] = (),
        flags: tuple[str, ...] = (),
        log: Log = "replayed",
    ) -> Callable[[Function], Function]:
        """Register a function; the first line of its docstring is the help."""

        def register(function: Function) -> Function:
            text = (function.__doc__ or "").splitlines()[0]
            self[name] = Command(name, tuple(kinds.split()), options, flags, text, function, log)
            return function

        return register


_FLAGS = ("false", "true")


def number(name: str, text: str) -> float:
    """Parse a number.

    Raises:
        TransferError: `text` is not a number; the message names `name`.
    """
    with _value(name, text, "a number"):
        return float(text)


def setting(c: Context, key: str, value: str) -> dict[str, Any]:
    """Parse a setting.

    Raises:
        TransferError: there is no setting `key`, or `value` has another type.
    """
    known = settings(c)
    if key not in known:
        hint = suggestion(key, known) or f"; there are {', '.join(known)}"
        raise TransferError(f"no setting is called {shown(key)}{hint}")
    kind = type(known[key])
    what = {int: "a whole number", bool: "true or false"}.get(kind, "a number")
    with _value(key, value, what):
        return {key: _FLAGS.index(value.lower()) == 1 if kind is bool else kind(value)}


def settings(c: Context) -> dict[str, Any]:
    """All settings: the fields of `Sampling` and of `Reading`."""
    return asdict(c.session.state.settings) | asdict(c.session.state.reading)


@contextmanager
def _value(name: str, text: str, what: str) -> Iterator[None]:
    try:
        yield
    except ValueError:
        raise TransferError(f"{name} must be {what}, not {shown(text)}") from None
