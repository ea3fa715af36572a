"""A script that runs ``npt-fast``, and says of each file that it opens which code did so first.

The file that LOG in the environment names gets a line for each: path, tab, source file.
"""

from __future__ import annotations

import os
import sys

from npt_fast.__main__ import main

_log = os.open(os.environ["LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
_seen = set()


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open" and isinstance(arguments[0], str | os.PathLike):
        path = os.path.abspath(arguments[0])
        if path not in _seen:
            _seen.add(path)
            os.write(_log, f"{path}\t{sys._getframe(1).f_code.co_filename}\n".encode())


sys.addaudithook(_hook)
main()
