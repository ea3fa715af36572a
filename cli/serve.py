"""``npt-fast serve``"""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from npt_fast.paths import expand


def _check_model(kind: object, text: str) -> None:
    if text.startswith("-"):
        raise ValueError(f"the model comes first: npt-fast serve MODEL {text} ...")
    expand(text)


def serve(
    model: Annotated[str, Parameter(allow_leading_hyphen=True, validator=_check_model)],
    /,
    *options: Annotated[str, Parameter(allow_leading_hyphen=True, show=False)],
) -> None:
    """Serve an exported model over HTTP with vLLM.

    npt-fast serve served --port 8000 --tensor-parallel-size 2

    All options go to vllm serve, which lists them with --help=all.

    Parameters
    ----------
    model
        Folder that npt-fast export has written, or its Hub id.
    """
    from npt_fast.vllm.server import serve as become_server

    become_server(model, options)
