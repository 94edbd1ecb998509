"""What is learned begins again where it was far off, also from coefficients that were learned to be 0."""

from __future__ import annotations

from services.core.timings import RemoteTiming, StepTiming
from services.gmanager.cost_model import InstanceCosts
from services.gmanager.learning import GUESSED_DAEMON, Learning, begin_again, like_instance


def step(batch: int, other_s: float, attention_s: float, remotes: tuple[RemoteTiming, ...] = ()) -> StepTiming:
    return StepTiming(batch, 0, 1000.0 * batch, other_s + attention_s, attention_s, attention_s, remotes)


def test_coefficients_learned_to_be_nothing_can_be_learned_again() -> None:
    zero = InstanceCosts(
        step_s=0.02, token_s=0.0, knee_tokens=16, compute_token_s=0.0, attention_s=0.0, context_token_s=0
    )
    costs = begin_again(zero, [step(8, 0.04, 0.01)] * 5)
    assert costs.step_s == 0.04
    assert min(costs.token_s, costs.compute_token_s, costs.attention_s, costs.context_token_s) > 0
    daemon = like_instance(zero, layers=32)
    assert 0 < daemon.query_s < GUESSED_DAEMON.query_s
    assert 0 < daemon.context_token_s < GUESSED_DAEMON.context_token_s


def test_a_step_time_that_does_not_depend_on_the_batch_and_then_changes_is_followed() -> None:
    learning = Learning()
    for number in range(200):  # steps of larger batches are even shorter: the batch's coefficients go down to 0
        batch = 1 + number % 12
        learning.observe("instance/i", (step(batch, 0.03 - 0.001 * batch, 0.002),), float(number))
    for number in range(200, 400):
        learning.observe("instance/i", (step(1 + number % 12, 0.3, 0.02),), float(number))
    known = learning.known.instances["i"]
    assert abs(known.other_s(6) / 0.3 - 1) < 0.1
    error = learning.step_error("i")
    assert error is not None
    assert error < 0.1
