"""Intervals and paired differences."""

import math

import numpy as np
import pytest

from evaluation import tables


def test_bootstrap_covers_the_true_mean_as_often_as_it_says():
    generator = np.random.default_rng(11)
    covered = 0
    for trial in range(300):
        low, high = tables.bootstrap_interval(generator.exponential(2.0, 60), confidence=0.9, resamples=400, seed=trial)
        covered += low <= 2.0 <= high
    assert 0.83 <= covered / 300 <= 0.94  # a percentile interval of 60 skewed values falls a little short of 0.9


def test_bootstrap_agrees_with_the_normal_interval_and_repeats_itself():
    values = np.random.default_rng(2).normal(5, 3, 400)
    low, high = tables.bootstrap_interval(values)
    half = 1.96 * values.std() / math.sqrt(400)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)
    assert (low, high) == tables.bootstrap_interval(values)
    assert (low, high) != tables.bootstrap_interval(values, seed=1)
    assert (low, high) == tables.bootstrap_interval([*values, np.nan])
    narrow = tables.bootstrap_interval(values, confidence=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_bootstrap_draws_in_bounded_pieces(monkeypatch):
    monkeypatch.setattr(tables, "MEANS_AT_ONCE", 7)
    low, high = tables.bootstrap_interval([0.0, 1.0, 2.0], resamples=500, confidence=0.99)
    assert 0 <= low < 0.5 and 1.5 < high <= 2


def test_bootstrap_edge_cases():
    for values in ([], [3.0], [np.nan, np.nan, 1.0]):
        assert all(map(math.isnan, tables.bootstrap_interval(values)))
    assert tables.bootstrap_interval([2.0, 2.0]) == (2.0, 2.0)
    for values, options in (([1, np.inf], {}), ([1, 2], {"confidence": 1.0}), ([1, 2], {"resamples": 0})):
        with pytest.raises(ValueError):
            tables.bootstrap_interval(values, **options)


def test_paired_difference_uses_the_pairs():
    generator = np.random.default_rng(5)
    difficulty = generator.normal(0, 10, 200)
    first, second = difficulty + 0.5 + generator.normal(0, 0.1, 200), difficulty
    mean, low, high = tables.paired_difference(first, second)
    assert low < mean < high and 0.4 < low and high < 0.6  # the shared difficulty cancels
    assert tables.paired_difference(second, first)[0] == pytest.approx(-mean)
    with_gaps = tables.paired_difference([*first, np.nan, 1.0], [*second, 1.0, np.nan])
    assert with_gaps == (mean, low, high)
    assert all(map(math.isnan, tables.paired_difference([np.nan], [1.0])))
    with pytest.raises(ValueError, match="paired"):
        tables.paired_difference([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="finite"):
        tables.paired_difference([np.inf, 1.0], [np.inf, 2.0])
