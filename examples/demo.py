"""The main job on real input: two layers of SmolLM2-135M, trained apart, become one checkpoint.

Prints every command as a user would type it, runs it, and ends with what was written. Works in the
folder ``demo`` and leaves the result there.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REAL_CHECKPOINTS = ROOT / "tests" / "data" / "smollm2_135m"
LAYER11 = "layer11/checkpoint-800"
LAYER13 = "layer13/checkpoint-600"


def say(text: str) -> None:
    """A heading between commands."""
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n## {text}", flush=True)


def run(command: str) -> float:
    """Show a command, run it in the demo folder, stop at the first failure; seconds taken."""
    print(f"$ {command}", flush=True)
    program, *arguments = shlex.split(command)
    started = time.perf_counter()
    result = subprocess.run(
        [Path(sys.executable).with_name(program), *arguments], cwd=ROOT / "demo", check=False
    )
    if result.returncode:
        sys.exit(result.returncode)
    return time.perf_counter() - started


def main() -> None:
    """Run the demo."""
    demo = ROOT / "demo"
    shutil.rmtree(demo, ignore_errors=True)
    shutil.copytree(REAL_CHECKPOINTS, demo)

    say("1. What is in the two checkpoints, and can they be merged?")
    run(f"npt-fast analyze --checkpoint {LAYER11} {LAYER13}")

    say("2. Merge them, and compare every tensor with its source")
    seconds = run(
        f"npt-fast merge --checkpoints {LAYER11} {LAYER13} --output merged_11_13 --verify"
    )

    say("3. What is in the result?")
    run("npt-fast analyze --checkpoint merged_11_13")

    say("4. Merge the merge with a checkpoint that holds layer 13 again: the first one wins")
    run(f"npt-fast merge --checkpoints merged_11_13 {LAYER13} --output merged_v2 --verify")

    say("5. Anyone can prove the result again, here or on a copy")
    run("npt-fast verify merged_v2")

    say("What you got")
    for name in ("merged_11_13", "merged_v2"):
        summary = json.loads((demo / name / "merge_summary.json").read_text())
        files = sorted((demo / name).iterdir())
        total = sum(file.stat().st_size for file in files)
        print(f"demo/{name}: {total / 1e6:.1f} MB in {len(files)} files")
        for file in files:
            print(f"  {file.name:<24}{file.stat().st_size:>12,} bytes")
        for layer, facts in summary["layers"].items():
            origin = " <- ".join([facts["source"], *facts["chain"]])
            print(f"  layer {layer}: {origin}, sha256 {facts['digest'][:16]}")
    print(f"Analyzing took no tensor data; the verified merge took {seconds:.2f} s.")


if __name__ == "__main__":
    main()
