"""An installation without extras, in a process of its own: what extras bring cannot be found."""

from __future__ import annotations

import json
import os
import subprocess

from npt_fast.errors import EXTRAS
from tests.processes import run_python

_HIDE = f"""
import sys
from importlib.machinery import PathFinder
hidden = {sorted(EXTRAS)}
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: (
    None if name.partition(".")[0] in hidden else find(name, *rest)
)
"""


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `code` on a core install."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    return run_python(_HIDE + code, *arguments, environment=environment)


def program(*lines: list[str]) -> list[tuple[int, str, str]]:
    """Run verbs one after the other: exit code, stdout and stderr of each."""
    code = """
import contextlib, io, json
from npt_fast.cli.main import main
found = []
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as stop:
            found.append([stop.code, out.getvalue(), err.getvalue()])
print(json.dumps(found))
"""
    result = python(code, json.dumps(lines))
    assert result.returncode == 0, result.stderr
    return [(code, out, err) for code, out, err in json.loads(result.stdout)]
