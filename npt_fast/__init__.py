"""Neuro-Plastic Transformers: train layers apart, merge them, transfer knowledge.

``import npt_fast as npt`` is all a user needs; everything is loaded on first use, so that the
import itself brings neither torch nor transformers.
"""

from __future__ import annotations

from npt_fast.hf import registration

# for type checkers, who know the name: `typing` would be most of what this import takes, and until
# it is done, nothing answers Ctrl-C
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from npt_fast.checkpoint.examination import VerifyReport
    from npt_fast.checkpoint.inspect import CheckpointReport, MergeVerdict, can_merge, inspect
    from npt_fast.checkpoint.merge import merge
    from npt_fast.checkpoint.merge_report import MergeReport
    from npt_fast.checkpoint.verify import verify
    from npt_fast.config import MergeOptions, NPTConfig, TrainOptions
    from npt_fast.errors import (
        CheckpointError,
        DataError,
        MergeError,
        ModelError,
        NPTError,
        OptionError,
        StorageError,
        TrainingError,
        TransferError,
        VerificationError,
    )
    from npt_fast.hf.checkpoint import load, save
    from npt_fast.hf.convert import (
        LayerStatus,
        convert,
        disabled,
        status,
        supported_layers,
        trainable_parameters,
        unload,
    )
    from npt_fast.hf.export import export
    from npt_fast.hf.push import push
    from npt_fast.hf.quantize import quantize
    from npt_fast.training.distillation import Distillation
    from npt_fast.training.evaluation import Evaluation, evaluate
    from npt_fast.training.optimizer import RelativeAdamW
    from npt_fast.training.plan import Plan, plan
    from npt_fast.training.run import TrainReport
    from npt_fast.training.sampling import sample_text
    from npt_fast.training.train import train
    from npt_fast.training.trainer import NPTTrainer
    from npt_fast.transfer.bake import Baked, bake, export_lora
    from npt_fast.transfer.extract import extract
    from npt_fast.transfer.inject import Hits, inject
    from npt_fast.transfer.modulation import Modulation, load_modulation, mean
    from npt_fast.transfer.positions import after, at
    from npt_fast.transfer.study import study
    from npt_fast.transfer.study_results import Study
    from npt_fast.transfer.suite import Suite, read_suite

__version__ = "0.1.0"  # the one place: pyproject.toml reads it, so that a source tree has it too

_HOMES = {
    "Baked": "npt_fast.transfer.bake",
    "CheckpointError": "npt_fast.errors",
    "CheckpointReport": "npt_fast.checkpoint.inspect",
    "DataError": "npt_fast.errors",
    "Distillation": "npt_fast.training.distillation",
    "Evaluation": "npt_fast.training.evaluation",
    "Hits": "npt_fast.transfer.inject",
    "LayerStatus": "npt_fast.hf.convert",
    "MergeError": "npt_fast.errors",
    "MergeOptions": "npt_fast.config",
    "MergeReport": "npt_fast.checkpoint.merge_report",
    "MergeVerdict": "npt_fast.checkpoint.inspect",
    "ModelError": "npt_fast.errors",
    "Modulation": "npt_fast.transfer.modulation",
    "NPTConfig": "npt_fast.config",
    "NPTError": "npt_fast.errors",
    "NPTTrainer": "npt_fast.training.trainer",
    "OptionError": "npt_fast.errors",
    "Plan": "npt_fast.training.plan",
    "RelativeAdamW": "npt_fast.training.optimizer",
    "StorageError": "npt_fast.errors",
    "Study": "npt_fast.transfer.study_results",
    "Suite": "npt_fast.transfer.suite",
    "TrainOptions": "npt_fast.config",
    "TrainReport": "npt_fast.training.run",
    "TrainingError": "npt_fast.errors",
    "TransferError": "npt_fast.errors",
    "VerificationError": "npt_fast.errors",
    "VerifyReport": "npt_fast.checkpoint.examination",
    "after": "npt_fast.transfer.positions",
    "at": "npt_fast.transfer.positions",
    "bake": "npt_fast.transfer.bake",
    "can_merge": "npt_fast.checkpoint.inspect",
    "convert": "npt_fast.hf.convert",
    "disabled": "npt_fast.hf.convert",
    "evaluate": "npt_fast.training.evaluation",
    "export": "npt_fast.hf.export",
    "export_lora": "npt_fast.transfer.bake",
    "extract": "npt_fast.transfer.extract",
    "inject": "npt_fast.transfer.inject",
    "inspect": "npt_fast.checkpoint.inspect",
    "load": "npt_fast.hf.checkpoint",
    "load_modulation": "npt_fast.transfer.modulation",
    "mean": "npt_fast.transfer.modulation",
    "merge": "npt_fast.checkpoint.merge",
    "plan": "npt_fast.training.plan",
    "push": "npt_fast.hf.push",
    "quantize": "npt_fast.hf.quantize",
    "read_suite": "npt_fast.transfer.suite",
    "sample_text": "npt_fast.training.sampling",
    "save": "npt_fast.hf.checkpoint",
    "status": "npt_fast.hf.convert",
    "study": "npt_fast.transfer.study",
    "supported_layers": "npt_fast.hf.convert",
    "train": "npt_fast.training.train",
    "trainable_parameters": "npt_fast.hf.convert",
    "unload": "npt_fast.hf.convert",
    "verify": "npt_fast.checkpoint.verify",
}

__all__ = [
    "Baked",
    "CheckpointError",
    "CheckpointReport",
    "DataError",
    "Distillation",
    "Evaluation",
    "Hits",
    "LayerStatus",
    "MergeError",
    "MergeOptions",
    "MergeReport",
    "MergeVerdict",
    "ModelError",
    "Modulation",
    "NPTConfig",
    "NPTError",
    "NPTTrainer",
    "OptionError",
    "Plan",
    "RelativeAdamW",
    "StorageError",
    "Study",
    "Suite",
    "TrainOptions",
    "TrainReport",
    "TrainingError",
    "TransferError",
    "VerificationError",
    "VerifyReport",
    "after",
    "at",
    "bake",
    "can_merge",
    "convert",
    "disabled",
    "evaluate",
    "export",
    "export_lora",
    "extract",
    "inject",
    "inspect",
    "load",
    "load_modulation",
    "mean",
    "merge",
    "plan",
    "push",
    "quantize",
    "read_suite",
    "sample_text",
    "save",
    "status",
    "study",
    "supported_layers",
    "train",
    "trainable_parameters",
    "unload",
    "verify",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name != "functional" and name not in _HOMES:
        raise AttributeError(f"module 'npt_fast' has no attribute {name!r}")
    home = _HOMES.get(name, "npt_fast.functional")
    try:
        module = import_module(home)
    except ModuleNotFoundError as error:
        from npt_fast.errors import missing_package

        needs = "train" if home.startswith("npt_fast.training.") else "hf"
        problem = missing_package(error, f"npt_fast.{name}", needs=needs)
        if problem is None:
            raise
        raise ModuleNotFoundError(problem, name=error.name) from None
    return module if name == "functional" else getattr(module, name)


registration.install()


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
