"""Intervals, paired differences and p-values of methods that were evaluated on the same personas.

Two things vary: the personas and the training seeds. Both are resampled, independently of one another (the pigeonhole
bootstrap, Owen 2007, Annals of Applied Statistics 1(2)), one fewer of each than there are, which makes the variance of
a mean unbiased (McCarthy & Snowden 1985). With one seed only the personas vary, and the interval says nothing about
training. Arrays in, numbers out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Interval = tuple[float, float]
RESAMPLES = 10_000


@dataclass(frozen=True)
class Scores:
    """What a method scored: per seed and persona.

    Attributes:
        seeds: S of them.
        scores: The judge's, added up, [S, P].
        judged: Turns, [S, P].
    """

    seeds: tuple[int, ...]
    scores: Array
    judged: Array

    @property
    def mean(self) -> float:
        """Mean score of a judged turn, NaN without one."""
        return ratio(self.scores.sum(), self.judged.sum())


@dataclass(frozen=True)
class Difference:
    """A method against the best of its column.

    Attributes:
        value: Its mean less the best's, over the seeds that both have.
        ci95: 95% percentile interval.
        p: Two-sided, of no difference; corrected for the number of comparisons.
    """

    value: float
    ci95: Interval
    p: float


def table(evaluations: Mapping[int, Mapping[str, Any]], personas: Sequence[str], turn: int | None = None) -> Scores:
    """Return evaluations as arrays.

    Args:
        evaluations: Held-out results by seed, with ``personas``.
        personas: P ids, the order of the columns; who was not played has no judged turns.
        turn: Count only this one, from 0; None for all.
    """
    scores, judged = (np.zeros((len(evaluations), len(personas))) for _ in range(2))
    which = slice(None) if turn is None else slice(turn, turn + 1)
    for s, evaluation in enumerate(evaluations.values()):
        for p, name in enumerate(personas):
            found = evaluation["personas"].get(name, {"scores": [], "judged": []})
            scores[s, p], judged[s, p] = sum(found["scores"][which]), sum(found["judged"][which])
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
    found = means[np.isfinite(means)]
    if not found.size:
        return (math.nan, math.nan)
    low, high = np.quantile(found, (0.025, 0.975))
    return (float(low), float(high))


def mean_interval(scores: Scores, resamples: int = RESAMPLES) -> Interval:
    """Return the 95% interval of a method's mean."""
    return interval(resampled(scores, weights(scores.scores.shape[0], scores.scores.shape[1], resamples)))


def difference(one: Scores, other: Scores, resamples: int = RESAMPLES) -> Difference | None:
    """Return one method less another, paired by seed and persona; p is not corrected yet.

    Args:
        one: A method.
        other: Another, over the same personas.
        resamples: Of the bootstrap.

    Returns:
        None when they have no seed in common.
    """
    common = [seed for seed in one.seeds if seed in other.seeds]
    if not common:
        return None
    a, b = _only(one, common), _only(other, common)
    drawn = weights(len(common), a.scores.shape[1], resamples)
    gap = resampled(a, drawn) - resampled(b, drawn)
    gap = gap[np.isfinite(gap)]
    tail = 1 + min(int((gap >= 0).sum()), int((gap <= 0).sum()))
    return Difference(a.mean - b.mean, interval(gap), min(1.0, 2 * tail / (1 + len(gap))))


def _only(scores: Scores, seeds: Sequence[int]) -> Scores:
    rows = [scores.seeds.index(seed) for seed in seeds]
    return Scores(tuple(seeds), scores.scores[rows], scores.judged[rows])


def holm(p: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number (Holm 1979, Scandinavian Journal of Statistics 6): familywise."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    corrected, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = largest
    return corrected


def ratio(total: float, count: float) -> float:
    """Return ``total / count``, NaN without a count."""
    return float(total / count) if count else math.nan
