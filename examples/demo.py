"""The users' guide on a real model: train layers of SmolLM2-135M separately, merge and use them.

The demo prints every command as a user would type it, runs it, and ends with a table and a picture.
It works in the folder ``demo`` and leaves its results there. Two CPU cores are enough.
With ``--quick`` it takes a few steps where it takes hundreds: everything runs, little is learnt.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "demo"
QUICK = sys.argv[1:] == ["--quick"]
STEPS, STEPS_23, MORE = (10, 10, 2) if QUICK else (500, 300, 8)
WINDOWS = 2 if QUICK else 20
MODEL = (
    f"--model_name smollm2-135m --data python-docs --max_length 256 --num_eval_samples {WINDOWS}"
)
BATCHES = "--batch_size 4 --gradient_accumulation_steps 1 --eval_steps 0 --generation_steps 0"
ALONE = "--num_ranks 4 --np_rank 64 --learning_rate 5e-4 --teacher_cache 2GB --logging_steps 25"
END = STEPS + MORE
TOGETHER = f"--curriculum_stages student:{END} --learning_rate 2e-5 --lr_schedule constant"
LAYER11 = f"experiments/layer11_training/checkpoint-{STEPS}"
LAYER13 = f"experiments/layer13_training/checkpoint-{STEPS}"
LAYER23 = f"experiments/layer23_training/checkpoint-{STEPS_23}"
MERGED = "experiments/merged_11_13"
MERGED_V2 = "experiments/merged_11_13_23"
CONTINUED = f"experiments/continued/checkpoint-{END}"
PROMPT = "The capital of France is"
TARGET = "The capital of Germany is"
TRACE = f'--from "{PROMPT}" --to "{TARGET}" --track " Paris" " Berlin"'
TRANSFER = f"""\
track " Paris" " Berlin"
extract-seq knowledge "{PROMPT} Paris"
inject knowledge "{TARGET}"
"""


def say(text: str) -> None:
    """Print a heading."""
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n## {text}", flush=True)


def run(command: str, *, keep_output: bool = False) -> tuple[float, str]:
    """Print a command and run it in the demo folder; a failure ends the demo.

    Returns:
        Seconds that it took, and its output if that was kept.
    """
    print(f"$ {command}", flush=True)
    program, *arguments = shlex.split(command)
    started = time.perf_counter()
    result = subprocess.run(
        [Path(sys.executable).with_name(program), *arguments],
        cwd=DEMO,
        check=False,
        text=True,
        stdout=subprocess.PIPE if keep_output else None,
    )
    if result.returncode:
        sys.exit(result.returncode)
    return time.perf_counter() - started, result.stdout or ""


def train(layer: int, steps: int) -> float:
    """Train one layer alone; returns the seconds that it took."""
    name = f"--wandb_name layer{layer}_training"
    what = f"--train_layers {layer} --max_steps {steps} {name}"
    return run(f"npt-fast train {what} {MODEL} {BATCHES} {ALONE}")[0]


def main() -> None:
    """Run the demo."""
    if sys.argv[1:] and not QUICK:
        sys.exit(__doc__)
    begun = time.perf_counter()
    shutil.rmtree(DEMO, ignore_errors=True)
    DEMO.mkdir()
    seconds: dict[str, float] = {}

    say("1. Train layer 11")
    seconds[LAYER11] = train(11, STEPS)

    say("2. Train layer 13 separately")
    seconds[LAYER13] = train(13, STEPS)

    say("3. Analyze both: can they be merged?")
    run(f"npt-fast analyze --checkpoint {LAYER11} {LAYER13}")

    say("4. Merge them, and compare every tensor with its source")
    merging = f"npt-fast merge --checkpoints {LAYER11} {LAYER13} --output {MERGED} --verify"
    seconds[MERGED] = run(merging)[0]

    say("5. Add a layer later: train layer 23, merge it into the merge")
    seconds[LAYER23] = train(23, STEPS_23)
    merging = f"npt-fast merge --checkpoints {MERGED} {LAYER23} --output {MERGED_V2} --verify"
    seconds[MERGED_V2] = run(merging)[0]

    say("6. Continue to train all three layers from their merged optimizer state")
    seconds[CONTINUED] = run(
        f"npt-fast train --train_layers 11,13,23 --resume_from {MERGED_V2} --max_steps {END} "
        f"--wandb_name continued {MODEL} {BATCHES} {TOGETHER} --warmup_steps 0 --logging_steps 2"
    )[0]

    say("7. Evaluate all checkpoints on held-out text, and continue a prompt")
    checkpoints = [LAYER11, LAYER13, MERGED, MERGED_V2, CONTINUED]
    _, output = run(
        f"npt-fast evaluate --checkpoint {' '.join(checkpoints)} {MODEL} "
        f"--prompt {shlex.quote(PROMPT)} --json",
        keep_output=True,
    )
    found = json.loads(output)

    say("8. Which layer knows about capitals? Trace it in the base model")
    run(f"npt-fast trace --model_name smollm2-135m {TRACE}")

    say("9. Transfer knowledge: extract the modulation of one sentence, inject it into another")
    (DEMO / "transfer.txt").write_text(TRANSFER)
    run(
        f"npt-fast interact --checkpoint {MERGED_V2} --model_name smollm2-135m --layers 11,13,23 "
        "--script transfer.txt"
    )

    say("Results")
    print_table(found, seconds)
    print(f"\nContinuations of {PROMPT!r}:")
    for name, (text,) in found["texts"].items():
        print(f"  {Path(name).parent.name if 'checkpoint-' in name else name}: {text.strip()!r}")
    picture = DEMO / "losses.png"
    draw(picture)
    print(f"\nLoss curves: {picture.relative_to(ROOT)}")
    print(f"The whole demo took {time.perf_counter() - begun:.0f} s.")


def print_table(found: dict[str, Any], seconds: dict[str, float]) -> None:
    """Print one row per checkpoint: its metrics, training time and size."""
    base = found["results"][0]["base_perplexity"]
    tokens = found["results"][0]["tokens"]
    print(f"Metrics over all {tokens:,} positions of the held-out text:\n")
    print("| model | layers | perplexity | ratio | KL, nats | top-1 | seconds | MB |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    print(f"| base model | | {base:.3f} | 1 | 0 | 1 | | |")
    for row in found["results"]:
        path = row["checkpoint"]
        real = DEMO / path.replace("/checkpoint-", "/checkpoints/checkpoint-")
        size = sum(file.stat().st_size for file in real.iterdir())
        print(
            f"| {path.removeprefix('experiments/')} | {', '.join(map(str, row['layers']))} "
            f"| {row['perplexity']:.3f} | {row['perplexity'] / base:.4f} | {row['kl']:.4f} "
            f"| {row['top1_agreement']:.4f} | {seconds[path]:.1f} | {size / 1e6:.1f} |"
        )


def draw(path: Path) -> None:
    """Draw the direct loss of every layer over the optimizer steps of all runs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    prefix = "mlp_direct_loss/"
    for run_name in ("layer11_training", "layer13_training", "layer23_training", "continued"):
        log = DEMO / "experiments" / run_name / "training_log.jsonl"
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        for name in sorted({key for line in lines for key in line if key.startswith(prefix)}):
            points = [(line["step"], line[name]) for line in lines if name in line]
            label = f"{name.removeprefix(prefix).replace('_', ' ')}, {run_name.replace('_', ' ')}"
            style = "--" if run_name == "continued" else "-"
            axes.plot(*zip(*points, strict=True), style, label=label)
    axes.set(
        xlabel="optimizer step",
        ylabel="squared error / squared target, mean over tokens",
        yscale="log",
        title="NP layers of SmolLM2-135M on CPU",
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
