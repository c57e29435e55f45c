"""Agreement, kappa and AUC: values worked by hand, undefined ones left undefined, intervals that know of dialogues."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppg_gym.judges.lab import agreement
from ppg_gym.judges.lab.agreement import Agreement, compare

LABELS = [1, 1, 0, 1, 0, 0]
SCORES = [0.9, 0.8, 0.6, 0.4, 0.3, 0.2]
APART = list(range(6))


def values(found: Agreement) -> tuple[float | None, float | None, float | None]:
    return found.agreement.value, found.kappa.value, found.auc.value


def test_golden_values() -> None:
    # Read at 0.5: 4 of 6 agree; half of both sides are "consistent", so chance agrees on half: (4/6 - 1/2) / (1/2).
    # Pairs: .9 and .8 beat all three inconsistent lines, .4 beats two.
    found = compare(SCORES, LABELS, APART)
    assert values(found) == pytest.approx((4 / 6, 1 / 3, 8 / 9))
    assert (found.lines, found.dialogues, found.consistent) == (6, 6, 0.5)
    # 20 both yes, 15 both no, 5 judge alone, 10 label alone: .70 observed, .50 by chance.
    pairs = [(1, 1)] * 20 + [(0, 0)] * 15 + [(1, 0)] * 5 + [(0, 1)] * 10
    scores, labels = zip(*pairs, strict=True)
    assert values(compare(scores, labels, range(50)))[:2] == pytest.approx((0.7, 0.4))


def test_a_tie_counts_half_and_a_graded_label_is_read_at_the_threshold() -> None:
    assert values(compare([0.5, 0.5, 0.7], [0.5, 0.25, 1], [0, 1, 2])) == pytest.approx((2 / 3, 0.0, 0.75))


@pytest.mark.parametrize(
    ("scores", "expected"),
    [(LABELS, (1, 1, 1)), ([1 - x for x in LABELS], (0, -1, 0)), ([1] * 6, (0.5, 0, 0.5)), ([0] * 6, (0.5, 0, 0.5))],
)
def test_perfect_opposite_and_constant_judges(scores: list[float], expected: tuple[float, ...]) -> None:
    assert values(compare(scores, LABELS, APART)) == pytest.approx(expected)


def test_what_the_lines_do_not_determine_is_none_with_the_reason() -> None:
    found = compare([0.9, 0.2, 0.8], [1, 1, 1], [0, 1, 2])
    assert values(found) == (pytest.approx(2 / 3), 0.0, None)
    assert found.auc.reason == "every label says consistent"
    found = compare([0.1, 0.2], [0, 0], [0, 1])
    assert values(found) == (1.0, None, None)
    assert found.kappa.reason == "judge and labels call every line inconsistent"
    assert values(compare([], [], [])) == (None, None, None)
    found = compare(SCORES, LABELS, [0] * 6)
    assert (found.agreement.low, found.agreement.reason) == (None, "one dialogue has no interval")
    found = compare(SCORES[:2], [1, 0], [0, 1])  # half of the resamples hold one dialogue twice
    assert (found.auc.value, found.auc.low) == (1.0, None)
    assert "of one class only" in found.auc.reason


def test_the_interval_is_wider_when_lines_of_a_dialogue_are_alike() -> None:
    rng = np.random.default_rng(0)
    right = np.repeat(rng.random(40) < 0.7, 25)  # a dialogue is judged right throughout, or wrong
    labels = rng.integers(0, 2, 1000).astype(float)
    scores = np.where(right, labels, 1 - labels)
    clustered = compare(scores, labels, np.repeat(np.arange(40), 25).tolist())
    naive = compare(scores, labels, range(1000))
    for wide, narrow in ((clustered.agreement, naive.agreement), (clustered.auc, naive.auc)):
        assert wide.value == narrow.value
        assert wide.low < wide.value < wide.high
        assert wide.high - wide.low == pytest.approx(5 * (narrow.high - narrow.low), rel=0.2)  # sqrt(25)


def test_the_same_seed_gives_the_same_interval_whatever_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    once = compare(SCORES * 20, LABELS * 20, range(120), seed=5)
    monkeypatch.setattr(agreement, "_CELLS", 1200)
    assert compare(SCORES * 20, LABELS * 20, range(120), seed=5) == once
    assert compare(SCORES * 20, LABELS * 20, range(120), seed=6) != once


def by_counting(scores: list[float], labels: list[int]) -> tuple[float, float, float]:
    """Return agreement, kappa and AUC by their definitions, NaN where undefined."""
    judged, n = [int(score >= 0.5) for score in scores], len(scores)
    observed = sum(a == b for a, b in zip(judged, labels, strict=True)) / n
    chance = sum(judged.count(x) * labels.count(x) for x in (0, 1)) / n**2
    good = [score for score, label in zip(scores, labels, strict=True) if label]
    bad = [score for score, label in zip(scores, labels, strict=True) if not label]
    won = sum((g > b) + (g == b) / 2 for g in good for b in bad)
    kappa = (observed - chance) / (1 - chance) if chance < 1 else np.nan
    return observed, kappa, won / (len(good) * len(bad)) if good and bad else np.nan


lines = st.tuples(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), st.integers(0, 1), st.integers(0, 4))


@settings(max_examples=30, deadline=None)
@given(st.lists(lines, min_size=2, max_size=30))
def test_a_resample_is_the_lines_of_the_dialogues_drawn(rows: list[tuple[float, int, int]]) -> None:
    scores, labels, dialogues = (np.array(column) for column in zip(*rows, strict=True))
    _, cluster = np.unique(dialogues, return_inverse=True)
    n = cluster.max() + 1
    statistics = agreement._Statistics(scores, scores >= 0.5, labels == 1, cluster)
    weights = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=5)
    for weight, *drawn in zip(weights, *statistics(weights.astype(float)), strict=True):
        times = weight[cluster]
        expected = by_counting(np.repeat(scores, times).tolist(), np.repeat(labels, times).tolist())
        assert drawn == pytest.approx(expected, nan_ok=True)


def test_wrong_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected scores in \[0, 1\], got nan"):
        compare([float("nan")], [1], [0])
    with pytest.raises(ValueError, match=r"expected labels in \[0, 1\], got 2"):
        compare([1], [2], [0])
    with pytest.raises(ValueError, match="got 1, 2 and 1"):
        compare([1], [1, 0], [0])
    with pytest.raises(ValueError, match="at least 1 resample"):
        compare([1], [1], [0], resamples=0)
