"""Intervals: closed forms, what is too little to say, and that they hold the truth where others do not."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import norm
from scipy.stats import t as student

from ppg_agents.intervals import Array, clustered, resampled_interval
from ppg_gym.judges.lab import agreement


def one_policy(scores: Array, counts: Array | float = 8.0) -> tuple[float, float]:
    counts = np.broadcast_to(np.asarray(counts, dtype=float), scores.shape)
    return clustered([((scores * counts)[None], counts[None])], [1.0], trained=False).ci95


def test_equal_scores_are_a_proportion_with_one_success_and_one_failure_added() -> None:
    p = 21 / 22
    half = float(student.ppf(0.975, 21)) * math.sqrt(p * (1 - p) / 21)
    assert one_policy(np.ones(20)) == pytest.approx((p - half, 1.0))
    low, high = one_policy(np.full(20, 0.5))
    half = float(student.ppf(0.975, 21)) * math.sqrt(2 * 0.25 / (22 * 21))
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half))


def test_with_many_personas_it_is_the_usual_interval_over_personas_not_turns() -> None:
    scores = np.random.default_rng(0).random(2000)
    low, high = one_policy(scores)
    half = 1.96 * scores.std() / math.sqrt(2000)
    assert (low, high) == pytest.approx((scores.mean() - half, scores.mean() + half), abs=1e-3)
    assert one_policy(scores, 1.0) == pytest.approx((low, high))


@pytest.mark.parametrize("personas", [0, 1, 3])
def test_too_few_personas_are_too_few_to_say(personas: int) -> None:
    assert np.isnan(one_policy(np.linspace(0.1, 0.9, personas))).all()
    unplayed = np.array([8.0] * personas + [0.0] * 5)
    assert np.isnan(one_policy(np.full(personas + 5, 0.5), unplayed)).all()
    assert not np.isnan(one_policy(np.full(4, 0.5))).any()


def test_too_few_seeds_are_too_few_to_say_of_another_training() -> None:
    table = np.full((5, 10), 0.5), np.ones((5, 10))
    five = clustered([table], [1.0], trained=True)
    four = clustered([(table[0][:4], table[1][:4])], [1.0], trained=True)
    assert not np.isnan(five.ci95).any()
    assert np.isnan([*four.ci95, four.p]).all()
    assert four.value == 0.5


def test_seeds_that_do_not_differ_leave_the_interval_of_one() -> None:
    scores = np.tile(np.linspace(0.2, 0.8, 10), (6, 1))
    seeds = clustered([(scores, np.ones((6, 10)))], [1.0], trained=True).ci95
    assert seeds == pytest.approx(one_policy(scores[0]))


def test_seeds_that_decide_have_few_degrees_of_freedom() -> None:
    means = np.array([0.46, 0.48, 0.5, 0.52, 0.54])
    found = clustered([(np.tile(means[:, None], 2000), np.ones((5, 2000)))], [1.0], trained=True)
    error = means.std(ddof=1) / math.sqrt(5)
    assert found.ci95 == pytest.approx((0.5 - 4.303 * error, 0.5 + 4.303 * error), abs=1e-3)  # t with 2


def test_both_clusterings_count_and_p_is_one_less_the_level_that_just_reaches_zero() -> None:
    rng = np.random.default_rng(2)
    effects = rng.normal(0, 0.1, (8, 1)) + rng.normal(0, 0.1, (1, 60)) + rng.normal(0, 0.1, (8, 60))
    counts = np.ones((8, 60))
    found = clustered([(0.5 + effects, counts), (0.42 * counts, counts)], [1.0, -1.0], trained=True)
    (by_persona, of_personas), (by_seed, of_seeds) = found.parts
    assert (of_personas, of_seeds) == (61, 3)
    assert by_seed == pytest.approx(effects.mean(1).var(ddof=1) / 8, rel=0.1)
    assert by_persona == pytest.approx(effects.mean(0).var(ddof=1) / 60 + 2 / (62 * 61), rel=0.2)
    half = math.hypot(*(t * math.sqrt(part) for t, part in ((1.9996, by_persona), (3.1824, by_seed))))
    assert found.ci95 == pytest.approx((found.value - half, found.value + half), abs=1e-5)
    edge = replace(found, value=half)
    assert edge.p == pytest.approx(0.05, abs=1e-4)
    assert replace(found, value=0.0).p == 1.0
    assert replace(found, value=1e6).p < 1e-9


def test_a_difference_is_paired_and_never_certain() -> None:
    rng = np.random.default_rng(0)
    base, counts = rng.random((5, 50)) * 0.5, np.ones((5, 50))
    same = clustered([(base, counts), (base, counts)], [1.0, -1.0], trained=True)
    assert (same.value, same.p) == (0.0, 1.0)
    half = float(student.ppf(0.975, 51)) * math.sqrt(2 / (52 * 51))  # two added personas, 1 apart from 0 each
    assert same.ci95 == pytest.approx((-half, half))
    more = clustered([(base + 0.4, counts), (base, counts)], [1.0, -1.0], trained=True)
    less = clustered([(base, counts), (base + 0.4, counts)], [1.0, -1.0], trained=True)
    assert more.ci95 == pytest.approx((-less.ci95[1], -less.ci95[0]))
    assert more.ci95[0] > 0
    assert more.p == less.p < 1e-6


def test_scores_outside_of_0_to_1_widen_what_is_possible() -> None:
    low, high = one_policy(np.linspace(-3, 7, 30))
    assert low > -3
    assert (low + high) / 2 == pytest.approx(2)
    assert one_policy(np.full(20, 5.0))[1] == 5.0


def test_without_a_score_there_is_no_mean() -> None:
    nothing = clustered([(np.zeros((5, 3)), np.zeros((5, 3)))], [1.0], trained=True)
    assert np.isnan([nothing.value, *nothing.ci95, nothing.p]).all()


def test_it_holds_where_a_rare_persona_fails() -> None:
    rng = np.random.default_rng(0)
    batches = (rng.random((600, 20)) >= 0.03).astype(float)
    held = [low <= 0.97 <= high for low, high in map(one_policy, batches)]
    assert np.mean(held) >= 0.95  # a bootstrap holds 46%: in as many batches somebody fails at all


def test_the_judges_lab_has_the_same_interval() -> None:
    rng = np.random.default_rng(1)
    right = rng.random((12, 5)) < rng.beta(4, 2, (12, 1))
    labels = np.tile([1.0, 0.0, 1.0, 0.0, 1.0], (12, 1))
    scores = np.where(right, labels, 1 - labels)
    found = agreement.compare(scores.ravel().tolist(), labels.ravel().tolist(), np.repeat(np.arange(12), 5).tolist())
    expected = one_policy(right.mean(1), 5.0)
    assert (found.agreement.low, found.agreement.high) == pytest.approx(expected, abs=1e-6)


def test_a_resampled_interval_of_a_mean_and_its_corrections() -> None:
    rng = np.random.default_rng(0)
    sample = rng.normal(size=200)
    drawn = sample[rng.integers(0, 200, (20_000, 200))].mean(1)
    without = (sample.sum() - sample) / 199
    low, high = resampled_interval(float(sample.mean()), drawn, without)
    half = 1.96 * sample.std() / math.sqrt(200)
    assert (low, high) == pytest.approx((sample.mean() - half, sample.mean() + half), abs=0.012)
    # Nearly all resamples are above the estimate: it is biased, and the corrected end lies far below the percentile.
    grid = norm.ppf((np.arange(1000) + 0.5) / 1000)
    low, high = resampled_interval(-1.0, grid, without - without.mean())
    assert low == pytest.approx(-3.2905, abs=1e-4)  # the lowest of 1,000: level Φ(−2 − 1.96) is below 0.001
    assert high == pytest.approx(1.96, abs=0.01)  # percentiles reach further on this side


def test_a_resampled_interval_without_anything_to_go_by() -> None:
    some = np.linspace(0, 1, 50)
    assert np.isnan(resampled_interval(math.nan, some, some)).all()
    assert np.isnan(resampled_interval(0.5, np.full(9, np.nan), some)).all()
    assert np.isnan(resampled_interval(0.5, some, np.full(9, np.nan))).all()
    assert resampled_interval(0.5, np.r_[some, -np.inf, np.nan], some)[0] < 0.1
    assert resampled_interval(2.0, some, some) == (0.0, 1.0)  # no resample reaches the estimate
