"""95% intervals and p-values: one way for evaluations, comparisons, figures and the advisor. Arrays in, numbers out.

**Means of scores** (`clustered`). Turns are not independent: those of a persona are alike, and so are those of one
trained policy. The variance of a mean is clustered by both (Cameron, Gelbach & Miller 2011, Journal of Business &
Economic Statistics 29(2)). Each part has a t distribution of its own, and the half widths are added as squares (Zou &
Donner 2008, Statistics in Medicine 27(10)). Own is what makes it hold with few clusters, chosen by simulation
(``scripts/coverage.py``, docs/comparison.md):

- Two personas are added that nobody played, one with the best score and one with the worst, as Agresti & Coull (1998,
  The American Statistician 52(2)) add trials to a proportion. So a mean of 20 equal scores is not taken for certain,
  and a few personas that are quite unlike the others are allowed for.
- Seeds count for fewer degrees of freedom than there are: (S + 1) / 3 for S of them, because their effects may be
  skewed.
- With fewer than `FEWEST_PERSONAS` personas or `FEWEST_SEEDS` seeds there is no interval: too few to say.

**Anything else that can be resampled** (`resampled_interval`): percentiles of a bootstrap, bias-corrected.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import stdtrit

Array = NDArray[np.float64]
Interval = tuple[float, float]

FEWEST_PERSONAS = 4
FEWEST_SEEDS = 5  # all five may fall on one side of two equally likely outcomes, but in 1 case of 16 only
SMALLEST = 1e-12  # p-value
UNKNOWN: Interval = (math.nan, math.nan)


@dataclass(frozen=True)
class Mean:
    """A mean, or a sum of means with signs, as `clustered` sees it.

    Attributes:
        value: The mean with the two added personas, the centre of the interval.
        parts: Per clustering, the variance and its degrees of freedom; empty with too few clusters.
        least: The lowest value that scores allow.
        most: The highest.
    """

    value: float
    parts: tuple[tuple[float, float], ...] = ()
    least: float = -math.inf
    most: float = math.inf

    @property
    def ci95(self) -> Interval:
        """The 95% interval, NaN with too few clusters."""
        if not self.parts:
            return UNKNOWN
        half = self._half(0.05)
        return (max(self.value - half, self.least), min(self.value + half, self.most))

    @property
    def p(self) -> float:
        """The two-sided p-value of a mean of 0, NaN with too few clusters: 1 less the level of the interval up to 0."""
        if not self.parts:
            return math.nan
        gap = abs(self.value)
        if gap <= self._half(1.0) or gap >= self._half(SMALLEST):
            return 1.0 if gap <= self._half(1.0) else SMALLEST
        return math.exp(float(brentq(lambda p: self._half(math.exp(p)) - gap, math.log(SMALLEST), 0.0)))

    def _half(self, p: float) -> float:
        """Return half the width of the interval of level 1 − p."""
        return math.sqrt(sum(variance * float(stdtrit(freedom, p / 2)) ** 2 for variance, freedom in self.parts))


def clustered(tables: Sequence[tuple[Array, Array]], factors: Sequence[float], *, trained: bool) -> Mean:
    """Return Σ_k factor_k · Σ scores_k / Σ counts_k with its error, clustered by seed and by persona.

    Scores lie in [0, 1], or in the range that was seen if that is wider.

    Args:
        tables: Per method, the scores added up and how many they are, both [S, P]: S seeds of training, P personas,
            the same for all. A persona without a score in any method is left out.
        factors: 1 for a mean; 1 and -1 for a difference.
        trained: Whether the claim is about training, so that seeds vary. If not, S must be 1, and the claim is about
            the one policy that was evaluated.

    Returns:
        The mean; its value is NaN where a method has no score.
    """
    played = sum(counts.sum(0) for _, counts in tables) > 0
    seeds, personas = tables[0][0].shape[0], int(played.sum())
    value, influence, ends = 0.0, np.zeros((seeds, personas + 2)), np.zeros(2)
    for (all_scores, all_counts), factor in zip(tables, factors, strict=True):
        scores, counts = all_scores[:, played], all_counts[:, played]
        if not counts.sum():
            return Mean(math.nan)
        means = np.divide(scores, counts, out=np.zeros(scores.shape), where=counts > 0)
        limits = np.array([min(0.0, means.min()), max(1.0, means.max())])[:: 1 if factor > 0 else -1]
        added = np.full((seeds, 2), counts.mean())
        scores, counts = np.hstack([scores, added * limits]), np.hstack([counts, added])
        mean = float(scores.sum() / counts.sum())
        value += factor * mean
        influence += factor * (scores - mean * counts) / counts.sum()
        ends += factor * limits
    if personas < FEWEST_PERSONAS or (trained and seeds < FEWEST_SEEDS):
        return Mean(value)
    return Mean(value, _parts(influence), *map(float, ends))


def _parts(influence: Array) -> tuple[tuple[float, float], ...]:
    """Return the variance of a sum of influences [S, P] by persona, and by seed where there are several."""
    seeds, personas = influence.shape
    by_persona = personas / (personas - 1) * float((influence.sum(0) ** 2).sum())
    if seeds == 1:
        return ((by_persona, personas - 1),)
    by_seed = seeds / (seeds - 1) * float((influence.sum(1) ** 2).sum())
    both = seeds * float(influence.var(0, ddof=1).sum())  # what varies within a persona is in either part
    return ((max(by_persona - both, 0.0), personas - 1), (by_seed, (seeds + 1) / 3))


def resampled_interval(value: float, drawn: Array, left_out: Array) -> Interval:
    """Return the 95% interval of an estimate that can be resampled: from percentiles or BCa, whichever reaches further.

    Percentiles of a bootstrap are off where the estimate is biased or skewed. The bias-corrected and accelerated
    bootstrap (BCa; Efron 1987, Journal of the American Statistical Association 82(397)) mends that, but not where there
    are few clusters and much noise. So the further of both ends is taken (own; ``scripts/coverage.py``).

    Args:
        value: The estimate.
        drawn: That of every resample, [R], infinite where it may be anything; NaN does not count.
        left_out: That without each of the clusters in turn, [P]; what is not finite does not count.

    Returns:
        (low, high), NaN without an estimate or a resample.
    """
    drawn, left_out = drawn[~np.isnan(drawn)], left_out[np.isfinite(left_out)]
    if not drawn.size or not left_out.size or not math.isfinite(value):
        return UNKNOWN
    pairs = [(level, _corrected(level, value, drawn, left_out)) for level in (0.025, 0.975)]
    low, high = (np.quantile(drawn, levels, method="inverted_cdf") for levels in pairs)
    return (float(low.min()), float(high.max()))


def _corrected(level: float, value: float, drawn: Array, left_out: Array) -> float:
    """Return the level that BCa takes of the resamples in place of the given one."""
    normal, extreme = NormalDist(), float(level > 0.5)
    below = float(np.mean(drawn < value) + np.mean(drawn == value) / 2)
    if not 0 < below < 1:
        return extreme
    steps = left_out.mean() - left_out
    square = float((steps**2).sum())
    acceleration = float((steps**3).sum()) / (6 * square**1.5) if square > 0 else 0.0
    bias = normal.inv_cdf(below)
    reach = bias + normal.inv_cdf(level)
    return normal.cdf(bias + reach / (1 - acceleration * reach)) if acceleration * reach < 1 else extreme
