"""Writes models.md: the most downloaded language models, and which of them npt_fast covers.

python -m docs.models
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from npt_fast.hf.model_types import MODEL_TYPES
from npt_fast.tables import markdown_table

PAGE = Path(__file__).with_suffix(".md")


class Model(NamedTuple):
    """A row of the list.

    Attributes:
        name: name on the Hugging Face Hub.
        downloads: downloads of 30 days.
        model_type: of its config.json.
        experts: whether all layers have experts, for types with which config.json decides.
    """

    name: str
    downloads: int
    model_type: str
    experts: bool | None = None

    @property
    def layers(self) -> str:
        """Which of its layers can be NP layers."""
        about = MODEL_TYPES.get(self.model_type)
        layers = "none" if about is None else about.layers
        if layers == "those without experts" and self.experts is not None:
            return "none" if self.experts else "all"
        return layers

    @property
    def covered(self) -> str:
        """A tick for all layers, and words for some."""
        if self.layers.startswith("all"):
            return "✓"
        return "" if self.layers == "none" else "in part"


MODELS = (
    Model("Qwen/Qwen3-0.6B", 18_554_097, "qwen3"),
    Model("openai-community/gpt2", 16_093_449, "gpt2"),
    Model("Qwen/Qwen2.5-7B-Instruct", 14_410_456, "qwen2"),
    Model("deepseek-ai/DeepSeek-V3.2", 11_943_356, "deepseek_v32"),
    Model("Qwen/Qwen2.5-1.5B-Instruct", 11_794_344, "qwen2"),
    Model("Qwen/Qwen3-8B", 11_147_764, "qwen3"),
    Model("Qwen/Qwen3-4B-Instruct-2507", 10_759_210, "qwen3"),
    Model("meta-llama/Llama-3.1-8B-Instruct", 9_393_633, "llama"),
    Model("google/gemma-4-31B-it", 8_894_303, "gemma4", experts=False),
    Model("Qwen/Qwen2.5-3B-Instruct", 8_847_153, "qwen2"),
    Model("facebook/opt-125m", 8_613_283, "opt"),
    Model("Qwen/Qwen3.5-9B", 8_222_051, "qwen3_5"),
    Model("openai/gpt-oss-20b", 7_262_597, "gpt_oss"),
    Model("google/gemma-4-26B-A4B-it", 7_072_522, "gemma4", experts=True),
    Model("meta-llama/Llama-3.2-1B-Instruct", 6_881_274, "llama"),
    Model("Qwen/Qwen2.5-0.5B-Instruct", 6_021_176, "qwen2"),
    Model("Qwen/Qwen3.5-4B", 5_887_676, "qwen3_5"),
    Model("google/gemma-4-E4B-it", 5_581_069, "gemma4", experts=False),
    Model("dphn/dolphin-2.9.1-yi-1.5-34b", 4_721_430, "llama"),
    Model("Qwen/Qwen2-1.5B-Instruct", 4_481_221, "qwen2"),
    Model("openai/gpt-oss-120b", 4_384_464, "gpt_oss"),
    Model("mistralai/Mistral-7B-Instruct-v0.3", 3_832_543, "mistral"),
    Model("deepseek-ai/DeepSeek-R1", 3_774_773, "deepseek_v3"),
    Model("Qwen/Qwen3.6-35B-A3B", 3_511_378, "qwen3_5_moe"),
    Model("Qwen/Qwen3-1.7B", 3_480_231, "qwen3"),
    Model("Qwen/Qwen3.5-35B-A3B", 3_479_124, "qwen3_5_moe"),
    Model("google/gemma-4-E2B-it", 3_411_314, "gemma4", experts=False),
    Model("Qwen/Qwen3.5-27B", 3_355_703, "qwen3_5"),
    Model("meta-llama/Meta-Llama-3-8B", 3_348_773, "llama"),
    Model("EleutherAI/pythia-160m", 3_219_588, "gpt_neox"),
    Model("Qwen/Qwen3.5-0.8B", 3_033_670, "qwen3_5"),
    Model("TinyLlama/TinyLlama-1.1B-Chat-v1.0", 2_989_572, "llama"),
    Model("distilbert/distilgpt2", 2_962_810, "gpt2"),
    Model("mistralai/Mistral-7B-Instruct-v0.2", 2_955_455, "mistral"),
    Model("Qwen/Qwen3-Coder-30B-A3B-Instruct", 2_705_086, "qwen3_moe"),
    Model("meta-llama/Llama-3.2-3B-Instruct", 2_405_182, "llama"),
    Model("Qwen/Qwen2.5-Coder-7B-Instruct", 2_317_300, "qwen2"),
    Model("Qwen/Qwen2.5-0.5B", 2_251_457, "qwen2"),
    Model("Qwen/Qwen3Guard-Gen-0.6B", 2_241_427, "qwen3"),
    Model("google/gemma-3-4b-it", 2_199_472, "gemma3"),
)
"""The most downloaded language models, by the rules that the page states."""

TEXT = """\
# The most used models

These are the 40 language models with the most downloads in a public list, and the layers of each
that can be NP layers, [by model type](training.md#base-models).
{counts}

The list is the [catalogue of llmfit]({source})
of 2026-05-10: what the API of the Hugging Face Hub said of 1,852 models, with the downloads of the
30 days before and the `model_type` of config.json. A row is a model that generates text and that
`AutoModelForCausalLM` of transformers 5.23 builds. So four kinds are left out:

- encoders and models of embeddings;
- models that `AutoModelForCausalLM` does not build, such as most that read images. Those with
  more downloads than the last row are Qwen3-VL-2B (187 million), 4B and 8B, Qwen2.5-VL-3B and 7B,
  Qwen2-VL-7B, LLaVA-1.5-7B, DeepSeek-OCR and moondream2;
- copies of another model in another number format, as FP8 and AWQ;
- models with random weights, which are for tests.

The catalogue has no downloads of some models, which the ranking therefore lacks: Qwen3-4B,
Qwen3-32B, Qwen2.5-14B-Instruct, Qwen2.5-32B-Instruct, gemma-3-12b-it, phi-4 and others.

{table}

`python -m docs.models` writes this page from the list and from what `npt-fast models` prints.
"""
SOURCE = (
    "https://github.com/AlexsJones/llmfit/blob/"
    "bab8c012771acec3bbd4a051fd3720379bb01e5d/llmfit-core/data/hf_models.json"
)


def page() -> str:
    """The page, in Markdown."""
    total = sum(model.downloads for model in MODELS)

    rows = [model for model in MODELS if model.covered == "✓"]
    share = sum(model.downloads for model in rows) / total
    table = markdown_table(
        ["", "model", "downloads, millions", "`model_type`", "NP layers", "covered"],
        [
            [
                str(rank),
                model.name,
                f"{model.downloads / 1e6:.1f}",
                f"`{model.model_type}`",
                model.layers,
                model.covered,
            ]
            for rank, model in enumerate(MODELS, 1)
        ],
    )
    counts = (
        f"npt_fast covers all layers of {len(rows)} of them, with {share:.0%} of their downloads. "
        "Of Gemma 4, it covers the models without experts."
    )
    return TEXT.format(counts=counts, source=SOURCE, table=table)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
