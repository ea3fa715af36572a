"""``npt-fast`` and ``python -m npt_fast``: the program, which answers Ctrl-C from the start."""

from __future__ import annotations

import os


def main() -> None:
    """Run `npt_fast.cli.main.main`, whose imports take a fifth of a second."""
    try:
        from npt_fast.cli.main import let_signals_end_us
        from npt_fast.cli.main import main as program

        try:
            program()
        finally:
            let_signals_end_us()
    except KeyboardInterrupt:  # before the program handles it
        os.write(2, b"Error: interrupted; nothing was left behind\n")
        os._exit(130)  # a normal exit could be interrupted too


if __name__ == "__main__":
    main()
