"""``npt-fast serve``"""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from npt_fast.cli.arguments import PathText


def serve(
    model: PathText,
    /,
    *options: Annotated[str, Parameter(allow_leading_hyphen=True, show=False)],
) -> None:
    """Serve an exported model over HTTP with vLLM.

    npt-fast serve served --port 8000 --tensor-parallel-size 2

    All other options go to vllm serve. vllm serve --help=all lists them.

    Parameters
    ----------
    model
        Folder that npt-fast export has written, or its Hub id.
    """
    from npt_fast.vllm.server import serve as become_server

    become_server(model, options)
