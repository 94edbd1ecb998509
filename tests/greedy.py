"""transformers' own greedy continuations, which answers are held against."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

# Of a prompt and a number of tokens, and transformers' settings: tokens, and margins of the best two logits.
Reference = Callable[..., tuple[list[int], list[float]]]


def greedy(path: Path) -> Reference:
    """Of a checkpoint; what was asked once is remembered."""
    torch.set_num_threads(1)  # clusters compute beside it, and threads that wait for each other are slower than one
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")

    @cache
    def generate(prompt: tuple[int, ...], count: int, **settings: float) -> tuple[list[int], list[float]]:
        tokens = torch.tensor([prompt])
        answer = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=count,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
            pad_token_id=0,
            **settings,
        )
        top = torch.stack([scores[0] for scores in answer.scores]).topk(2).values
        return answer.sequences[0, len(prompt) :].tolist(), (top[:, 0] - top[:, 1]).tolist()

    return lambda prompt, count, **settings: generate(tuple(prompt), count, **settings)
