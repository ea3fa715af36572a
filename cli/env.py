"""``npt-fast env``"""

from __future__ import annotations

from npt_fast.benchmarks.harness import machine_facts
from npt_fast.cli.output import print_json, say

_PACKAGES = (
    "torch", "triton", "transformers", "accelerate", "safetensors", "datasets", "peft", "vllm",
    "numpy", "cyclopts",
)  # fmt: skip


def env(*, json: bool = False) -> None:
    """Show versions, devices and the commit, for a report of a problem.

    Parameters
    ----------
    json
        Print them as JSON.
    """
    facts = {**machine_facts(*_PACKAGES), **_devices()}
    if json:
        print_json(facts)
        return
    for name, value in facts.items():
        say(f"{name}: {value}")


def _devices() -> dict[str, str]:
    """What torch runs on, or why torch does not work."""
    try:
        import torch
    except (ImportError, OSError) as error:  # a library of CUDA's is missing, or is another's
        return {"devices": f"not known: {str(error).splitlines()[0]}"}
    found = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
    return {
        "CUDA": str(torch.version.cuda),
        "ROCm": str(torch.version.hip),
        "devices": ", ".join(f"{one.name} ({one.total_memory / 1e9:.0f} GB)" for one in found)
        or "cpu",
    }
