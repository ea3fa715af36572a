"""What the scripts of the original's names run (``scripts/``)."""

from __future__ import annotations

import shlex
import sys

from npt_fast.__main__ import main


def run(verb: str) -> None:
    """Run a verb with the options that this process was given, and exit with its code."""
    sys.argv[1:] = [verb, *sys.argv[1:]]
    print(f"$ npt-fast {shlex.join(sys.argv[1:])}", file=sys.stderr, flush=True)
    main()
