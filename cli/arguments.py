"""Kinds of arguments that several verbs take."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from npt_fast.paths import expand


def _check(kind: object, text: str | None) -> None:
    if text is not None:
        expand(text)


PathText = Annotated[str, Parameter(validator=_check)]
"""A path: what is none is a usage error, before anything is loaded. As text, since ``Path("")`` is
the current directory."""
