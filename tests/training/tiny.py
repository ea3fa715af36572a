"""A tiny model, tokenizer and text for training tests; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<eos>": 0, **{letter: n + 1 for n, letter in enumerate(alphabet)}}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<eos>")


def bos_tokenizer(template: str = "<bos> $A") -> PreTrainedTokenizerFast:
    """The same with BOS in front of each text, as Llama 3 has it, or what else the template says.

    Models for it have a `vocab_size` of 258.
    """
    found = tokenizer()
    found.add_special_tokens({"bos_token": "<bos>"})
    ids = [(name, found.convert_tokens_to_ids(name)) for name in ("<bos>", "<eos>")]
    raw: Any = found.backend_tokenizer
    raw.post_processor = processors.TemplateProcessing(template, None, ids)
    found.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
        "{% if add_generation_prompt %}me:{% endif %}"
    )
    return found


def model(layers: int = 4, **changes: Any) -> LlamaForCausalLM:
    """Return a random Llama of width 32, the same every time."""
    config = LlamaConfig(
        **{
            "vocab_size": 257,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "bos_token_id": None,
            "eos_token_id": 0,
            **changes,
        }
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def save(folder: Path, tokens: PreTrainedTokenizerFast | None = None, **changes: Any) -> Path:
    """Save model and tokenizer in a folder for `TrainOptions.model_name`."""
    model(**changes).save_pretrained(folder)
    (tokens or tokenizer()).save_pretrained(folder)
    return folder
