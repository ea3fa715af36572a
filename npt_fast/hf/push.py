"""Push a checkpoint, or an export, to the Hugging Face Hub as one commit."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from npt_fast.arguments import check_arguments
from npt_fast.checkpoint import strict_json
from npt_fast.checkpoint.checkpoint import Checkpoint, open_checkpoint
from npt_fast.checkpoint.own_files import CONFIG, is_checkpoint_file
from npt_fast.checkpoint.plan import description_of, plan_merge
from npt_fast.checkpoint.source_file import SourceFile
from npt_fast.checkpoint.tensor_source import WHOLE_MODEL
from npt_fast.checkpoint.verify import verify
from npt_fast.checkpoint.whole_model import NPT
from npt_fast.config import MergeOptions, Progress
from npt_fast.errors import CheckpointError, HubError, ModelError, VerificationError
from npt_fast.hf.base_folder import base_weights, is_taken
from npt_fast.hf.exported import Exported, base_type
from npt_fast.hf.model_card import MODEL_CARD, checkpoint_card, exported_card
from npt_fast.hf.model_folder import SMALL_FILES
from npt_fast.hub import LOG_IN, HubName, hub_errors, parse_name
from npt_fast.paths import exists

_JSON = {*SMALL_FILES, "tokenizer.json", "vocab.json", "chat_template.json"}


@dataclass(frozen=True, slots=True)
class PushReport:
    """What was pushed.

    Attributes:
        checkpoint: name by which it is loaded, ``hf://org/repo@commit``.
        url: page of the commit.
        files: size in bytes of each file of the checkpoint, by name.
        removed: names of files of an earlier checkpoint in the repository that the commit removed.
    """

    checkpoint: str
    url: str
    files: dict[str, int]
    removed: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


@check_arguments
def push(
    checkpoint: str | Path,
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    progress: Progress | None = None,
) -> PushReport:
    """Verify a checkpoint, and push it to the Hub with a model card, as one commit.

    The checkpoint takes the place of one that the repository holds. Only its own files are pushed;
    of an export, those of its base model too.

    Args:
        checkpoint: checkpoint directory, or a folder that `npt_fast.export` wrote.
        repo: repository, ``"org/repo"``, which is made if there is none.
        private: whether a new repository is private; if not given, as the account has it.
        revision: branch to push to, which is made if there is none; the default branch if not
            given.
        token: access token; if not given, ``HF_TOKEN`` or that of the last login.
        commit_message: message of the commit.
        progress: called while the checkpoint is verified, with the name of the activity, bytes done
            and bytes in all.

    Raises:
        CheckpointError: there is no checkpoint, or a file cannot be read.
        HubError: `repo` is no name of a repository or holds a whole model, nobody is logged in, or
            the Hub refuses the checkpoint or cannot be reached. Nothing is committed then.
        ModelError: an export names a base model on this machine.
        VerificationError: the checkpoint is damaged.
    """
    name = check_push(repo, revision, token)
    opened = open_checkpoint(checkpoint)
    report = verify(opened.path, progress=progress)
    if not report.passed:
        raise VerificationError(f"{opened.given}: not pushed", report.problems)
    files, card = _contents(opened, name)
    sizes = {file.name: SourceFile.of(file).size for file in files}
    with hub_errors(name):
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

        api = HfApi(token=token)
        api.create_repo(name.repo, private=private, exist_ok=True)
        if name.revision is not None:
            api.create_branch(name.repo, branch=name.revision, exist_ok=True)
        before = api.model_info(name.repo, revision=name.revision)
        there = {file.rfilename for file in before.siblings or ()}
        _check_place(name, there, sizes)
        removed = sorted(file for file in there - sizes.keys() if is_checkpoint_file(file))
        commit = api.create_commit(
            name.repo,
            [
                *(CommitOperationAdd(file.name, file) for file in files),
                CommitOperationAdd(MODEL_CARD, card.encode()),
                *(CommitOperationDelete(file) for file in removed),
            ],
            commit_message=commit_message or "Push NP layers with npt_fast",
            revision=name.revision,
            parent_commit=before.sha,  # nobody else's commit is undone
        )
    return PushReport(name.at(commit.oid), commit.commit_url, sizes, removed)


def check_push(repo: str, revision: str | None = None, token: str | None = None) -> HubName:
    """The repository to push to; what is missing is said now, not after hours of work.

    Raises:
        HubError: `repo` is no name of a repository, the Hub is turned off, or nobody is logged in.
    """
    name = parse_name(repo, revision)
    if name is None:
        raise HubError(f"{repo}: is not the name of a repository, org/repo")
    name = name._replace(given=f"hf://{name.repo}")
    with hub_errors(name):
        from huggingface_hub import constants, get_token

        if constants.HF_HUB_OFFLINE:
            raise HubError(f"{name.given}: the Hub is turned off (HF_HUB_OFFLINE)")
        if token is None and get_token() is None:
            raise HubError(f"{name.given}: {LOG_IN} to push to the Hub")
    return name


def _contents(opened: Checkpoint, name: HubName) -> tuple[list[Path], str]:
    """The files to push, and the text of the model card."""
    folder = opened.directory
    if folder is None or opened.weights.path.name in WHOLE_MODEL:
        raise CheckpointError(
            f"{opened.given}: is no folder of a checkpoint; save the NP layers with npt.save"
        )
    files = [file for file in sorted(folder.iterdir()) if is_checkpoint_file(file.name)]
    plan = plan_merge([str(folder)], MergeOptions(weights_only=True, format="safetensors"))
    layers, description = plan.layers, description_of(plan.inputs, plan.layers)
    config = strict_json.read_foreign(folder / CONFIG) if exists(folder / CONFIG) else {}
    if base_type(config) is None:
        return files, checkpoint_card(layers, description, name)
    exported = Exported.parse(config.get(NPT), f"{folder / CONFIG}: {NPT}")
    place = exported.base
    if place is not None and place.folder is not None:
        raise ModelError(
            f"{opened.given}: names the base model in {place.folder}, which only this machine has; "
            "export it without --reference"
        )
    model = base_weights(opened.given, folder) if place is None else []
    small = [file for file in sorted(folder.iterdir()) if _is_small_file(file)]
    card = exported_card(
        layers, exported.description, str(config["model_type"]), place,
        trained_on=description.base_name, name=name,
    )  # fmt: skip
    return [*files, *small, *model], card


def _is_small_file(file: Path) -> bool:
    # any other JSON file may be somebody's notes
    return is_taken(file) and (file.suffix != ".json" or file.name in _JSON)


def _check_place(name: HubName, there: set[str], files: Collection[str]) -> None:
    if there & {*WHOLE_MODEL} and not {*files} & {*WHOLE_MODEL}:
        raise HubError(
            f"{name.given}: holds a whole model, whose config.json a checkpoint would replace; "
            "push to another repository"
        )
