"""Draws tokens: token i of a request depends on its logits, its seed and i, and on nothing else.

So a request that is computed again elsewhere draws the same tokens, whatever else is in its batch.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels import sampling
from services.core.errors import InvalidRequestError
from services.core.sequence import SamplingParams, Sequence
from services.core.shaping import UNSHAPED
from services.core.structure import Structure
from services.instance.logprobs import TokenLogprobs, logprobs_of
from services.instance.shaping import TokenCounts, shape_logits
from services.runtime.grammars import Grammars, GrammarState


@dataclass(frozen=True, slots=True)
class Sample:
    token_id: int
    logprobs: TokenLogprobs | None


def sample(
    logits: Tensor,
    params: SequenceOf[SamplingParams],
    draws: SequenceOf[int],
    counts: SequenceOf[TokenCounts | None] | None = None,
    allowed: SequenceOf[Tensor | None] | None = None,
) -> list[Sample]:
    """Draws one token per row.

    Args:
        logits: [n, vocab_size].
        params: of each row.
        draws: index of the token in its request, counted from the end of the prompt.
        counts: of each row, the tokens so far; needed where ``shaping.penalizes``.
        allowed: of each row, [vocab_size] bool; None: all tokens.
    """
    plain = [
        row
        for row, param in enumerate(params)
        if param.shaping == UNSHAPED and (allowed is None or allowed[row] is None)
    ]
    greedy = [row for row in plain if params[row].temperature == 0]
    drawn = [row for row in plain if params[row].temperature > 0]
    tokens = dict(zip(greedy, sampling.argmax(_rows(logits, greedy)), strict=True))
    temperatures = [params[row].temperature for row in drawn]
    uniforms = [uniform(params[row].seed, draws[row]) for row in drawn]
    tokens.update(zip(drawn, sampling.draw(_rows(logits, drawn), temperatures, uniforms), strict=True))
    if len(plain) < len(params):
        for row, param in enumerate(params):
            if row not in tokens:
                tokens[row] = _draw_shaped(
                    logits[row],
                    param,
                    draws[row],
                    counts[row] if counts else None,
                    allowed[row] if allowed else None,
                )
    return [
        Sample(
            tokens[row],
            next(logprobs_of(logits[row : row + 1], [tokens[row]], param.logprobs)) if param.logprobs else None,
        )
        for row, param in enumerate(params)
    ]


def _draw_shaped(
    logits: Tensor, params: SamplingParams, draw: int, counts: TokenCounts | None, allowed: Tensor | None
) -> int:
    shaped = shape_logits(logits, params, draw, counts, allowed)[None]
    if params.temperature == 0:
        return sampling.torch_argmax(shaped)[0]
    return sampling.torch_draw(shaped, [params.temperature], [uniform(params.seed, draw)])[0]


class Sampler:
    """Draws for sequences, and keeps what their draws depend on besides the logits. Used by the engine thread."""

    def __init__(self, vocab_size: int, grammars: Grammars | None = None) -> None:
        self._vocab_size = vocab_size
        self._grammars = grammars
        self._counts: dict[Sequence, TokenCounts] = {}  # of requests that need them
        self._states: dict[Sequence, GrammarState] = {}  # of requests with a structure

    def draw(self, logits: Tensor, sequences: SequenceOf[Sequence]) -> list[Sample | InvalidRequestError]:
        """One token per sequence, or why its structure cannot be followed; logits: [n, vocab_size]."""
        if not sequences:
            return []
        failed: dict[int, InvalidRequestError] = {}
        allowed: list[Tensor | None] = [None] * len(sequences)
        for row, sequence in enumerate(sequences):
            if sequence.request.sampling.structure is not None:
                try:
                    allowed[row] = self._allowed(sequence, sequence.request.sampling.structure)
                except InvalidRequestError as error:
                    failed[row] = error
        samples = sample(
            logits,
            [sequence.request.sampling for sequence in sequences],
            [sequence.generated for sequence in sequences],
            [self._counts_of(sequence) for sequence in sequences],
            allowed,
        )
        return [failed.get(row, drawn) for row, drawn in enumerate(samples)]

    def forget(self, sequence: Sequence) -> None:
        """The sequence is over."""
        self._counts.pop(sequence, None)
        self._states.pop(sequence, None)

    def _allowed(self, sequence: Sequence, structure: Structure) -> Tensor:
        """Tokens that may come next, [vocab_size]; the ones that end the answer exactly where it is complete.

        A request that was preempted, or comes from another instance, is followed again from its tokens.
        """
        state = self._states.get(sequence)
        if state is None:
            if self._grammars is None:
                raise InvalidRequestError(f"{structure.asked_by}: this instance has no tokenizer to follow it with")
            state = self._states[sequence] = self._grammars.start(structure)
        state.take(sequence.tokens[sequence.request.prompt_tokens :])
        allowed = torch.from_numpy(state.allowed())
        stops = list(sequence.request.sampling.stop_token_ids)
        allowed[stops] = state.complete
        if not allowed.any():
            raise InvalidRequestError(f"{structure.asked_by}: the answer is complete, and no token ends it")
        return allowed

    def _counts_of(self, sequence: Sequence) -> TokenCounts | None:
        """Of the tokens so far, for a request whose draws depend on them."""
        if not sequence.request.sampling.shaping.penalizes:
            return None
        counts = self._counts.get(sequence)
        if counts is None:
            counts = self._counts[sequence] = TokenCounts(self._vocab_size)
        counts.take(sequence.tokens, sequence.request.prompt_tokens)
        return counts


def uniform(seed: int, draw: int) -> float:
    """A number in [0, 1) from the counter-based generator Philox, keyed by (seed, draw)."""
    generator = np.random.Philox(key=seed & (2**64 - 1), counter=draw)
    return float(np.random.Generator(generator).random())


def _rows(logits: Tensor, rows: SequenceOf[int]) -> Tensor:
    return logits if len(rows) == len(logits) else logits[rows]
