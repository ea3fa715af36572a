"""Commands on command lines: run those of a file, show those given so far."""

from __future__ import annotations

from npt_fast.checkpoint.source_file import read_file
from npt_fast.cli.shell.command import Commands, Context, Reply
from npt_fast.cli.shell.line import Arguments
from npt_fast.errors import TransferError
from npt_fast.paths import user_path

_HISTORY = 20
_MAX_SCRIPT = 4 << 20  # bytes

COMMANDS = Commands()


@COMMANDS.command("run", "FILE", log="never")
def _run(c: Context, a: Arguments) -> Reply:
    """Run the commands in a file."""
    lines = read_script(a["FILE"])
    return Reply({"lines": len(lines)}, [f"Running {a['FILE']}"], script=lines)


@COMMANDS.command("history", log="never")
def _history(c: Context, a: Arguments) -> Reply:
    """Show the last 20 commands."""
    start = max(len(c.history) - _HISTORY, 0)
    recent = c.history[start:]
    lines = [f"  {number}. {line}" for number, line in enumerate(recent, start + 1)]
    return Reply({"history": recent}, lines)


@COMMANDS.command("clear-history", log="never")
def _clear_history(c: Context, a: Arguments) -> Reply:
    """Forget the history."""
    c.history.clear()
    return Reply({}, ["✓ History cleared"])


def read_script(path: str) -> list[str]:
    """Read the lines of a script.

    Raises:
        CheckpointError: it cannot be read.
        TransferError: it is not text.
    """
    data = read_file(user_path(path), _MAX_SCRIPT, follow_links=True)
    try:
        return data.decode("utf-8").splitlines()
    except UnicodeDecodeError:
        raise TransferError(f"{path}: cannot be read: it is not text") from None
