"""``npt-fast`` and ``python -m npt_fast``: the program, which answers Ctrl-C from the start."""

from __future__ import annotations

import atexit
import gc
import os
import sys

# What is imported stays, and to search all of it for garbage again and again takes 0.8 of the 3.9 s
# that `npt-fast train` needs for its imports. Young objects are searched as ever.
gc.set_threshold(*gc.get_threshold()[:2], 100)


def main() -> None:
    """Run `npt_fast.cli.main.main`, whose imports take a fifth of a second."""
    code: object = 1  # that of a traceback

    def leave() -> None:
        """End without taking down all modules, which takes a second once torch is among them."""
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else code is not None)

    if not atexit._ncallbacks():  # what was registered before it, say by a profiler, would be lost
        atexit.register(leave)
    try:
        from npt_fast.cli.main import let_signals_end_us
        from npt_fast.cli.main import main as program

        try:
            program()
        except SystemExit as end:
            code = end.code
            raise
        finally:
            let_signals_end_us()
    except KeyboardInterrupt:  # before the program handles it
        os.write(2, b"Error: interrupted; nothing was left behind\n")
        os._exit(130)  # a normal exit could be interrupted too


if __name__ == "__main__":
    main()
