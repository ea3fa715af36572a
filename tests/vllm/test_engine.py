"""The engine itself, where vLLM is installed: exports of tiny models give the tokens of `generate`.

vLLM for CPUs has its own stack, so that it is not among the development dependencies.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import npt_fast as npt
from npt_fast.hf.convert import components
from tests.hf.exports import load
from tests.training import tiny
from tests.transfer import models

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

PROMPTS = [[5, 9, 77], [100, 20, 31, 42, 53, 64], [200, 201, 202, 7]]
TOKENS = 16
LAYERS: list[dict[str, Any]] = [
    {"layers": [0], "rank": 5, "modulation": "single", "residual": "kept"},
    {"layers": [1], "rank": 3, "num_ranks": 2, "modulation": "dual", "residual": "kept"},
    {"layers": [3], "rank": 4, "num_ranks": 3},
]
# heads as wide as vLLM's attention on a CPU takes them
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "head_dim": 32,
}  # fmt: skip

ENGINE = """
import json, sys
from vllm import LLM, SamplingParams

def main():
    model, prompts, tokens, options = json.loads(sys.argv[1])
    llm = LLM(model=model, dtype="float32", max_model_len=128, **options)
    sampling = SamplingParams(temperature=0, max_tokens=tokens, logprobs=1)
    found = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling)
    outputs = [each.outputs[0] for each in found]
    result = [
        [list(out.token_ids), [d[t].logprob for d, t in zip(out.logprobs, out.token_ids)]]
        for out in outputs
    ]
    print("RESULT", json.dumps(result))

if __name__ == "__main__":  # its processes import this module
    main()
"""
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


def write_export(folder: Path, family: str) -> Path:
    """A model with layers of each kind, of other shapes and residuals."""
    models.base(family, **SIZES).float().save_pretrained(folder / "base")
    tiny.tokenizer().save_pretrained(folder / "base")
    model = load(folder / "base")
    for options in LAYERS:
        npt.convert(model, npt.NPTConfig(**options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for part in components(model).values():
            for parameter in part.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    npt.save(model, folder / "np")
    npt.export(folder / "np", folder / "out", model_name=str(folder / "base"))
    return folder / "out"


def by_hand(folder: Path) -> list[tuple[list[int], list[float]]]:
    """Greedy tokens by `generate`, and their log-probabilities."""
    model, found = load(folder), []
    for prompt in PROMPTS:
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=TOKENS, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        ids = out.sequences[0, len(prompt) :].tolist()
        logits = [step.log_softmax(-1)[0] for step in out.logits]
        found.append((ids, [row[i].item() for row, i in zip(logits, ids, strict=True)]))
    return found


def serve(folder: Path, model: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the engine in a process of its own, which ends with its workers."""
    script = folder / "engine.py"
    script.write_text(ENGINE)
    order = json.dumps([str(model), PROMPTS, TOKENS, options])
    return subprocess.run(
        [sys.executable, script, order], capture_output=True, text=True,
        env={**os.environ, **ENVIRONMENT},
    )  # fmt: skip


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {"enforce_eager": True}) for family in models.FAMILIES},
    "compiled": ("llama", {}),
    "tensor parallel": ("llama", {"enforce_eager": True, "tensor_parallel_size": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_generate(case: str, tmp_path: Path) -> None:
    family, options = CASES[case]
    exported = write_export(tmp_path, family)
    done = serve(tmp_path, exported, **options)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-3000:]
    for found, expected in zip(json.loads(lines[0][7:]), by_hand(exported), strict=True):
        assert found[0] == expected[0]
        assert max(abs(a - b) for a, b in zip(found[1], expected[1], strict=True)) < 2e-3


def test_mistakes_are_found_before_there_are_workers(tmp_path: Path) -> None:
    exported = write_export(tmp_path, "llama")
    (exported / "npt_weights.safetensors").write_bytes(b"other")
    done = serve(tmp_path, exported, enforce_eager=True)
    assert done.returncode != 0 and "Worker" not in done.stderr
    assert "its SHA-256 differs; copy the folder" in done.stderr.splitlines()[-1]
