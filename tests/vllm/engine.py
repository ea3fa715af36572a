"""Runs vLLM in processes of its own, and compares its greedy tokens with those of `generate`.

vLLM for CPUs has its own stack, so that it is not among the development dependencies:
`make serve-test` brings it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # workers share the cores, however few there are
    "VLLM_NO_USAGE_STATS": "1",
}
CLEAR = 1e-3
"""Lead of the best token, in log-probability, below which rounding may decide which one is best."""

Prompts = Sequence[Sequence[int]]


class Answer(NamedTuple):
    """The greedy tokens after a prompt, and the log-probability of each."""

    tokens: list[int]
    log_probabilities: list[float]


class Run(NamedTuple):
    """What an engine has answered.

    Attributes:
        answers: one for each prompt.
        cached: number of the prompts' tokens that prefix caching found.
    """

    answers: list[Answer]
    cached: int


def start(
    model: Path,
    prompts: Prompts,
    tokens: int,
    *,
    adapters: Sequence[Path | None] = (),
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    """Run `main` in a process, with options of vLLM's `LLM`; its workers end with it.

    `adapters` has a LoRA, or none, for each prompt.
    """
    order = [str(model), prompts, tokens, [path and str(path) for path in adapters], options]
    return subprocess.run(
        [sys.executable, "-m", __name__], input=json.dumps(order), capture_output=True, text=True,
        # the engine in that process, which saves the imports of another one; servers have two
        env={**ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}, cwd=ROOT,
    )  # fmt: skip


def run(model: Path, prompts: Prompts, tokens: int, **options: Any) -> Run:
    """What vLLM answers to all prompts at once; for the options, see `start`."""
    done = start(model, prompts, tokens, **options)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, (done.stdout + done.stderr)[-6000:]
    answers, cached = json.loads(lines[0].removeprefix("RESULT "))
    return Run([Answer(*each) for each in answers], cached)


def main() -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    model, prompts, tokens, adapters, options = json.load(sys.stdin)
    llm = LLM(model=model, dtype="float32", disable_log_stats=False, **options)
    found = llm.generate(
        [{"prompt_token_ids": ids} for ids in prompts],
        SamplingParams(temperature=0, max_tokens=tokens, logprobs=1, ignore_eos=True),
        lora_request=[
            LoRARequest(path, 1 + adapters.index(path), path) if path else None for path in adapters
        ]
        or None,
    )
    answers = []
    for out in (each.outputs[0] for each in found):
        steps = zip(out.logprobs, out.token_ids, strict=True)
        answers.append(Answer(out.token_ids, [likely[token].logprob for likely, token in steps]))
    counts = {metric.name: metric for metric in llm.get_metrics()}
    print("RESULT", json.dumps([answers, counts["vllm:prefix_cache_hits"].value]))


def by_hand(model: Any, prompts: Prompts, tokens: int) -> list[Answer]:
    """What a model of transformers answers to each prompt, by `generate`.

    Each answer ends before the first token whose lead is not `CLEAR`.
    """
    import torch

    found = []
    for prompt in prompts:
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        best = torch.stack(out.logits, 1)[0].log_softmax(-1).topk(2)
        clear = (best.values[:, 0] - best.values[:, 1] >= CLEAR).long().cumprod(0).bool()
        found.append(Answer(best.indices[clear, 0].tolist(), best.values[clear, 0].tolist()))
    return found


def is_same(found: Answer, expected: Answer) -> bool:
    """Whether an engine's answer is that of `by_hand`, as far as that goes."""
    pairs = zip(found.log_probabilities, expected.log_probabilities, strict=False)
    return found.tokens[: len(expected.tokens)] == expected.tokens and all(
        abs(a - b) < 2e-4 for a, b in pairs
    )


def assert_same(found: Sequence[Answer], expected: Sequence[Answer]) -> None:
    """Assert that all answers are the same, and that most of their tokens were compared."""
    for own, other in zip(found, expected, strict=True):
        assert is_same(own, other), (own, other)
    compared, given = (sum(len(answer.tokens) for answer in part) for part in (expected, found))
    assert compared >= 0.9 * given, "few tokens have a clear lead"


if __name__ == "__main__":  # its workers import this module
    main()
