"""Changes rows of logits as their requests ask for (``services/core/shaping.py``), in plain torch.

A row costs some passes over the vocabulary. Nothing grows with the context: the tokens so far are counted as they come.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from services.core.sequence import SamplingParams

_FEW = 512  # of the most probable tokens, among which top_p is looked for before all are sorted


class TokenCounts:
    """Which tokens a request has so far.

    Attributes:
        seen: [vocab_size] bool, in prompt or answer.
        answered: [vocab_size] float32, times in the answer.
    """

    def __init__(self, vocab_size: int) -> None:
        self.seen = torch.zeros(vocab_size, dtype=torch.bool)
        self.answered = torch.zeros(vocab_size)
        self._taken = 0

    def take(self, tokens: Sequence[int], prompt_tokens: int) -> None:
        """Counts what has come since the last call; ``tokens`` only grows."""
        new = torch.tensor(tokens[self._taken :])
        self.seen[new] = True
        answered = new[max(0, prompt_tokens - self._taken) :]
        self.answered.index_add_(0, answered, torch.ones(len(answered)))
        self._taken = len(tokens)


def shape_logits(
    logits: Tensor, params: SamplingParams, draw: int, counts: TokenCounts | None, allowed: Tensor | None = None
) -> Tensor:
    """One row as it is drawn from, [vocab_size] float32, not yet divided by the temperature.

    Args:
        logits: [vocab_size], left as they are.
        draw: tokens that the answer has already.
        counts: of the tokens so far; needed if ``params.shaping.penalizes``.
        allowed: [vocab_size] bool, at least one; None: all tokens. Where only the end is left, min_tokens gives way.
    """
    shaping = params.shaping
    row = logits.to("cpu", torch.float32, copy=True)
    for token, bias in shaping.logit_bias:
        row[token] += bias
    if allowed is not None:
        row[~allowed] = -math.inf
    if draw < shaping.min_tokens and params.stop_token_ids:
        stops = list(params.stop_token_ids)
        if allowed is None or allowed.sum() > allowed[stops].sum():
            row[stops] = -math.inf
    if shaping.penalizes:
        assert counts is not None
        if shaping.repetition_penalty != 1:
            penalty = shaping.repetition_penalty
            seen = row[counts.seen]
            row[counts.seen] = torch.where(seen > 0, seen / penalty, seen * penalty)
        row -= shaping.presence_penalty * (counts.answered > 0) + shaping.frequency_penalty * counts.answered
    if params.temperature > 0:  # otherwise the most probable token is drawn, which all of these leave in
        if 0 < shaping.top_k < len(row):
            row[row < row.topk(shaping.top_k).values[-1]] = -math.inf
        if shaping.top_p < 1:
            row = _nucleus(row, params.temperature, shaping.top_p)
        if shaping.min_p > 0:
            # p / p_max = exp((x - x_max) / temperature)
            row[row < row.max() + params.temperature * math.log(shaping.min_p)] = -math.inf
    return row


def _nucleus(row: Tensor, temperature: float, top_p: float) -> Tensor:
    """Only the most probable tokens that together reach ``top_p``: each whose predecessors do not reach it yet."""
    scaled = (row.double() - row.max()) / temperature
    total = scaled.exp().sum()
    for count in (min(_FEW, len(row)), len(row)):
        some, tokens = torch.sort(scaled, descending=True, stable=True) if count == len(row) else scaled.topk(count)
        before = (some.exp() / total).cumsum(0) - some.exp() / total
        kept = int((before < top_p).sum())
        if kept < count or count == len(row):
            break
    out = torch.full_like(row, -math.inf)
    out[tokens[:kept]] = row[tokens[:kept]]
    return out
