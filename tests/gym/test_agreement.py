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
    for dialogues in ([0] * 6, [0, 0, 1, 1, 2, 2]):
        found = compare(SCORES, LABELS, dialogues)
        assert (found.agreement.low, found.agreement.reason) == (None, "fewer than 4 dialogues are too few to say")
    found = compare([0.9, 0.2, 0.8, 0.1], [1, 1, 1, 1], range(4))  # kappa is 0 whatever the judge says
    assert (found.kappa.value, found.kappa.low, found.kappa.reason) == (0.0, None, "every label says consistent")


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


def test_a_judge_that_was_always_right_is_not_right_for_certain() -> None:
    found = compare(LABELS * 10, LABELS * 10, range(60))
    for one, least in ((found.agreement, 0.9), (found.kappa, 0.8), (found.auc, 0.9)):
        assert one.value == one.high == 1
        assert least < one.low < 1


def test_the_interval_is_the_same_whatever_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    once = compare(SCORES * 20, LABELS * 20, range(120))
    monkeypatch.setattr(agreement, "_CELLS", 1200)
    assert compare(SCORES * 20, LABELS * 20, range(120)) == once


@pytest.mark.parametrize(("freedom", "expected"), [(5, 2.570582), (10, 2.228139), (65, 1.997138), (1000, 1.962339)])
def test_the_t_quantile(freedom: int, expected: float) -> None:
    assert agreement._quantile(freedom) == pytest.approx(expected, abs=2e-6)


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
def test_a_weight_is_how_often_the_lines_of_a_dialogue_count(rows: list[tuple[float, int, int]]) -> None:
    scores, labels, dialogues = (np.array(column) for column in zip(*rows, strict=True))
    _, cluster = np.unique(dialogues, return_inverse=True)
    n = cluster.max() + 1
    statistics = agreement._Statistics(scores, scores >= 0.5, labels == 1, cluster, np.ones(len(rows)))
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
