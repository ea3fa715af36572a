"""``npt-fast analyze``"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import npt_fast as npt
from npt_fast.checkpoint.certificate import grouped
from npt_fast.checkpoint.checkpoint import open_checkpoint
from npt_fast.checkpoint.inspect import CheckpointReport, LayerInfo
from npt_fast.cli.arguments import CheckpointTexts, PathText
from npt_fast.cli.output import certificate_lines, print_json, say, size, warn
from npt_fast.layer_names import ranges
from npt_fast.pictures import figure
from npt_fast.pictures.checkpoints import draw_checkpoints


def analyze(
    checkpoint: CheckpointTexts,
    *,
    verbose: bool = False,
    json: bool = False,
    plot: PathText | None = None,
) -> None:
    """Show what checkpoints hold and, for several, whether they can be merged.

    npt-fast analyze layer11/checkpoint-800 layer13/checkpoint-600

    Reads headers only, however large the checkpoint, unless --verbose or --plot asks for values.
    Of checkpoints on the Hub nothing else is fetched.

    Parameters
    ----------
    checkpoint
        Checkpoint directories, weight files, ORG/REPO on the Hub, or folders of runs, whose newest
        checkpoint is taken.
    verbose
        Also list every tensor, with its norm and its number of NaN or infinite values.
    json
        Print the reports as JSON.
    plot
        Picture to write, .png, .svg or .pdf: norms and spectra of the factors, fidelity, and which
        checkpoints the layers of a merge come from.
    """
    if plot is not None:
        figure.check(plot)  # before all weights are read
    reports = [npt.inspect(path, values=verbose) for path in checkpoint]
    verdict = npt.can_merge(checkpoint) if len(checkpoint) > 1 else None
    for report in reports:
        for problem in report.problems:
            warn(problem)
    if plot is not None:
        figure.save(draw_checkpoints([open_checkpoint(report.path) for report in reports]), plot)
    if json:
        plain = {
            "checkpoints": [report.to_dict() for report in reports],
            "verdict": asdict(verdict) if verdict else None,
        }
        print_json(plain)
        return
    for report in reports:
        _print(report, verbose)
    if verdict is None:
        return
    _section("Can these be merged?")
    say(f"{'Yes' if verdict.mergeable else 'No'}: " + (
        f"the result would have layers {verdict.layers}" if verdict.mergeable
        else verdict.remarks[0]
    ))  # fmt: skip
    if verdict.mergeable:
        for remark in verdict.remarks:
            say(f"  {remark}")


def _section(title: str) -> None:
    say()
    say(title)
    say("-" * 40)


def _print(report: CheckpointReport, verbose: bool) -> None:
    say("=" * 60)
    say("NPT Checkpoint Analysis")
    say(f"Checkpoint: {report.path}")
    for note in report.notes:
        say(note)
    say("=" * 60)
    _section("NPT Weights Analysis")
    say(f"Format: {report.format}")
    say(f"Total keys: {report.total_keys}")
    say(f"Total parameters: {report.total_parameters:,}")
    say(f"Modulation type: {report.modulation}")
    say(f"Number of ranks: {_or_varies(report.num_ranks)}")
    say(f"NPT rank: {_or_varies(report.rank)}")
    say(f"Base model: hidden {report.hidden_size}, intermediate {report.intermediate_size}")
    say(f"Layers found: {[info.layer for info in report.layers]}")
    for info in report.layers:
        _print_layer(info, verbose)
    _print_certificates(report.layers)
    if report.training_state is not None:
        _section("Training State Analysis")
        _print_facts(report.training_state)
    if report.config is not None:
        _section("Configuration")
        shown = ("model_name", "batch_size", "learning_rate", "max_steps")
        _print_facts({name: report.config[name] for name in shown if name in report.config})
    if report.merge is not None:
        _section("Merge Information")
        say(f"Merged layers: {report.merge['merged_layers']}")
        say("Layer sources:")
        for info in report.layers:
            say(f"  Layer {info.layer}: {' <- '.join([info.source or 'unknown', *info.chain])}")
    if report.multi_layer_state is not None:
        _section("Multi-Layer Training State")
        say(f"Layers to train: {report.multi_layer_state['layers_to_train']}")
        stages = report.multi_layer_state.get("curriculum_schedule")
        stages = [s for s in stages if isinstance(s, dict)] if isinstance(stages, list) else []
        say(f"Curriculum stages: {len(stages)}")
        for stage in stages:
            name, end = _words(stage.get("name")), _words(stage.get("until_step"))
            say(f"  - {name}: until step {end}")
    if report.files:
        _section("Files in Checkpoint")
        for name, count in report.files.items():
            say(f"  {name}: {size(count)}")
    say()


def _or_varies(value: int | None) -> str:
    return "varies by layer" if value is None else str(value)


def _print_certificates(layers: Iterable[LayerInfo]) -> None:
    groups = grouped((info.layer, info.certificate) for info in layers)
    if groups:
        _section("Certificates")
    for certificate, members in groups:
        step = "" if certificate.step is None else f", after step {certificate.step}"
        say(f"Layers {ranges(members)}, measured with {ranges(certificate.layers)} on{step}:")
        for line in certificate_lines(certificate):
            say(line)


def _print_layer(info: LayerInfo, verbose: bool) -> None:
    say()
    say(f"Layer {info.layer}:")
    say(f"  Modulation: {info.architecture}")
    residual = info.residual or "not recorded (found out when it is loaded)"
    say(f"  Dtype: {', '.join(info.dtypes)}; residual: {residual}")
    say(f"  Parameters: {info.tensors} tensors, {size(info.nbytes)}")
    say(f"  Total elements: {info.parameters:,}")
    if info.step is not None:
        say(f"  Trained steps: {info.step}")
    if info.fidelity is not None:
        say(f"  Fidelity: {info.fidelity}")
    if verbose:
        bad = sum(tensor.non_finite or 0 for tensor in info.details)
        say(f"  NaN or infinite: {bad}")
        say("  Parameter details:")
        width = max(len(tensor.name) for tensor in info.details)
        for tensor in info.details:
            norm = "" if tensor.norm is None else f"  norm {tensor.norm:.6g}"
            flag = f"  NaN/Inf {tensor.non_finite}" if tensor.non_finite else ""
            say(
                f"    {tensor.name:<{width}}  {tensor.dtype} {tensor.shape}  "
                f"{size(tensor.nbytes)}{norm}{flag}"
            )


def _print_facts(facts: dict[str, Any], indent: str = "") -> None:
    for name, value in facts.items():
        label = f"layer {name}" if str(name).isdecimal() else name
        if isinstance(value, dict):
            say(f"{indent}{label}:" if value else f"{indent}{label}: none")
            _print_facts(value, indent + "  ")
        else:
            say(f"{indent}{label}: {_words(value)}")


def _words(value: Any) -> str:
    """A value as a reader says it: no Python and no JSON."""
    if value is None:
        return "none"
    if isinstance(value, list):
        return ", ".join(map(_words, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(item)}" for key, item in value.items()) or "none"
    return str(value)
