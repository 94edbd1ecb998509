"""Checkpoints with random weights, by the shape of models that exist: nothing is downloaded, everything can be served.

What an engine computes does not depend on what the weights say; how fast it does so depends on their shape alone. The
tokenizer has as many tokens as the model, so that every drawn id has a text and servers have real text to send.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

_SEED = 1
_BYTES = 256
_END = "<|end|>"
_SPACE = "\u0120"  # how byte-level tokenizers write a space
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, slots=True)
class CheckpointShape:
    """A model's shape.

    Attributes:
        config: name of the configuration class in transformers.
        settings: of the configuration; token roles and dtype are added.
    """

    name: str
    config: str
    settings: Mapping[str, Any]

    def make_config(self) -> PretrainedConfig:
        end = self.settings["vocab_size"] - 1
        made: PretrainedConfig = getattr(transformers, self.config)(
            **self.settings, dtype="bfloat16", bos_token_id=None, eos_token_id=end, pad_token_id=None
        )
        return made


SHAPES: Mapping[str, CheckpointShape] = {
    shape.name: shape
    for shape in (
        CheckpointShape(
            "llama-100m",
            "LlamaConfig",
            {
                "vocab_size": 32000,
                "hidden_size": 768,
                "intermediate_size": 2048,
                "num_hidden_layers": 12,
                "num_attention_heads": 12,
                "num_key_value_heads": 4,
                "max_position_embeddings": 16384,
                "tie_word_embeddings": True,
            },
        ),
        CheckpointShape(
            "llama-3-8b",
            "LlamaConfig",
            {
                "vocab_size": 128256,
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "max_position_embeddings": 1 << 21,
                "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
            },
        ),
        CheckpointShape(
            "qwen2.5-0.5b",
            "Qwen2Config",
            {
                "vocab_size": 151936,
                "hidden_size": 896,
                "intermediate_size": 4864,
                "num_hidden_layers": 24,
                "num_attention_heads": 14,
                "num_key_value_heads": 2,
                "max_position_embeddings": 32768,
                "rms_norm_eps": 1e-6,
                "rope_theta": 1e6,
                "tie_word_embeddings": True,
            },
        ),
    )
}


def write_random_checkpoint(directory: Path, shape: CheckpointShape, device: str = "cpu") -> int:
    """Writes configuration, bfloat16 weights and tokenizer; answers the number of parameters.

    Equal shapes give equal bytes.

    Args:
        device: where the weights are drawn; a GPU draws billions of them in a moment, and others than the CPU does.
    """
    torch.manual_seed(_SEED)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape.make_config(), dtype=torch.bfloat16)
    model.save_pretrained(directory)
    make_tokenizer(shape.settings["vocab_size"]).save_pretrained(directory)
    return sum(parameter.numel() for parameter in model.parameters())


def random_prompt(shape: CheckpointShape, tokens: int, draw: random.Random) -> tuple[int, ...]:
    """Whole words: no token is part of a character, none ends a text."""
    last = int(shape.settings["vocab_size"]) - 2
    return tuple(draw.randint(_BYTES, last) for _ in range(tokens))


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level: the 256 bytes, then made-up words with a space before them, then the end of a text."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(_word(n) for n in range(vocab_size - _BYTES - 1))]
    tokenizer = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(_END, special=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END)


def _word(number: int) -> str:
    letters = ""
    number += 1  # counts a, b, ..., z, aa, ab, ...: there is no empty word
    while number:
        number, letter = divmod(number - 1, len(_LETTERS))
        letters = _LETTERS[letter] + letters
    return _SPACE + letters
