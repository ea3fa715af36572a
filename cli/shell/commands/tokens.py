"""Commands that show tokens, and track the probability of some."""

from __future__ import annotations

from npt_fast.cli.shell.command import Commands, Context, Reply
from npt_fast.cli.shell.line import Arguments
from npt_fast.tables import markdown_table

COMMANDS = Commands()


@COMMANDS.command("track", "[TOKEN...]")
def _track(c: Context, a: Arguments) -> Reply:
    """Track the probability of tokens, or list the tracked ones. Spaces count: " Paris"."""
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
            lines.append(f"Warning: {text!r} is {count} tokens; the first, {piece!r}, is tracked")
    return Reply({"tracked": list(session.state.tracked)}, lines)


@COMMANDS.command("untrack", "TOKEN...")
def _untrack(c: Context, a: Arguments) -> Reply:
    """Stop tracking tokens."""
    before = c.session.state.tracked
    c.session.untrack(a.values["TOKEN"])
    lines = [
        f"✓ Stopped tracking: {text}" if text in before else f"Token not tracked: {text}"
        for text in a.values["TOKEN"]
    ]
    return Reply({"tracked": list(c.session.state.tracked)}, lines)


@COMMANDS.command("clear")
def _clear(c: Context, a: Arguments) -> Reply:
    """Stop tracking all tokens."""
    c.session.untrack(c.session.state.tracked)
    return Reply({"tracked": []}, ["✓ Cleared all tracked tokens"])


@COMMANDS.command("tokens", "TEXT")
def _tokens(c: Context, a: Arguments) -> Reply:
    """Show a text's tokens with their positions and ids."""
    from npt_fast.hf.tokenizer import read

    ids, texts = read(c.session.tokenizer, a["TEXT"], c.session.state.reading)
    count = len(ids)
    rows = [
        [str(n), str(n - count), str(i), repr(t)]
        for n, (i, t) in enumerate(zip(ids, texts, strict=True))
    ]
    table = markdown_table(["Position", "From the end", "Id", "Token"], rows)
    return Reply({"ids": ids, "tokens": texts}, table.splitlines())


def _quoted(texts: list[str]) -> str:
    return ", ".join(map(repr, texts))
