"""``npt-fast push``, and ``--push_to_hub`` of the verbs that write checkpoints"""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Annotated

from cyclopts import Parameter

import npt_fast as npt
from npt_fast.cli.arguments import CheckpointText, HubRepo
from npt_fast.cli.output import note, print_json, progress_bar, say, size
from npt_fast.errors import HubError


def push(
    checkpoint: CheckpointText,
    repo: Annotated[HubRepo, Parameter(name="--repo")],
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    json: bool = False,
) -> None:
    """Verify a checkpoint or an export, and push it to the Hub with a model card, as one commit.

    npt-fast push experiments/merged_11_13 me/llama-np-11-13 --private

    Parameters
    ----------
    checkpoint
        Checkpoint directory, or a folder that export wrote.
    repo
        Repository on the Hub, which is made if there is none. A checkpoint that it holds is
        replaced.
    private
        Make a new repository private; if not given, it is as the account has it.
    revision
        Branch to push to, which is made if there is none.
    message
        Message of the commit.
    json
        Print what was pushed as JSON.
    """
    with progress_bar() as progress:
        report = npt.push(
            checkpoint,
            repo,
            private=private or None,
            revision=revision,
            commit_message=message,
            progress=progress,
        )
    if json:
        print_json(report.to_dict())
        return
    say(f"Pushed {len(report.files)} files, {size(sum(report.files.values()))}: {report.url}")
    for name in report.removed:
        say(f"Removed {name} of the checkpoint before")
    say(f"Load it with: {report.checkpoint}")


def check_push(repo: str | None) -> None:
    """Say now, not after hours of work, if nothing can be pushed; None asks for nothing."""
    if repo is not None:
        from npt_fast.hf import push as library

        library.check_push(repo)


def push_written(checkpoint: str | Path, repo: str | None) -> None:
    """Push what a verb has written and reported, and say so on stderr; None asks for nothing."""
    if repo is None:
        return
    try:
        note(f"Pushed to the Hub: {npt.push(checkpoint, repo).checkpoint}")
    except HubError as error:
        again = f"npt-fast push {quote(str(checkpoint))} {repo}"
        raise HubError(f"{error}; {checkpoint} is written, push it later: {again}") from None
