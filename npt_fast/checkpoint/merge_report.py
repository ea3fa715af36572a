"""What a merge reports: `MergeReport` for the caller, ``merge_summary.json`` for later readers."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npt_fast.checkpoint.checkpoint import LayerRecord
from npt_fast.checkpoint.digests import DIGESTS, DigestWriter
from npt_fast.checkpoint.merge_summary import MergeSummary, PartProvenance, Provenance
from npt_fast.checkpoint.merged_layer import MergedLayer
from npt_fast.checkpoint.np_module import Architecture, flat
from npt_fast.checkpoint.plan import MergePlan
from npt_fast.hub import is_hub_name
from npt_fast.tables import Report

if TYPE_CHECKING:
    from npt_fast.checkpoint.examination import VerifyReport


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One layer of a merged checkpoint.

    Attributes:
        layer: index of the layer.
        source: input that the layer came from; several inputs are joined by ``+``.
        step: optimizer steps that the layer was trained for; None if unknown.
        architecture: modulation type, num_ranks, rank and widths.
        parameters: number of weights.
        changed: number of tensors that are not plain copies.
        optimizer: what became of the optimizer state: ``"kept"``, ``"fresh"``, ``"partly fresh"``
            or ``"left out"``.
    """

    layer: int
    source: str
    step: int | None
    architecture: Architecture
    parameters: int
    changed: int
    optimizer: str


@dataclass(frozen=True, slots=True, repr=False)
class MergeReport(Report):
    """What a merge did, or what a dry run would do.

    Attributes:
        output: path of the merged checkpoint.
        layers: report of each layer, ascending.
        total_parameters: number of weights.
        checkpoint_keys: number of weight tensors.
        global_step: step that training continues from; None without training state.
        files: size in bytes of each written file, by name.
        ways: bytes moved by each way (`byte_mover.WAYS`, ``computed``, ``headers``); for a dry run,
            the expected bytes.
        free_bytes: free space in bytes on the target's file system before the merge.
        needed_bytes: space in bytes that the output takes there; cloned blocks take none.
        seconds: wall time in seconds.
        warnings: lines that the user should read.
        notes: lines that need no attention.
        dry_run: whether this was a dry run, which writes nothing.
        verification: outcome of the verification; None if none was asked for.
    """

    output: str
    layers: list[LayerReport]
    total_parameters: int
    checkpoint_keys: int
    global_step: int | None
    files: dict[str, int]
    ways: dict[str, int]
    free_bytes: int
    needed_bytes: int
    seconds: float
    warnings: list[str]
    notes: list[str]
    dry_run: bool = False
    verification: VerifyReport | None = None

    @property
    def facts(self) -> dict[str, object]:
        """What was merged, in short."""
        layers = ", ".join(f"{info.layer} from {info.source}" for info in self.layers)
        proof = self.verification
        return {
            "output": f"{self.output}, not written" if self.dry_run else self.output,
            "layers": layers,
            "parameters": f"{self.total_parameters:,}",
            "verified": "no" if proof is None else "yes" if proof.passed else "failed",
            "warnings": len(self.warnings),
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        verification = self.verification.to_dict() if self.verification else None
        layers = [flat(layer) for layer in self.layers]
        return {**asdict(self), "layers": layers, "verification": verification}


def report_of(
    plan: MergePlan,
    target: Path,
    ways: dict[str, int],
    free: int,
    needed: int,
    started: float,
    *,
    dry_run: bool = False,
    proof: VerifyReport | None = None,
) -> MergeReport:
    layers = []
    weights = iter(plan.weights)  # layer by layer, in parameter order
    for merged in plan.layers:
        recipes = list(islice(weights, len(merged.architecture.names(merged.layer))))
        layers.append(
            LayerReport(
                layer=merged.layer,
                source=merged.source,
                step=merged.step,
                architecture=merged.architecture,
                parameters=sum(recipe.numel for recipe in recipes),
                changed=sum(not recipe.is_copy for recipe in recipes),
                optimizer="left out" if plan.options.weights_only else merged.optimizer(),
            )
        )
    return MergeReport(
        output=str(target),
        layers=layers,
        total_parameters=sum(merged.architecture.numel for merged in plan.layers),
        checkpoint_keys=len(plan.weights),
        global_step=plan.scalars_from.global_step if plan.scalars_from else None,
        files={file.name: file.size for file in plan.files},
        ways={way: count for way, count in ways.items() if count},
        free_bytes=free,
        needed_bytes=needed,
        seconds=round(time.monotonic() - started, 3),
        warnings=list(plan.warnings),
        notes=list(plan.notes),
        dry_run=dry_run,
        verification=proof,
    )


def summary_of(plan: MergePlan, target: Path, digests: DigestWriter) -> MergeSummary:
    """What a merge records about itself.

    Args:
        plan: what was written.
        target: where the output is to be.
        digests: the digests of its tensors, as far as they are known.
    """
    files = plan.small_digests()
    if digests.sha256:
        files[DIGESTS] = digests.sha256
    return MergeSummary(
        merged_layers=tuple(merged.layer for merged in plan.layers),
        layers={merged.layer: _provenance(merged, digests.weights) for merged in plan.layers},
        total_parameters=sum(merged.architecture.numel for merged in plan.layers),
        checkpoint_keys=len(plan.weights),
        inputs=tuple(
            (item.checkpoint.given, item.layers if item.selected else None) for item in plan.inputs
        ),
        working_directory=_working_directory(plan, target),
        options={
            name: str(value) if isinstance(value, Path) else value
            for name, value in asdict(plan.options).items()
        },
        files=files,
    )


def _working_directory(plan: MergePlan, target: Path) -> str | None:
    """The current directory relative to the output; None if no input has a relative path.

    Relative paths of inputs are relative to this directory. No absolute path is recorded, so that
    the paths stay valid when the whole tree is moved, and a published checkpoint does not reveal
    the names of its publisher's folders.
    """
    names = [item.checkpoint.given for item in plan.inputs]
    if all(os.path.isabs(given) or is_hub_name(given) for given in names):
        return None
    return os.path.relpath(os.getcwd(), os.path.realpath(target))


def _provenance(merged: MergedLayer, digests: Mapping[str, str]) -> Provenance:
    parts = tuple(
        PartProvenance(
            source=part.origin.checkpoint.given,
            step=part.origin.step(merged.layer),
            chain=_chain(part.origin.checkpoint.record(merged.layer)),
            num_ranks=part.module.architecture.num_ranks,
            divisor=merged.divisor,
        )
        for part in merged.parts
    )
    return Provenance(
        source=merged.source,
        step=merged.step,
        chain=parts[0].chain,
        digest=layer_digest(merged.architecture.names(merged.layer), digests),
        parts=parts if len(parts) > 1 else (),
    )


def _chain(record: LayerRecord) -> tuple[str, ...]:
    return (record.source, *record.chain) if record.source else ()


def layer_digest(names: Sequence[str], digests: Mapping[str, str]) -> str | None:
    """SHA-256 over the names and digests of a layer's tensors; None unless all are known."""
    if not all(name in digests for name in names):
        return None
    lines = "".join(f"{name} {digests[name]}\n" for name in names)
    return hashlib.sha256(lines.encode()).hexdigest()
