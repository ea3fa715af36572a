"""``npt-fast analyze``"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from cyclopts import Parameter

import npt_fast as npt
from npt_fast.checkpoint.inspect import CheckpointReport, LayerInfo
from npt_fast.cli.output import print_json, size, warn


def analyze(
    *,
    checkpoint: Annotated[list[str], Parameter(consume_multiple=True)],
    verbose: bool = False,
    json: bool = False,
) -> None:
    """Show what checkpoints hold and, for several, whether they can be merged.

    Reads headers only, however large the checkpoint, unless --verbose asks for values.

    Parameters
    ----------
    checkpoint
        Checkpoint directories or weight files.
    verbose
        Also list every tensor with its norm and number of NaN or infinite values.
    json
        Print the reports as JSON.
    """
    reports = [npt.inspect(path, values=verbose) for path in checkpoint]
    verdict = npt.can_merge(checkpoint) if len(checkpoint) > 1 else None
    for report in reports:
        for problem in report.problems:
            warn(problem)
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
    print(f"{'Yes' if verdict.mergeable else 'No'}: " + (
        f"the result would have layers {verdict.layers}" if verdict.mergeable
        else verdict.remarks[0]
    ))  # fmt: skip
    if verdict.mergeable:
        for remark in verdict.remarks:
            print(f"  {remark}")


def _section(title: str) -> None:
    print(f"\n{title}\n{'-' * 40}")


def _print(report: CheckpointReport, verbose: bool) -> None:
    print("=" * 60)
    print("NPT Checkpoint Analysis")
    print(f"Checkpoint: {report.path}")
    for note in report.notes:
        print(note)
    print("=" * 60)
    _section("NPT Weights Analysis")
    print(f"Format: {report.format}")
    print(f"Total keys: {report.total_keys}")
    print(f"Total parameters: {report.total_parameters:,}")
    print(f"Modulation type: {report.modulation}")
    print(f"Number of ranks: {_or_varies(report.num_ranks)}")
    print(f"NPT rank: {_or_varies(report.rank)}")
    print(f"Base model: hidden {report.hidden_size}, intermediate {report.intermediate_size}")
    print(f"Layers found: {[info.layer for info in report.layers]}")
    for info in report.layers:
        _print_layer(info, verbose)
    if report.training_state is not None:
        _section("Training State Analysis")
        _print_facts(report.training_state)
    if report.config is not None:
        _section("Configuration")
        shown = ("model_name", "batch_size", "learning_rate", "max_steps")
        _print_facts({name: report.config[name] for name in shown if name in report.config})
    if report.merge is not None:
        _section("Merge Information")
        print(f"Merged layers: {report.merge['merged_layers']}")
        print("Layer sources:")
        for info in report.layers:
            print(f"  Layer {info.layer}: {' <- '.join([info.source or 'unknown', *info.chain])}")
    if report.multi_layer_state is not None:
        _section("Multi-Layer Training State")
        print(f"Layers to train: {report.multi_layer_state['layers_to_train']}")
        stages = report.multi_layer_state.get("curriculum_schedule")
        stages = [s for s in stages if isinstance(s, dict)] if isinstance(stages, list) else []
        print(f"Curriculum stages: {len(stages)}")
        for stage in stages:
            print(f"  - {stage.get('name')}: until step {stage.get('until_step')}")
    if report.files:
        _section("Files in Checkpoint")
        for name, count in report.files.items():
            print(f"  {name}: {size(count)}")
    print()


def _or_varies(value: int | None) -> str:
    return "varies by layer" if value is None else str(value)


def _print_layer(info: LayerInfo, verbose: bool) -> None:
    print(f"\nLayer {info.layer}:")
    print(f"  Modulation: {info.modulation}, num_ranks {info.num_ranks}, rank {info.rank}")
    residual = info.residual or "not recorded (removed is assumed)"
    print(f"  Dtype: {', '.join(info.dtypes)}; residual: {residual}")
    print(f"  Parameters: {info.tensors} tensors, {size(info.nbytes)}")
    print(f"  Total elements: {info.parameters:,}")
    if info.step is not None:
        print(f"  Trained steps: {info.step}")
    if info.fidelity is not None:
        print(f"  Fidelity: {info.fidelity}")
    if verbose:
        bad = sum(tensor.non_finite or 0 for tensor in info.details)
        print(f"  NaN or infinite: {bad}")
        print("  Parameter details:")
        width = max(len(tensor.name) for tensor in info.details)
        for tensor in info.details:
            norm = "" if tensor.norm is None else f"  norm {tensor.norm:.6g}"
            flag = f"  NaN/Inf {tensor.non_finite}" if tensor.non_finite else ""
            print(
                f"    {tensor.name:<{width}}  {tensor.dtype} {tensor.shape}  "
                f"{size(tensor.nbytes)}{norm}{flag}"
            )


def _print_facts(facts: dict[str, Any]) -> None:
    for name, value in facts.items():
        print(f"{name}: {value}")
