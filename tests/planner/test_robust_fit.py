"""The estimator behind the cost model: relative, robust, forgetful, never negative."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gmanager.robust_fit import RobustFit, RunningMedian, least_squares, project, solve

COEFFICIENTS = (8e-3, 2e-5, 7e-5)
SCALES = [1e-4, 1.0, 1e4]  # of a device: everything is relative, so nothing may depend on it


def observation(rng: random.Random, coefficients, noise: float = 0.03, outliers: float = 0.0):
    n = rng.choice((1, 4, 16, 40, 80, 256, 1024))
    x = (1.0, n, max(0.0, n - 100))
    y = sum(a * b for a, b in zip(x, coefficients, strict=True)) * math.exp(rng.gauss(0, noise))
    if rng.random() < outliers:
        y *= rng.uniform(3, 30)
    return x, y


def worst_error(found, wanted) -> float:
    return max(abs(a / b - 1) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("prior_factor", [0.1, 1.0, 10.0])
def test_known_coefficients_are_found_in_spite_of_noise_outliers_and_a_wrong_prior(scale, prior_factor) -> None:
    rng = random.Random(1)
    wanted = tuple(scale * c for c in COEFFICIENTS)
    fit = RobustFit([prior_factor * c for c in wanted])
    for _ in range(600):
        fit.update(*observation(rng, wanted, outliers=0.1))
    assert worst_error(fit.coefficients, wanted) < 0.15
    assert fit.error is not None
    assert fit.error < 0.06


def test_outliers_do_little_harm_compared_with_plain_least_squares() -> None:
    rng = random.Random(2)
    rows = [observation(rng, COEFFICIENTS, outliers=0.1) for _ in range(400)]
    fit = RobustFit(COEFFICIENTS)
    for x, y in rows:
        fit.update(x, y)
    # Plain least squares: the mean of the step time of a batch of 40, say, against its robust prediction.
    x = (1.0, 40, 0.0)
    truth = COEFFICIENTS[0] + 40 * COEFFICIENTS[1]
    mean = statistics.mean(y for row, y in rows if row == x)
    robust = sum(a * b for a, b in zip(x, fit.coefficients, strict=True))
    assert abs(robust / truth - 1) < 0.05 < abs(mean / truth - 1)


@pytest.mark.parametrize("factor", [0.25, 3.0])
def test_a_change_of_the_hardwares_rate_is_followed(factor) -> None:
    rng = random.Random(3)
    fit = RobustFit(COEFFICIENTS)
    for _ in range(500):
        fit.update(*observation(rng, COEFFICIENTS))
    changed = tuple(factor * c for c in COEFFICIENTS)
    for _ in range(400):
        fit.update(*observation(rng, changed))
    assert worst_error(fit.coefficients, changed) < 0.15


def test_what_is_known_of_other_batches_outlasts_a_long_time_of_equal_ones() -> None:
    rng = random.Random(4)
    fit = RobustFit([3 * c for c in COEFFICIENTS])
    for _ in range(500):
        fit.update(*observation(rng, COEFFICIENTS))
    before = fit.coefficients
    for _ in range(2000):
        fit.update((1.0, 16, 0.0), (COEFFICIENTS[0] + 16 * COEFFICIENTS[1]) * math.exp(rng.gauss(0, 0.03)))
    assert fit.coefficients[2] == pytest.approx(before[2], rel=0.05)


def test_columns_that_always_vary_together_share_the_correction_by_their_parts() -> None:
    fit = RobustFit((1.0, 0.1, 0.1))
    for _ in range(500):
        fit.update((1.0, 10.0, 1.0), 6.3)  # the calibration says 2.1
    assert fit.coefficients[0] + 10 * fit.coefficients[1] + fit.coefficients[2] == pytest.approx(6.3, rel=1e-3)
    assert fit.coefficients[0] == pytest.approx(10 * fit.coefficients[1], rel=1e-3)  # equal parts
    assert 0.1 < fit.coefficients[2] < 0.2  # a tenth of them: it hardly moves


@given(
    st.lists(
        st.tuples(st.tuples(*[st.floats(0, 1e6)] * 3), st.floats(1e-9, 1e6)),
        max_size=60,
    ),
    st.tuples(*[st.floats(1e-9, 1e3)] * 3),
)
def test_no_coefficient_is_ever_negative_or_not_a_number(rows, prior) -> None:
    fit = RobustFit(prior)
    for x, y in rows:
        if max(x) > 0:
            fit.update(x, y)
        assert all(c >= 0 and math.isfinite(c) for c in fit.coefficients)


def test_values_that_are_no_timings_change_nothing() -> None:
    fit = RobustFit((1.0, 2.0))
    for y in (0.0, -1.0, math.inf, math.nan):
        fit.update((1.0, 1.0), y)
    assert fit.coefficients == (1.0, 2.0)
    assert fit.error is None


@pytest.mark.parametrize("prior", [(1.0, 0.0), (-1.0,), (math.nan,), (math.inf,)])
def test_a_prior_must_be_positive(prior) -> None:
    with pytest.raises(ValueError, match="positive"):
        RobustFit(prior)


def test_running_median_forgets() -> None:
    median = RunningMedian()
    assert median.value is None
    for value in itertools.chain([5.0] * 40, [1.0] * 31):
        median.add(value)
    assert median.value == 1.0


def test_least_squares_never_negative() -> None:
    rows = [((1.0, n), 10.0 - 0.5 * n) for n in range(1, 11)]  # falls with n: the best slope >= 0 is none
    coefficients, misfit = least_squares(rows, 2)
    assert coefficients[1] == 0
    assert coefficients[0] > 0
    assert misfit > 0


def random_metric(rng: random.Random, size: int) -> list[list[float]]:
    root = [[rng.gauss(0, 1) for _ in range(size)] for _ in range(size)]
    return [
        [sum(root[i][k] * root[j][k] for k in range(size)) + 0.1 * (i == j) for j in range(size)] for i in range(size)
    ]


def test_solve_solves() -> None:
    rng = random.Random(5)
    for size in (1, 2, 3, 4):
        metric, wanted = random_metric(rng, size), [rng.gauss(0, 1) for _ in range(size)]
        right = [sum(a * b for a, b in zip(row, wanted, strict=True)) for row in metric]
        assert solve(metric, right) == pytest.approx(wanted)


def test_projection_is_better_than_cutting_off() -> None:
    rng = random.Random(6)

    def distance(metric, point, other) -> float:
        d = [a - b for a, b in zip(point, other, strict=True)]
        return sum(d[i] * metric[i][j] * d[j] for i in range(len(d)) for j in range(len(d)))

    better = 0
    for _ in range(200):
        metric, point = random_metric(rng, 3), [rng.gauss(0, 1) for _ in range(3)]
        nearest = project(metric, point)
        assert min(nearest) >= 0
        cut = [max(0.0, value) for value in point]
        if min(point) >= 0:
            assert nearest == pytest.approx(point)
        better += distance(metric, point, nearest) < distance(metric, point, cut) - 1e-12
    assert better > 50
