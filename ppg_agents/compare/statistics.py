"""Intervals, paired differences and p-values of methods that were evaluated on the same personas.

Two things vary: the personas and the training seeds. A mean's variance is clustered by both (Cameron, Gelbach & Miller
2011, Journal of Business & Economic Statistics 29(2)), and its t distribution has the degrees of freedom that the two
parts leave (Satterthwaite 1946), about as many as there are seeds where these decide. With one seed only the personas
vary, and an interval says nothing about another training run. Arrays in, numbers out.

For shares of resamples there is a bootstrap over both as well (the pigeonhole bootstrap, Owen 2007, Annals of Applied
Statistics 1(2)). It draws one seed and one persona fewer than there are, which gives a resampled mean the variance of
the mean (McCarthy & Snowden 1985); its percentiles are too narrow with few seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

Array = NDArray[np.float64]
Interval = tuple[float, float]
RESAMPLES = 10_000


@dataclass(frozen=True)
class Scores:
    """A method's scores, for each of S seeds and P personas.

    Attributes:
        seeds: The S training seeds.
        scores: Sum of the judge's scores, [S, P].
        judged: Number of judged turns, [S, P].
    """

    seeds: tuple[int, ...]
    scores: Array
    judged: Array

    @property
    def mean(self) -> float:
        """Mean score of the judged turns, NaN without any."""
        return ratio(self.scores.sum(), self.judged.sum())


@dataclass(frozen=True)
class Difference:
    """The difference of two methods.

    Attributes:
        value: One mean minus the other, over the seeds that both have.
        ci95: Its 95% interval.
        p: Two-sided p-value of no difference.
    """

    value: float
    ci95: Interval
    p: float


def table(evaluations: Mapping[int, Mapping[str, Any]], personas: Sequence[str], turn: int | None = None) -> Scores:
    """Return evaluations as arrays.

    Args:
        evaluations: Held-out results by seed, each with its ``personas``.
        personas: P ids in the order of the columns; a persona that was not played has no judged turns.
        turn: The only turn to count, from 0; None for all.
    """
    scores, judged = (np.zeros((len(evaluations), len(personas))) for _ in range(2))
    which = slice(None) if turn is None else slice(turn, turn + 1)
    for s, evaluation in enumerate(evaluations.values()):
        for p, name in enumerate(personas):
            played = evaluation["personas"].get(name, {"scores": [], "judged": []})
            scores[s, p], judged[s, p] = sum(played["scores"][which]), sum(played["judged"][which])
    return Scores(tuple(evaluations), scores, judged)


def weights(seeds: int, personas: int, resamples: int = RESAMPLES, seed: int = 0) -> tuple[Array, Array]:
    """Return how often each seed [R, S] and each persona [R, P] is drawn in each resample."""
    rng = np.random.default_rng(seed)

    def draw(n: int) -> Array:
        return np.ones((resamples, 1)) if n == 1 else rng.multinomial(n - 1, [1 / n] * n, resamples).astype(float)

    return draw(seeds), draw(personas)


def resampled(scores: Scores, drawn: tuple[Array, Array]) -> Array:
    """Return the mean of every resample, [R]; NaN where no judged turn was drawn."""
    by_seed, by_persona = drawn
    total = ((by_seed @ scores.scores) * by_persona).sum(1)
    count = ((by_seed @ scores.judged) * by_persona).sum(1)
    means: Array = np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0)
    return means


def interval(means: Array) -> Interval:
    """Return the 95% percentile interval of resampled means; NaN when there are none."""
    known = means[np.isfinite(means)]
    if not known.size:
        return (math.nan, math.nan)
    low, high = np.quantile(known, (0.025, 0.975))
    return (float(low), float(high))


def mean_interval(scores: Scores) -> Interval:
    """Return the 95% interval of a method's mean; NaN without a judged turn, or with one seed and one persona."""
    return _interval(scores.mean, *_error(_influence(scores), scores.judged))


def difference(one: Scores, other: Scores) -> Difference | None:
    """Return one method minus another, paired by seed and persona; p is not corrected yet.

    Args:
        one: A method's scores.
        other: Another method's, over the same personas.

    Returns:
        None when they have no seed in common, or nothing was judged.
    """
    common = [seed for seed in one.seeds if seed in other.seeds]
    a, b = only(one, common), only(other, common)
    value = a.mean - b.mean
    if not math.isfinite(value):
        return None
    error, freedom = _error(_influence(a) - _influence(b), a.judged + b.judged)
    if math.isnan(error):
        return Difference(value, (math.nan, math.nan), 1.0)
    p = float(2 * student.sf(abs(value) / error, freedom)) if error else float(value == 0)
    return Difference(value, _interval(value, error, freedom), p)


def _influence(scores: Scores) -> Array:
    """Return what each seed and persona contributes to the error of the mean, [S, P]; the sum is 0."""
    centred: Array = (scores.scores - scores.mean * scores.judged) / max(scores.judged.sum(), 1.0)
    return centred


def _error(influence: Array, judged: Array) -> tuple[float, float]:
    """Return the standard error of a mean, clustered by seed and by persona, and its degrees of freedom."""
    influence = influence[:, judged.sum(0) > 0]
    seeds, personas = influence.shape
    parts = [
        (n / (n - 1) * float((influence.sum(axis) ** 2).sum()), n - 1)
        for axis, n in ((1, seeds), (0, personas))
        if n > 1
    ]
    if not parts:
        return math.nan, math.nan
    both = float((influence**2).sum()) if len(parts) == 2 else 0.0  # is in both sums
    variance = max(sum(part for part, _ in parts) - both, *(part for part, _ in parts))
    scale = sum(part**2 / freedom for part, freedom in parts)
    return math.sqrt(variance), variance**2 / scale if scale else float(seeds + personas)


def _interval(value: float, error: float, freedom: float) -> Interval:
    if not math.isfinite(error):
        return (math.nan, math.nan)
    half = float(student.ppf(0.975, freedom)) * error
    return (value - half, value + half)


def only(scores: Scores, seeds: Sequence[int]) -> Scores:
    """Return the scores of some of the seeds."""
    rows = [scores.seeds.index(seed) for seed in seeds]
    return Scores(tuple(seeds), scores.scores[rows], scores.judged[rows])


def holm(p: Sequence[float]) -> list[float]:
    """Return p-values with Holm's familywise correction (Holm 1979, Scandinavian Journal of Statistics 6)."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    corrected, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = largest
    return corrected


def ratio(total: float, count: float) -> float:
    """Return ``total / count``, NaN without a count."""
    return float(total / count) if count else math.nan
