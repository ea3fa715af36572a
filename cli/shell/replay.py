"""Run a log again and compare the results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from npt_fast.cli.shell.commands import find
from npt_fast.cli.shell.loop import Shell, outcome
from npt_fast.errors import TransferError, VerificationError


def replay(
    shell: Shell, path: str, header: dict[str, Any], entries: Sequence[dict[str, Any]]
) -> str:
    """Run a log again and compare the results with it.

    Returns:
        A line that says what was compared.

    Raises:
        VerificationError: the first difference; the rest is not run.
    """
    from npt_fast.transfer.journal import TOLERANCE, difference

    def differs(what: str, problem: str) -> VerificationError:
        return VerificationError(f"{path}: {what} differs from the record", [problem])

    now = shell.context.session.description()
    # the same model may lie elsewhere now, and its fingerprint need not be known
    base = {k: v for k, v in header.get("base", {}).items() if k != "name" and k in now["base"]}
    before = {**header, "base": now["base"] | base}
    for key in ("base", "dtype", "layers", "weights"):
        if problem := difference(before.get(key), now[key], key):
            raise differs("the model", problem)
    done = equal = kept = 0
    for number, entry in enumerate(entries, 1):
        line = entry["command"]
        if _writes(line):
            shell.output.note(f"Not run again, since it writes files: {line}")
            continue
        reply, found = outcome(shell.context, line)
        if reply is None:
            shell.output.error(line, found["error"], "")
        else:
            shell.output.reply(line, found["result"], reply.lines)
        recorded = {key: entry[key] for key in ("seed", "result", "error") if key in entry}
        again = {key: found[key] for key in ("seed", "result", "error") if key in found}
        if problem := difference(recorded, again, "entry"):
            raise differs(f"entry {number} ({line})", problem)
        done += 1
        noted, after = entry.get("digests") or {}, found.get("digests", {})
        kept += len(after)
        equal += sum(noted.get(name) == value for name, value in after.items())
    return (
        f"✓ Replayed {done} commands of {path}: results are equal (texts exactly, numbers within "
        f"{TOLERANCE:g}; {equal} of {kept} modulations bit for bit)"
    )


def _writes(line: str) -> bool:
    try:
        return find(line.split(" ", 1)[0]).log == "recorded"
    except TransferError:
        return False
