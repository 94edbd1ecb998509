"""Draws tokens. Stateless: token i of a request depends on its logits, its seed and i, and on nothing else.

So a request that is computed again elsewhere draws the same tokens, whatever else is in its batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from services.core.sequence import SamplingParams


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural log-probabilities at one position: of the drawn token, and of the most probable ones, descending."""

    logprob: float
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    token_id: int
    logprobs: TokenLogprobs | None


def sample(logits: Tensor, params: Sequence[SamplingParams], draws: Sequence[int]) -> list[Sample]:
    """Draws one token per row.

    Args:
        logits: [n, vocab_size] float32.
        params: of each row.
        draws: index of the token in its request, counted from the end of the prompt.
    """
    tokens = logits.argmax(dim=-1).tolist()
    for row, (param, draw) in enumerate(zip(params, draws, strict=True)):
        if param.temperature > 0:
            tokens[row] = _draw(logits[row], param.temperature, uniform(param.seed, draw))
    wants = [row for row, param in enumerate(params) if param.logprobs]
    logprobs: dict[int, TokenLogprobs] = {}
    if wants:
        table = torch.log_softmax(logits[wants], dim=-1)
        for at, row in enumerate(wants):
            top = torch.topk(table[at], min(params[row].logprobs, table.shape[1]))
            logprobs[row] = TokenLogprobs(
                float(table[at, tokens[row]]), tuple(top.indices.tolist()), tuple(top.values.tolist())
            )
    return [Sample(token, logprobs.get(row)) for row, token in enumerate(tokens)]


def uniform(seed: int, draw: int) -> float:
    """A number in [0, 1) from the counter-based generator Philox, keyed by (seed, draw)."""
    generator = np.random.Philox(key=seed & (2**64 - 1), counter=draw)
    return float(np.random.Generator(generator).random())


def _draw(logits: Tensor, temperature: float, u: float) -> int:
    """Inverse transform sampling: the first token at which the cumulative probability exceeds u. float64."""
    shifted = logits.double() - float(logits.max())  # so that a tiny temperature overflows to -inf, never to NaN
    weights = torch.softmax(shifted / temperature, dim=-1)
    cumulative = weights.cumsum(0)
    index = int(torch.searchsorted(cumulative, u * float(cumulative[-1]), right=True))
    return min(index, len(weights) - 1)
