"""Export NP layers and their base model as one folder, which transformers and engines load."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from npt_fast.arguments import check_arguments
from npt_fast.checkpoint import strict_json
from npt_fast.checkpoint.checkpoint import Checkpoint, open_checkpoint, split_selection
from npt_fast.checkpoint.digests import DigestWriter
from npt_fast.checkpoint.layout import BytesFile, CopiedFile
from npt_fast.checkpoint.merge import check_target, prove, require_space, space, write_files
from npt_fast.checkpoint.merge_report import MergeReport, report_of, summary_of
from npt_fast.checkpoint.merge_summary import MERGE_SUMMARY
from npt_fast.checkpoint.plan import MergePlan, description_of, plan_merge
from npt_fast.checkpoint.publish import StagedDirectory, disk_errors
from npt_fast.checkpoint.read_back import read_back, read_back_records
from npt_fast.checkpoint.source_file import SourceFile
from npt_fast.checkpoint.tensor_source import SAFETENSORS_WEIGHTS
from npt_fast.checkpoint.whole_model import NPT
from npt_fast.config import MergeOptions, Progress
from npt_fast.errors import ModelError, OptionError, VerificationError
from npt_fast.hf.base_folder import BaseFolder, open_base, size_names
from npt_fast.hf.exported import BaseReference, Exported, file_sha256
from npt_fast.hf.model_card import MODEL_CARD, exported_card
from npt_fast.hf.model_folder import CONFIG, SMOLLM2
from npt_fast.layer_names import LayerList, chosen_layers
from npt_fast.paths import exists, expand, path_errors, user_path
from npt_fast.schema import is_count

# one file, which an engine opens; the fingerprint of the base model is compared here
_OPTIONS = MergeOptions(
    weights_only=True, format="safetensors", max_shard_size=1 << 62, allow_different_base=True
)
_CONVERTED = "base"  # folder in the hidden one, for the files that a GGUF file becomes


@check_arguments
def export(
    checkpoint: str | Path,
    output: str | Path,
    *,
    model_name: str | None = None,
    layers: LayerList | None = None,
    reference: bool = False,
    hardlink: bool = False,
    verify: bool = False,
    allow_different_base: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Write NP layers and their base model into one folder in the form of Hugging Face.

    ``AutoModelForCausalLM.from_pretrained(output)`` gives the converted model wherever npt_fast is
    imported. The folder is a checkpoint too: `npt_fast.load`, `npt_fast.verify` and merges read its
    NP layers. Nothing is loaded into memory, unless the base model is a GGUF file: its numbers are
    written as float32.

    Args:
        checkpoint: checkpoint directory, weights file or name on the Hub; ``"A:11,13"`` takes only
            these layers.
        output: directory to write; it must not exist, and appears complete or not at all.
        model_name: base model: Hub id, folder, path of a ``.gguf`` file or ``"smollm2-135m"``; if
            not given, the one that the checkpoint records.
        layers: layers to export, as for `npt_fast.load`; all if not given.
        reference: whether to name the base model instead of taking over its weights. A relative
            folder is recorded relative to the output.
        hardlink: whether the base weights become hard links to the base model's files, which must
            be on the same file system. Otherwise they are copied, and share blocks where they can.
        verify: whether to compare every tensor and file with its source before the output appears,
            and to record digests.
        allow_different_base: whether the base model may be another one of the same sizes.
        progress: called with the name of the activity, bytes done and bytes in all.

    Returns:
        The report, as of a merge of one checkpoint; its files include those of the base model.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        MergeError: the output lies in the checkpoint.
        ModelError: the base model is not known, missing or unsafe, does not fit the NP layers, or
            cannot be exported; or the checkpoint lacks one of `layers`; or the output exists or
            cannot be written.
        PathError: a path is not valid.
        StorageError: the disk is full or would become full.
        OptionError: both `reference` and `hardlink` are given.
        VerificationError: the output differs from its sources and was not published.
    """
    if reference and hardlink:
        raise OptionError("a reference has no weights to link: leave out reference or hardlink")
    started = time.monotonic()
    target = user_path(output)
    path, selected = split_selection(expand(checkpoint))
    if selected is not None and layers is not None:
        raise ModelError(f"{expand(checkpoint)}: names layers itself; leave them out, or --layers")
    opened = open_checkpoint(path)
    name = opened.model_name if model_name is None else expand(model_name)
    if name is None:
        raise ModelError(f"{path}: does not record its base model; give it (--model_name)")
    advance = progress or (lambda activity, done, total: None)
    with path_errors(target, ModelError):
        if exists(target):
            raise ModelError(f"{target}: exists already; choose another directory")
        check_target(target, [opened], force=False)
    with disk_errors(target, ModelError), StagedDirectory(target, replace=False) as staged:
        base = _open_base(name, staged, weights=not reference)
        own = _plan(opened, selected, layers, base)
        fingerprint, compared = _fingerprint(opened, base, any_base=allow_different_base)
        made_here = base.folder.parent == staged.path
        linked = base.weights if hardlink or made_here else ()
        copied = [file for file in (*base.small, *base.weights) if file not in linked]
        copies = [CopiedFile(file.name, SourceFile.of(file, follow_links=True)) for file in copied]
        plan = replace(own, files=(*own.files, *copies))
        _, free, needed = space(plan, target)
        require_space(target, needed, free)
        mover = write_files(plan, staged, advance)
        for file in linked:
            _link(file, staged)
            mover.moved["computed" if made_here else "hard link"] += file.stat().st_size
        if verify:
            _compare(copied, staged, target)
        if made_here:
            shutil.rmtree(base.folder)
        written = read_back(staged.path, target)
        digests, proof = prove(own, written, staged, target, advance, verify=verify)
        place = _reference(base, target) if reference else None
        _describe(own, base, place, fingerprint, digests, staged, target)
        read_back_records(staged.path, target)
        staged.publish()
        if proof is not None:
            proof.path = str(target)
    report = report_of(plan, target, mover.moved, free, needed, started, proof=proof)
    if model_name is None:
        report.notes.append(f"the base model is {name}, which {path} records")
    if not compared:
        report.notes.append(
            f"nothing here tells whether the layers were trained on the weights of {name}"
        )
    report.warnings.extend(
        f"{left}: was not removed: nothing proves who left it" for left in staged.left
    )
    return report


def _open_base(name: str, staged: StagedDirectory, *, weights: bool) -> BaseFolder:
    """The base model; a GGUF file is written as a folder in the hidden directory first."""
    if name != SMOLLM2 and not name.endswith(".gguf"):
        return open_base(name, weights=weights)
    if not weights:
        raise ModelError(f"{name}: a GGUF file cannot be a reference; leave out --reference")
    from npt_fast.hf.base_model import load_base_model, save_base_model
    from npt_fast.hf.tokenizer import library_errors

    folder = staged.path / _CONVERTED
    model, tokenizer = load_base_model(name, dtype="float32")
    needed = sum(each.nbytes for each in model.parameters())
    require_space(staged.target, needed, shutil.disk_usage(staged.path).free)
    with library_errors(f"{name}: the base model cannot be written as safetensors"):
        save_base_model(model, tokenizer, folder)
    for file in folder.iterdir():  # some of them only their owner may read
        file.chmod(folder.stat().st_mode & 0o666)
    return replace(open_base(str(folder), weights=True), name=name)


def _plan(
    opened: Checkpoint,
    selected: Sequence[int] | None,
    layers: LayerList | None,
    base: BaseFolder,
) -> MergePlan:
    """The plan that copies the NP layers, after a check that they fit the base model."""
    found = {size: base.config.get(name) for size, name in size_names(base.config).items()}
    sizes: dict[str, Any] = {size: number for size, number in found.items() if is_count(number)}
    opened.check_sizes(sizes, _own_widths(base))
    if layers is not None:
        count = sizes.get("num_hidden_layers", max(opened.modules) + 1)
        selected = chosen_layers(layers, opened.modules, count)
        opened.require(selected)
    # by its commit: a name on the Hub could mean another one by now
    spec = opened.given
    if selected is not None:
        spec += f":{','.join(map(str, selected))}"
    plan = plan_merge([spec], _OPTIONS)
    # the model's config.json has the name of that of a run
    return replace(plan, files=tuple(file for file in plan.files if file.name != CONFIG))


def _own_widths(base: BaseFolder) -> dict[int, int]:
    """`own_widths` of a model in a folder; its config names what only some models have."""
    if not any("experts" in key or "double_wide" in key for key in base.config):
        return {}
    from npt_fast.hf.base_model import load_skeleton
    from npt_fast.hf.base_sizes import own_widths

    return own_widths(load_skeleton(str(base.folder)))


def _fingerprint(
    opened: Checkpoint, base: BaseFolder, *, any_base: bool
) -> tuple[str | None, bool]:
    """The base model's fingerprint, and whether it was compared with the checkpoint's."""
    if opened.fingerprint is None:
        return None, False
    from npt_fast.hf.fingerprint import stored_fingerprint

    own = stored_fingerprint(base.folder)
    if any_base:
        return own, own is not None
    if own not in (None, opened.fingerprint):
        raise ModelError(
            f"{opened.given}: belongs to another base model of the same sizes "
            f"({opened.model_name or 'unnamed'}) than {base.name}: its weights are others; "
            "use --allow_different_base if that is meant"
        )
    return opened.fingerprint, own is not None


def _link(file: Path, staged: StagedDirectory) -> None:
    try:
        os.link(os.path.realpath(file), file.name, dst_dir_fd=staged.fd)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        raise ModelError(
            f"{file}: is on another file system than the output, so that no hard link can be made; "
            "leave out --hardlink"
        ) from None
    fd = os.open(file.name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=staged.fd)
    try:
        os.fsync(fd)  # what a library wrote is on the disk before it is published
    finally:
        os.close(fd)


def _compare(files: Sequence[Path], staged: StagedDirectory, target: Path) -> None:
    """Raise VerificationError unless copies equal the files that they were made from."""
    problems = [
        f"{file.name} differs from {file}"
        for file in files
        if file_sha256(file) != file_sha256(staged.path / file.name)
    ]
    if problems:
        raise VerificationError(f"{target}: not written", problems)


def _reference(base: BaseFolder, target: Path) -> BaseReference:
    if base.revision is not None:
        return BaseReference(hub_id=base.name, revision=base.revision)
    if os.path.isabs(base.name):
        return BaseReference(folder=base.name)
    real = os.path.realpath(base.folder), os.path.realpath(target)
    return BaseReference(folder=os.path.relpath(*real))


def _describe(
    plan: MergePlan,
    base: BaseFolder,
    place: BaseReference | None,
    fingerprint: str | None,
    digests: DigestWriter,
    staged: StagedDirectory,
    target: Path,
) -> None:
    """Write the files that say what the folder holds."""
    trained = description_of(plan.inputs, plan.layers)
    description = replace(trained, fingerprint=fingerprint)
    if fingerprint != trained.fingerprint:  # the layers are used with another base model
        description = replace(description, base_name=base.name)
    exported = Exported(description, file_sha256(staged.path / SAFETENSORS_WEIGHTS), place)
    config = BytesFile(CONFIG, strict_json.dump({**base.config, NPT: exported.to_dict()}))
    summary = summary_of(replace(plan, files=(*plan.files, config)), target, digests).to_dict()
    name = description.base_name or base.name
    card = exported_card(
        plan.layers,
        replace(description, base_name=name),
        str(base.config["model_type"]),
        place,
        trained_on=trained.base_name,
    )
    for file in (
        config,
        BytesFile(MODEL_CARD, card.encode()),
        BytesFile(MERGE_SUMMARY, strict_json.dump(summary)),
    ):
        with staged.file(file.name) as out:
            out.write(file.data)
