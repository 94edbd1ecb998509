"""The cost model finds the coefficients of processes that it only sees through their reports."""

from __future__ import annotations

import math
import random
from dataclasses import astuple, fields, replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from services.core.timings import HostingTiming, RemoteTiming, StepTiming
from services.gmanager.cost_model import CostModel, DaemonCosts, InstanceCosts

LAYERS = 32
# Instances and daemons of three kinds of machines, four orders of magnitude apart.
MACHINES = {
    "h200": (
        InstanceCosts(4e-3, 3e-6, 150.0, 2.3e-5, 2e-4, 1.4e-7),
        DaemonCosts(8e-6, 2e-7, 4e-6, 1.4e-7),
    ),
    "a100": (
        InstanceCosts(9e-3, 8e-6, 120.0, 7e-5, 5e-4, 3.3e-7),
        DaemonCosts(1e-5, 4e-7, 5e-6, 3.3e-7),
    ),
    "laptop core": (
        InstanceCosts(0.4, 8e-3, 12.0, 0.04, 5e-3, 9e-6),
        DaemonCosts(6e-5, 5e-6, 4e-5, 1.1e-5),
    ),
}


class Cluster:
    """One debtor and one creditor with true costs, and the noisy reports that they send."""

    def __init__(self, instance: InstanceCosts, daemon: DaemonCosts, seed: int = 1, outliers: float = 0.05) -> None:
        self.instance, self.daemon = instance, daemon
        self._rng = random.Random(seed)
        self._outliers = outliers

    def _noisy(self, seconds: float) -> float:
        if self._rng.random() < self._outliers:
            return seconds * self._rng.uniform(3, 20)
        return seconds * math.exp(self._rng.gauss(0, 0.03))

    def step(self, prefill: bool = False) -> StepTiming:
        rng = self._rng
        decode = rng.randint(1, 100)
        tokens = decode + (rng.choice((256, 512, 1024)) if prefill else 0)
        local, away, rows = rng.randint(1_000, 120_000), rng.randint(500, 40_000), rng.randint(1, 30)
        local_s = self._noisy(self.instance.local_s(local))
        answer_s = self._noisy(self.daemon.answer_s(LAYERS, rows, away))
        attention_s = max(local_s, answer_s)
        return StepTiming(
            tokens,
            tokens - decode,
            local,
            step_s=self._noisy(self.instance.other_s(tokens)) + attention_s,
            attention_s=attention_s,
            local_attention_s=local_s,
            remotes=(RemoteTiming("k1", LAYERS, rows, away, answer_s),),
        )

    def hosting(self) -> HostingTiming:
        steps = self._rng.randint(1, 60)
        tokens = steps * self._rng.randint(100, 40_000)
        return HostingTiming(steps * LAYERS, tokens, self._noisy(self.daemon.compute_s(steps * LAYERS, tokens)))

    def tell(self, model: CostModel, steps: int) -> None:
        for number in range(steps):
            model.observe_step("i0", self.step(prefill=number % 4 == 0))
            model.observe_hosting("k1", self.hosting())


def scaled(costs, factor: float):
    values = {field.name: factor * getattr(costs, field.name) for field in fields(costs)}
    if "knee_tokens" in values:
        values["knee_tokens"] = costs.knee_tokens
    return type(costs)(**values)


@pytest.mark.parametrize("prior", [1 / 3, 1.0, 3.0])
@pytest.mark.parametrize("machine", MACHINES)
def test_all_coefficients_are_found(machine, prior) -> None:
    instance, daemon = MACHINES[machine]
    model = CostModel(scaled(instance, prior), scaled(daemon, prior))
    Cluster(instance, daemon).tell(model, 600)
    # What weighs little in any observation is known less well.
    found, wanted = model.instance("i0"), instance
    assert found.step_s == pytest.approx(wanted.step_s, rel=0.1)
    assert found.token_s == pytest.approx(wanted.token_s, rel=0.5)
    assert found.token_s + found.compute_token_s == pytest.approx(wanted.token_s + wanted.compute_token_s, rel=0.1)
    assert found.context_token_s == pytest.approx(wanted.context_token_s, rel=0.1)
    assert found.attention_s == pytest.approx(wanted.attention_s, rel=0.5)
    assert model.kvdaemon("k1").context_token_s == pytest.approx(daemon.context_token_s, rel=0.1)
    assert model.kvdaemon("k1").query_s == pytest.approx(daemon.query_s, rel=0.3)
    assert model.kvdaemon("k1").message_s == pytest.approx(daemon.message_s, rel=0.5)
    # What planning uses is known well, anywhere in the range.
    for n, context in ((1, 2_000), (60, 50_000), (100, 110_000)):
        assert found.other_s(n) == pytest.approx(wanted.other_s(n), rel=0.1)
        assert found.local_s(context) == pytest.approx(wanted.local_s(context), rel=0.1)
        assert model.kvdaemon("k1").answer_s(LAYERS, 8, context // 3) == pytest.approx(
            daemon.answer_s(LAYERS, 8, context // 3), rel=0.1
        )


def test_the_error_of_predictions_is_that_of_the_noise() -> None:
    instance, daemon = MACHINES["a100"]
    model = CostModel(scaled(instance, 4.0), scaled(daemon, 4.0))
    assert model.step_error("i0") is None
    assert model.answer_error("k1") is None
    cluster = Cluster(instance, daemon)
    cluster.tell(model, 3)
    step_error = model.step_error("i0")
    assert step_error is not None
    assert step_error > 0.2  # the calibration was wrong
    cluster.tell(model, 400)
    step_error, answer_error = model.step_error("i0"), model.answer_error("k1")
    assert step_error is not None
    assert step_error < 0.06
    assert answer_error is not None
    assert answer_error < 0.06


@pytest.mark.parametrize("factor", [0.4, 2.5])
def test_a_change_of_rate_is_followed(factor) -> None:
    instance, daemon = MACHINES["a100"]
    model = CostModel(instance, daemon)
    Cluster(instance, daemon).tell(model, 300)
    slower, other = scaled(instance, factor), scaled(daemon, factor)
    Cluster(slower, other, seed=2).tell(model, 300)
    assert model.instance("i0").other_s(40) == pytest.approx(slower.other_s(40), rel=0.1)
    assert model.instance("i0").local_s(60_000) == pytest.approx(slower.local_s(60_000), rel=0.1)
    assert model.kvdaemon("k1").answer_s(LAYERS, 4, 20_000) == pytest.approx(other.answer_s(LAYERS, 4, 20_000), rel=0.1)


def test_way_and_computing_are_told_apart_by_the_daemons_own_word_alone() -> None:
    """From answers alone, message_s and query_s are one number: both are paid once for each message."""
    instance, daemon = MACHINES["a100"]
    prior = replace(daemon, message_s=2 * daemon.message_s, query_s=daemon.query_s / 4)
    both, answers_only = CostModel(instance, prior), CostModel(instance, prior)
    rng = random.Random(1)
    for _ in range(400):
        rows, context = rng.randint(1, 30), rng.randint(10, 500)  # little context: messages are what costs
        answer_s = daemon.answer_s(LAYERS, rows, context) * math.exp(rng.gauss(0, 0.01))
        step = StepTiming(1, 0, 0, 1.0, 0.5, 0.5, (RemoteTiming("k1", LAYERS, rows, context, answer_s),))
        both.observe_step("i0", step)
        answers_only.observe_step("i0", step)
        both.observe_hosting("k1", HostingTiming(LAYERS, context, daemon.compute_s(LAYERS, context)))

    def together(model: CostModel) -> float:
        return model.kvdaemon("k1").message_s + model.kvdaemon("k1").query_s

    for model in (both, answers_only):
        assert together(model) == pytest.approx(daemon.message_s + daemon.query_s, rel=0.05)
    assert both.kvdaemon("k1").query_s == pytest.approx(daemon.query_s, rel=0.05)
    assert answers_only.kvdaemon("k1").query_s < daemon.query_s / 2


def test_prefill_says_nothing_of_attention_but_something_of_the_rest() -> None:
    instance, daemon = MACHINES["a100"]
    model = CostModel(scaled(instance, 2.0), scaled(daemon, 2.0))
    cluster = Cluster(instance, daemon)
    for _ in range(200):
        model.observe_step("i0", cluster.step(prefill=True))
    found = model.instance("i0")
    assert found.context_token_s == 2 * instance.context_token_s
    assert model.kvdaemon("k1") == scaled(daemon, 2.0)
    assert found.other_s(800) == pytest.approx(instance.other_s(800), rel=0.1)
    assert model.step_error("i0") is None


positive = st.floats(1e-9, 1e3)
counts = st.floats(0, 1e7)
remotes = st.builds(RemoteTiming, st.just("k1"), counts, counts, counts, st.floats(-1.0, 1e3))
timings = st.builds(
    StepTiming, counts, st.sampled_from([0.0, 100.0]), counts, st.floats(-1.0, 1e3), st.floats(-1.0, 1e3),
    st.floats(-1.0, 1e3), st.lists(remotes, max_size=2).map(tuple),
)  # fmt: skip
hostings = st.builds(HostingTiming, counts, counts, st.floats(-1.0, 1e3))


# The second takes the cost of a context token to 0: next to nothing is expected of the third, and comes.
NEXT_TO_NOTHING = [HostingTiming(1.0, 0.0, 1.0), HostingTiming(5.0, 20.0, 1.0), HostingTiming(5e-324, 1.0, 2e-277)]


@settings(deadline=None)
@example(NEXT_TO_NOTHING, (1.0,) * 6, (1.0, 1.0, 2.0, 1.0))
@given(st.lists(st.one_of(timings, hostings), max_size=40), st.tuples(*[positive] * 6), st.tuples(*[positive] * 4))
def test_times_are_never_negative_whatever_was_reported(reports, instance, daemon) -> None:
    model = CostModel(InstanceCosts(*instance), DaemonCosts(*daemon))
    for report in reports:
        if isinstance(report, StepTiming):
            model.observe_step("i0", report)
        else:
            model.observe_hosting("k1", report)
    costs, answers = model.instance("i0"), model.kvdaemon("k1")
    assert all(value >= 0 and math.isfinite(value) for value in (*astuple(costs), *astuple(answers)))
    for amount in (0, 1, 1000, 10**7):
        assert costs.other_s(amount) >= 0
        assert costs.local_s(amount) >= 0
        assert answers.answer_s(LAYERS, amount, amount) >= 0


def test_a_calibration_replaces_what_was_known_and_a_process_that_left_is_forgotten() -> None:
    instance, daemon = MACHINES["a100"]
    other_instance, other_daemon = MACHINES["h200"]
    model = CostModel(instance, daemon)
    Cluster(*MACHINES["laptop core"]).tell(model, 50)
    model.calibrate_instance("i0", other_instance)
    model.calibrate_kvdaemon("k1", other_daemon)
    assert model.instance("i0") == other_instance
    assert model.kvdaemon("k1") == other_daemon
    assert model.step_error("i0") is None
    model.forget(["i0"], ["k1"])
    assert model.instance("i0") == instance
    assert model.kvdaemon("k1") == daemon


@pytest.mark.parametrize("machine", MACHINES)
def test_a_calibration_finds_knee_and_rates(machine) -> None:
    true, _ = MACHINES[machine]
    rng = random.Random(7)
    sizes = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
    found = InstanceCosts.calibrated(
        [(n, true.other_s(n) * rng.uniform(0.98, 1.02)) for n in sizes for _ in range(3)],
        [(n, true.local_s(n) * rng.uniform(0.98, 1.02)) for n in (256, 4096, 65536) for _ in range(3)],
    )
    assert true.knee_tokens / 2 <= found.knee_tokens <= 2 * true.knee_tokens
    for n in sizes:
        assert found.other_s(n) == pytest.approx(true.other_s(n), rel=0.15)
    assert found.context_token_s == pytest.approx(true.context_token_s, rel=0.05)
    assert min(astuple(found)) > 0


def test_a_calibration_that_cannot_tell_is_refused() -> None:
    other, attention = [(1, 1.0), (2, 1.0), (4, 1.0), (8, 1.5)], [(100, 1.0), (200, 2.0)]
    InstanceCosts.calibrated(other, attention)
    with pytest.raises(ValueError, match="four batch sizes"):
        InstanceCosts.calibrated(other[:3], attention)
    with pytest.raises(ValueError, match="two contexts"):
        InstanceCosts.calibrated(other, attention[:1])
    with pytest.raises(ValueError, match="positive"):
        InstanceCosts.calibrated([*other, (16, 0.0)], attention)


def test_the_roofline_is_bound_by_memory_and_then_by_arithmetic() -> None:
    costs = InstanceCosts.roofline(13.5e9, 13.5e9, 2**19, 1.6e12, 190e12, overhead_s=0.0)
    assert costs.other_s(1) == pytest.approx(13.5e9 / 1.6e12, rel=0.01)
    assert costs.other_s(10_000) == pytest.approx(10_000 * 13.5e9 / 190e12, rel=0.02)
    assert costs.local_s(1_000_000) == pytest.approx(1_000_000 * 2**19 / 1.6e12)
    assert costs.local_s(0) == 0
