"""Intervals of means, against theory and hand values."""

import math
import random

import pytest

from plumbing.statistics import bootstrap, mean_interval, quartiles


def test_the_bootstrap_is_as_wide_as_theory_says():
    """For a mean of 400 problems the interval is close to +-1.96 standard errors."""
    generator = random.Random(1)
    values = [generator.random() for _ in range(400)]
    low, high = bootstrap([values], seed=3)
    mean = sum(values) / 400
    error = math.sqrt(sum((value - mean) ** 2 for value in values)) / 400
    assert low == pytest.approx(mean - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.15 * error)
    assert bootstrap([values], seed=3) == [low, high] != bootstrap([values], seed=4)


def test_the_bootstrap_weighs_data_sets_alike():
    values = [0.0, 1.0, 1.0, 0.5]
    low, high = bootstrap([values], seed=3)
    assert bootstrap([values, [1.0]], seed=3) == pytest.approx([(low + 1) / 2, (high + 1) / 2])
    assert bootstrap([[0.25]]) == [0.25, 0.25]


def test_the_interval_over_seeds_is_students():
    """Three runs with the normal quantile give an interval less than half as wide as it is."""
    mean, (low, high) = mean_interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert high - mean == pytest.approx(mean - low) == pytest.approx(4.303 / 3**0.5, rel=1e-3)


def test_a_single_run_has_no_spread():
    assert mean_interval([5.0]) == (5.0, [5.0, 5.0])


def test_quartiles_lie_between_neighbours():
    assert quartiles([4.0, 1.0, 3.0, 2.0]) == [1.75, 2.5, 3.25]
    assert quartiles([7]) == [7.0, 7.0, 7.0]
