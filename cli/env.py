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
        from npt_fast.benchmarks.device import device_facts, device_state
    except (ImportError, OSError) as error:  # a library of CUDA's is missing, or is another's
        return {"device": f"not known: {str(error).splitlines()[0]}"}
    state = {"nvidia-smi": "; ".join(lines)} if (lines := device_state()) else {}
    return {**device_facts(), **state}
