"""The users' guide on a real model: train layers of SmolLM2-135M separately, merge and use them.

The demo prints every command as a user would type it, runs it, and ends with a table and a picture.
It works in the folder ``demo`` and leaves its results there. Two CPU cores are enough.
With ``--quick`` it takes a few steps where it takes hundreds, on shorter texts, evaluates the last
checkpoint only, and uses a copy of the model that is read faster: all runs, little is learnt.

The layers train on the model's own text, which took minutes to sample and is therefore kept in
``examples/smollm2_self_text.jsonl``. This command, run in ``examples``, made it:

    npt-fast sample --model_name smollm2-135m --tokens 100000 --max_length 256 --seed 42 \\
      --output smollm2_self_text.jsonl
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
STEPS, MORE, WINDOWS, LENGTH = (4, 2, 2, 64) if QUICK else (200, 40, 10, 256)
NAMED = f"--model_name {'base_model' if QUICK else 'smollm2-135m'}"
MODEL = f"{NAMED} --max_length {LENGTH} --num_eval_samples {WINDOWS}"
TEXT = "--data ../examples/smollm2_self_text.jsonl"
BATCHES = "--batch_size 4 --gradient_accumulation_steps 1 --eval_steps 0 --generation_steps 0"
ALONE = f"--max_steps {STEPS} --learning_rate 4e-4 --teacher_cache 2GB --logging_steps 20"
LAYER11 = f"experiments/layer11_training/checkpoint-{STEPS}"
LAYER13 = f"experiments/layer13_training/checkpoint-{STEPS}"
LAYER23 = f"experiments/layer23_training/checkpoint-{STEPS}"
MERGED = "experiments/merged_11_13"
MERGED_V2 = "experiments/merged_11_13_23"
END = STEPS + MORE
CONTINUED = f"experiments/continued/checkpoint-{END}"
TOGETHER = (
    f"--max_steps {END} --curriculum_stages student:{END} --fidelity_weight 10 "
    "--learning_rate 5e-5 --lr_schedule constant --warmup_steps 0 --logging_steps 1"
)
PROMPT = "The capital of France is"
TARGET = "The capital of Germany is"
TRACE = f'--from "{PROMPT}" --to "{TARGET}" --track " Paris" " Berlin"'
UNRELATED = "Water boils at one hundred degrees"
TRANSFER = f"""\
track " Paris" " Berlin"
extract-seq knowledge "{PROMPT} Paris"
inject knowledge "{TARGET}"
extract-seq unrelated "{UNRELATED}"
inject unrelated "{TARGET}"
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


def save_base_model() -> None:
    """Save the model in a folder: parsing the wheel's file takes most of a short command's time."""
    from npt_fast.hf import base_model

    base_model.save_base_model(*base_model.load_base_model("smollm2-135m"), DEMO / "base_model")


def train(layer: int) -> float:
    """Train one layer alone; returns the seconds that it took."""
    what = f"--train_layers {layer} --wandb_name layer{layer}_training"
    return run(f"npt-fast train {what} {MODEL} {TEXT} {BATCHES} {ALONE}")[0]


def main() -> None:
    """Run the demo."""
    if sys.argv[1:] and not QUICK:
        sys.exit(__doc__)
    begun = time.perf_counter()
    shutil.rmtree(DEMO, ignore_errors=True)
    DEMO.mkdir()
    if QUICK:
        save_base_model()
    seconds: dict[str, float] = {}

    say("1. Train layer 11")
    seconds[LAYER11] = train(11)

    say("2. Train layer 13 separately")
    seconds[LAYER13] = train(13)

    say("3. Analyze both: can they be merged?")
    run(f"npt-fast analyze --checkpoint {LAYER11} {LAYER13}")

    say("4. Merge them, and compare every tensor with its source")
    merging = f"npt-fast merge --checkpoints {LAYER11} {LAYER13} --output {MERGED} --verify"
    seconds[MERGED] = run(merging)[0]

    say("5. Add a layer later: train layer 23, merge it into the merge")
    seconds[LAYER23] = train(23)
    merging = f"npt-fast merge --checkpoints {MERGED} {LAYER23} --output {MERGED_V2} --verify"
    seconds[MERGED_V2] = run(merging)[0]

    say("6. Continue to train the three together, also towards the base model's predictions")
    seconds[CONTINUED] = run(
        f"npt-fast train --train_layers 11,13,23 --resume_from {MERGED_V2} "
        f"--wandb_name continued {MODEL} {TEXT} {BATCHES} {TOGETHER}"
    )[0]

    say("7. Evaluate checkpoints on Python's docs and on other kinds of text")
    checkpoints = [LAYER11, LAYER13, LAYER23, MERGED_V2, CONTINUED]
    if QUICK:
        checkpoints = checkpoints[-1:]
    _, output = run(
        f"npt-fast evaluate --checkpoint {' '.join(checkpoints)} {MODEL} --data python-docs "
        f"--prompt {shlex.quote(PROMPT)} --json",
        keep_output=True,
    )
    found = json.loads(output)

    say("8. Which layer knows about capitals? Trace it in the base model")
    run(f"npt-fast trace {NAMED} {TRACE}")

    say("9. Transfer knowledge: inject the modulation of one sentence, and of an unrelated one")
    (DEMO / "transfer.txt").write_text(TRANSFER)
    run(
        f"npt-fast interact --checkpoint {CONTINUED} {NAMED} --layers 11,13,23 "
        "--script transfer.txt"
    )

    say("Results")
    print_table(found, seconds)
    print(f"\nContinuations of {PROMPT!r}:")
    for name, (text,) in found["texts"].items():
        print(f"  {Path(name).parent.name if 'checkpoint-' in name else name}: {text.strip()!r}")
    runs = ("layer11_training", "layer13_training", "layer23_training", "continued")
    say("Curves of all runs")
    run(f"npt-fast plot {' '.join(f'experiments/{name}' for name in runs)} --output losses.png")
    print(f"The whole demo took {time.perf_counter() - begun:.0f} s.")


def print_table(found: dict[str, Any], seconds: dict[str, float]) -> None:
    """Print one row per checkpoint: its metrics, training time and size."""
    kinds = list(found["results"][0]["texts"])
    tokens = found["results"][0]["tokens"]
    print(
        f"Perplexity of the NPT model over the base model's, on {tokens:,} tokens of Python docs,"
    )
    print("and KL(base model, NPT model) in nats on these and on texts of other kinds:\n")
    print(f"| model | layers | ratio | docs | {' | '.join(kinds)} | worst | seconds | MB |")
    print(f"| --- | --- | {'---: | ' * (len(kinds) + 5)}")
    for row in found["results"]:
        path = row["checkpoint"]
        real = DEMO / path.replace("/checkpoint-", "/checkpoints/checkpoint-")
        size = sum(file.stat().st_size for file in real.iterdir())
        print(
            f"| {path.removeprefix('experiments/')} | {', '.join(map(str, row['layers']))} "
            f"| {row['perplexity_ratio']:.4f} | {row['kl']:.4f} "
            + "".join(f"| {row['texts'][kind]['kl']:.4f} " for kind in kinds)
            + f"| {row['worst']['kl']:.4f} | {seconds[path]:.1f} | {size / 1e6:.1f} |"
        )


if __name__ == "__main__":
    main()
