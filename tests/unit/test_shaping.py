"""What requests may do to the model's distribution, against transformers' logits processors."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from services.core.errors import InvalidRequestError
from services.core.sequence import SamplingParams
from services.core.shaping import UNSHAPED, LogitShaping
from services.instance.sampler import sample
from services.instance.shaping import TokenCounts, shape_logits

VOCAB = 3000  # more than are looked at before all are sorted
PROMPT = [5, 7, 7, 2999, 11]
ANSWER = [11, 4, 4, 4]
STOPS = frozenset({3, 9})


def rows(count: int = 20) -> Tensor:
    """Some flat, some steep."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, VOCAB, generator=generator) * torch.linspace(0.2, 6, count)[:, None]


def counts_of(tokens: list[int], prompt_tokens: int) -> TokenCounts:
    counts = TokenCounts(VOCAB)
    for end in (1, prompt_tokens - 1, len(tokens) - 1, len(tokens)):  # as they come, a few at a time
        counts.take(tokens[:end], prompt_tokens)
    return counts


def shaped(logits: Tensor, shaping: LogitShaping, temperature: float = 1.0) -> Tensor:
    params = SamplingParams(temperature, 1, 100, STOPS, shaping=shaping)
    counts = counts_of(PROMPT + ANSWER, len(PROMPT)) if shaping.penalizes else None
    return torch.stack([shape_logits(row, params, len(ANSWER), counts) for row in logits]) / temperature


def processed(logits: Tensor, *processors: object) -> Tensor:
    ids = torch.tensor([PROMPT + ANSWER] * len(logits))
    return LogitsProcessorList(processors)(ids, logits.clone())


@pytest.mark.parametrize(
    ("shaping", "temperature", "processors"),
    [
        (LogitShaping(top_k=40), 1.0, [TopKLogitsWarper(40)]),
        (LogitShaping(top_k=5000), 1.0, [TopKLogitsWarper(5000)]),
        (LogitShaping(top_p=0.9), 0.7, [TemperatureLogitsWarper(0.7), TopPLogitsWarper(0.9)]),
        (LogitShaping(top_p=0.02), 1.0, [TopPLogitsWarper(0.02)]),
        (LogitShaping(min_p=0.05), 1.5, [TemperatureLogitsWarper(1.5), MinPLogitsWarper(0.05)]),
        (LogitShaping(repetition_penalty=1.3), 1.0, [RepetitionPenaltyLogitsProcessor(1.3)]),
        (LogitShaping(repetition_penalty=0.8), 1.0, [RepetitionPenaltyLogitsProcessor(0.8)]),
        (LogitShaping(logit_bias=((4, 2.5), (9, -7.0))), 1.0, [SequenceBiasLogitsProcessor([[[4], 2.5], [[9], -7.0]])]),
        (LogitShaping(min_tokens=5), 1.0, [MinNewTokensLengthLogitsProcessor(len(PROMPT), 5, list(STOPS))]),
        (LogitShaping(min_tokens=4), 1.0, [MinNewTokensLengthLogitsProcessor(len(PROMPT), 4, list(STOPS))]),
        (
            LogitShaping(repetition_penalty=1.2, top_k=100, top_p=0.8, min_p=0.01),
            0.9,
            [
                RepetitionPenaltyLogitsProcessor(1.2),
                TemperatureLogitsWarper(0.9),
                TopKLogitsWarper(100),
                TopPLogitsWarper(0.8),
                MinPLogitsWarper(0.01),
            ],
        ),
    ],
)
def test_the_same_as_transformers(shaping: LogitShaping, temperature: float, processors: list[object]) -> None:
    logits = rows()
    torch.testing.assert_close(shaped(logits, shaping, temperature), processed(logits, *processors))


def test_presence_and_frequency_count_the_answer_alone() -> None:
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, as OpenAI's documentation has it."""
    logits = rows()
    expected = logits.clone()
    for token, times in ((11, 1), (4, 3)):
        expected[:, token] -= 0.5 * times + 0.25
    got = shaped(logits, LogitShaping(presence_penalty=0.25, frequency_penalty=0.5))
    torch.testing.assert_close(got, expected)


def test_ties_stay_together_and_one_token_always_stays() -> None:
    flat = torch.zeros(1, VOCAB)
    assert shaped(flat, LogitShaping(top_k=3)).isfinite().all()
    steep = torch.zeros(1, VOCAB)
    steep[0, 17] = 50.0
    for shaping in (LogitShaping(top_p=1e-9), LogitShaping(min_p=1.0), LogitShaping(top_k=1)):
        assert shaped(steep, shaping).isfinite().nonzero().tolist() == [[0, 17]]


def test_greedy_takes_what_penalties_and_bias_leave() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 11], logits[0, 20] = 2.0, 1.9
    params = SamplingParams(0.0, 1, 100, shaping=LogitShaping(presence_penalty=0.2, top_k=1))
    counts = counts_of(PROMPT + ANSWER, len(PROMPT))
    assert sample(logits, [params], [4], [counts])[0].token_id == 20
    biased = replace(params, shaping=LogitShaping(logit_bias=((8, 3.0),)))
    assert sample(logits.expand(2, -1), [biased, params], [4, 4], [None, counts])[0].token_id == 8
    assert logits[0, 8] == 0, "the model's own logits stay"


def test_frequencies_are_those_of_the_processed_distribution() -> None:
    """Pearson's chi-squared over 20,000 draws, beside rows that ask for nothing."""
    generator = torch.Generator().manual_seed(5)
    row = torch.randn(40, generator=generator)
    shaping = LogitShaping(top_k=20, top_p=0.9, logit_bias=((3, 1.0),))
    params = SamplingParams(0.8, 12, 10, shaping=shaping)
    count = 20_000
    draws = [
        drawn.token_id
        for start in range(0, count, 1000)
        for drawn in sample(row.expand(1000, -1), [params] * 1000, range(start, start + 1000))
    ]
    expected = count * torch.softmax(shape_logits(row, params, 0, None).double() / 0.8, 0)
    got = torch.bincount(torch.tensor(draws), minlength=40).double()
    possible = expected > 0
    assert got[~possible].sum() == 0
    statistic = float(((got - expected)[possible] ** 2 / expected[possible]).sum())
    freedom = int(possible.sum()) - 1
    assert freedom > 5
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 1.5}, "min_p: must be between 0 and 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"presence_penalty": 3.0}, "presence_penalty: must be between -2 and 2"),
        ({"frequency_penalty": math.inf}, "frequency_penalty"),
        ({"min_tokens": 11}, "min_tokens: must be between 0 and 10"),
        ({"logit_bias": ((VOCAB, 1.0),)}, "token id 3000"),
        ({"logit_bias": ((1, math.nan),)}, "logit_bias"),
        ({"logit_bias": tuple((n, 1.0) for n in range(1025))}, "at most 1024"),
    ],
)
def test_bounds_are_named(wrong: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        LogitShaping(**wrong).check(VOCAB, 10)  # type: ignore[arg-type]
    UNSHAPED.check(1, 1)
