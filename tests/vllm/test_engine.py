"""The engine itself: exports of tiny models give the tokens of `generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import npt_fast as npt
from tests.hf.exports import load
from tests.transfer import models
from tests.vllm import engine, int8
from tests.vllm.exports import OTHERS, PROMPTS, TOKENS, write_export

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {"enforce_eager": True}) for family in (*models.FAMILIES, *OTHERS)},
    "compiled": ("llama", {}),
    "tensor parallel": ("llama", {"enforce_eager": True, "tensor_parallel_size": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_generate(case: str, tmp_path: Path) -> None:
    family, options = CASES[case]
    exported = write_export(tmp_path, family)
    found = engine.run(exported, PROMPTS, TOKENS, max_model_len=128, **options)
    engine.assert_same(found.answers, engine.by_hand(load(exported), PROMPTS, TOKENS))


def test_base_weights_in_a_pickle(tmp_path: Path) -> None:
    """Which vLLM would not look for beside safetensors."""
    write_export(tmp_path)
    torch.save(load(tmp_path / "base").state_dict(), tmp_path / "base" / "pytorch_model.bin")
    (tmp_path / "base" / "model.safetensors").unlink()
    exported = tmp_path / "pickled"
    npt.export(tmp_path / "np", exported, model_name=str(tmp_path / "base"))
    options = {"max_model_len": 128, "enforce_eager": True}
    found = engine.run(exported, PROMPTS, TOKENS, **options)
    engine.assert_same(found.answers, engine.by_hand(load(exported), PROMPTS, TOKENS))
    plain = {"hf_overrides": {"architectures": ["LlamaForCausalLM"]}}
    refused(exported, "has NP layers, but is asked for as a plain model", **plain)


def test_adapters_act_on_np_layers(tmp_path: Path) -> None:
    """vLLM's LoRA for a request gives the tokens of PEFT's model."""
    peft: Any = pytest.importorskip("peft")
    exported = write_export(tmp_path)
    projections = ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = peft.get_peft_model(
        load(exported), peft.LoraConfig(r=8, lora_alpha=16, target_modules=projections)
    ).eval()
    without = engine.by_hand(load(exported), PROMPTS, TOKENS)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(0.15 * torch.randn(weight.shape, generator=generator))
    model.save_pretrained(tmp_path / "lora")
    found = engine.run(
        exported, PROMPTS, TOKENS, adapters=[tmp_path / "lora"] * len(PROMPTS), enable_lora=True,
        max_lora_rank=8, enforce_eager=True, max_model_len=128,
    )  # fmt: skip
    expected = engine.by_hand(model, PROMPTS, TOKENS)
    assert all(a.tokens != b.tokens for a, b in zip(expected, without, strict=True))
    engine.assert_same(found.answers, expected)


def test_np_layers_on_int8_projections(tmp_path: Path) -> None:
    """Most answers are those of plain PyTorch: rounding decides where an input lies midway."""
    exported, tokens = write_export(tmp_path), 4
    prompts = [[17 * n % 257, 5 + n, 100 - n] for n in range(1, 17)]
    model = load(exported)
    in_float = engine.by_hand(model, prompts, tokens)
    int8.imitate(model)
    expected = engine.by_hand(model, prompts, tokens)
    int8.write_quantised(tmp_path / "base")
    npt.export(
        tmp_path / "np", tmp_path / "int8", model_name=str(tmp_path / "base"),
        allow_different_base=True,
    )  # fmt: skip
    found = engine.run(
        tmp_path / "int8", prompts, tokens, enforce_eager=True, max_model_len=128
    ).answers
    same = [engine.is_same(*pair) for pair in zip(found, expected, strict=True)]
    assert sum(same) >= 0.75 * len(prompts)
    clear = [(own, other) for own, other in zip(found, in_float, strict=True) if other.tokens]
    assert len(clear) >= 0.9 * len(prompts)
    assert not any(engine.is_same(own, other) for own, other in clear)


def test_mistakes_are_found_before_there_are_workers(tmp_path: Path) -> None:
    exported = write_export(tmp_path)
    (exported / "npt_weights.safetensors").write_bytes(b"other")
    refused(exported, "its SHA-256 differs; copy the folder")


def test_a_type_that_is_not_served(tmp_path: Path) -> None:
    """vLLM has StableLM, but without NP layers."""
    exported = write_export(tmp_path, "stablelm")
    refused(exported, "not in NPTStableLmForCausalLM; load it with AutoModelForCausalLM")


def refused(exported: Path, message: str, **options: Any) -> None:
    done = engine.start(exported, PROMPTS, TOKENS, enforce_eager=True, **options)
    assert done.returncode != 0 and "Worker" not in done.stderr
    assert message in done.stderr.splitlines()[-1]
