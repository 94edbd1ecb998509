"""Expected output: what ended lately says about what still runs."""

from __future__ import annotations

import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gmanager.planner.output_lengths import OutputLengths


def filled(lengths) -> OutputLengths:
    known = OutputLengths()
    for length in lengths:
        known.ended(length)
    return known


def test_a_fresh_request_is_expected_to_be_as_long_as_the_mean() -> None:
    rng = random.Random(1)
    lengths = [rng.randint(1, 600) for _ in range(1000)]
    assert filled(lengths).remaining(0, 10_000) == pytest.approx(statistics.mean(lengths), abs=1)


def test_what_is_longer_than_most_is_judged_by_the_long_ones() -> None:
    known = filled([100] * 50 + [1000] * 50)
    assert known.remaining(0, 10_000) == 550
    assert known.remaining(100, 10_000) == 900
    assert known.remaining(999, 10_000) == 1


def test_nothing_is_expected_beyond_the_limit() -> None:
    known = filled([100] * 50 + [1000] * 50)
    assert known.remaining(100, 300) == 300
    assert known.remaining(0, 300) == (100 + 300) // 2
    assert known.remaining(50, 0) == 0


def test_with_too_few_examples_as_much_again_is_expected() -> None:
    assert OutputLengths().remaining(40, 1000) == 40
    assert OutputLengths().remaining(0, 1000) == 1
    known = filled([100] * 500 + [5000] * 3)
    assert known.remaining(800, 10_000) == 800


def test_old_examples_are_forgotten() -> None:
    known = filled([1000] * 1000)
    for _ in range(1000):
        known.ended(10)
    assert known.remaining(0, 10_000) == 10


@given(st.lists(st.integers(0, 5000), max_size=60), st.integers(0, 6000), st.integers(0, 6000))
def test_it_is_the_clipped_mean_of_the_longer_ones(lengths, generated, at_most) -> None:
    longer = [min(length, generated + at_most) for length in lengths if length > generated]
    remaining = filled(lengths).remaining(generated, at_most)
    assert 0 <= remaining <= at_most
    if len(longer) >= 10:
        assert remaining == pytest.approx(statistics.mean(longer) - generated, abs=1)
