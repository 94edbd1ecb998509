"""Log-probabilities of tokens by the model's own distribution, before anything is done to it."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

_AT_ONCE = 1 << 22  # float32 numbers: what a table of rows and tokens takes beside the logits stays small


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural log-probabilities at one position: of the token there, and of the most probable ones, descending."""

    logprob: float
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


def logprobs_of(logits: Tensor, tokens: SequenceOf[int], count: int) -> Iterator[TokenLogprobs]:
    """Of one token in each row.

    Args:
        logits: [n, vocab_size].
        tokens: n of them.
        count: of how many of the most probable tokens as well.
    """
    vocab_size = logits.shape[1]
    rows = max(1, _AT_ONCE // vocab_size)
    for first in range(0, len(tokens), rows):
        table = torch.log_softmax(logits[first : first + rows].float(), dim=1)
        there = torch.tensor(tokens[first : first + rows], device=table.device)[:, None]
        top = torch.topk(table, min(count, vocab_size))
        for logprob, ids, values in zip(
            table.gather(1, there)[:, 0].tolist(), top.indices.tolist(), top.values.tolist(), strict=True
        ):
            yield TokenLogprobs(logprob, tuple(ids), tuple(values))
