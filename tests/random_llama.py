"""A checkpoint for tests of the whole system: a small Llama with random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB_SIZE = 512


def write_random_llama(path: Path, logit_scale: float = 1.0, **settings: int) -> None:
    """A float32 Llama without a tokenizer; its logits are spread enough that ties are rare.

    One rBlock is 128 KiB: 4 layers, 2 KV heads, K and V, 64 tokens, head_dim 32.

    Args:
        logit_scale: spreads them further.
        settings: of the configuration, in place of those below.
    """
    torch.manual_seed(3)
    usual = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "head_dim": 32,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
    }
    config = LlamaConfig(**{**usual, **settings}, eos_token_id=None, bos_token_id=None, initializer_range=0.15)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(logit_scale)
    model.save_pretrained(path)
