import math

import pytest
import torch

from services.core.sequence import SamplingParams
from services.instance.sampler import sample, uniform


def test_greedy_takes_the_most_probable():
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 0.0, 1.0]])
    params = [SamplingParams(0.0, 1, 10)] * 2
    assert [drawn.token_id for drawn in sample(logits, params, [0, 7])] == [1, 0]


def test_a_draw_depends_on_seed_and_index_alone():
    assert uniform(5, 3) == uniform(5, 3)
    assert len({uniform(seed, draw) for seed in range(20) for draw in range(20)}) == 400
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    alone = sample(logits, [SamplingParams(1.0, 9, 10)], [4])[0].token_id
    crowd = sample(logits.expand(3, -1).clone(), [SamplingParams(1.0, s, 10) for s in (1, 9, 2)], [0, 4, 8])
    assert crowd[1].token_id == alone


def test_draws_follow_the_distribution():
    logits = torch.tensor([[0.0, math.log(2), math.log(5)]])
    counts = [0, 0, 0]
    for draw in range(4000):
        counts[sample(logits, [SamplingParams(1.0, 3, 10)], [draw])[0].token_id] += 1
    for count, probability in zip(counts, (1 / 8, 2 / 8, 5 / 8), strict=True):
        spread = math.sqrt(4000 * probability * (1 - probability))
        assert abs(count - 4000 * probability) < 5 * spread


@pytest.mark.parametrize("temperature", [1e-30, 1e-3])
def test_a_tiny_temperature_is_greedy(temperature: float):
    logits = torch.tensor([[0.0, 1.0, 0.5]])
    drawn = [sample(logits, [SamplingParams(temperature, 1, 10)], [i])[0].token_id for i in range(20)]
    assert drawn == [1] * 20


def test_logprobs_are_of_the_unscaled_distribution_and_descend():
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0]])
    drawn = sample(logits, [SamplingParams(0.0, 1, 10, logprobs=3)], [0])[0].logprobs
    assert drawn is not None
    expected = torch.log_softmax(logits[0], 0)
    assert drawn.top_ids == (1, 2, 0)
    assert drawn.top_logprobs == pytest.approx(expected[[1, 2, 0]].tolist())
    assert drawn.logprob == pytest.approx(float(expected[1]))
