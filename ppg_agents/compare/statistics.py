"""Scores of methods that were evaluated on the same personas: paired differences, corrected p-values, resamples.

Intervals and p-values are those of `ppg_agents.intervals`, clustered by training seed and by persona; with few seeds
there are none, as they would say nothing about another training. Arrays in, numbers out.

For shares of resamples there is a bootstrap over both (the pigeonhole bootstrap, Owen 2007, Annals of Applied
Statistics 1(2)). It draws one seed and one persona fewer than there are, which gives a resampled mean the variance of
the mean (McCarthy & Snowden 1985); its percentiles are too narrow with few seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ppg_agents.intervals import Array, Interval, clustered

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
        ci95: Its 95% interval; NaN with too few seeds or personas to say.
        p: Two-sided p-value of no difference; NaN as well.
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


def mean_interval(scores: Scores) -> Interval:
    """Return the 95% interval of a method's mean; NaN with too few seeds or personas to say."""
    return clustered([(scores.scores, scores.judged)], [1.0], trained=True).ci95


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
    found = clustered([(a.scores, a.judged), (b.scores, b.judged)], [1.0, -1.0], trained=True)
    return Difference(value, found.ci95, found.p)


def residual_intervals(methods: Sequence[Scores]) -> list[Interval]:
    """Return the 95% interval of every method's mean less the mean over the methods, paired by seed and persona."""
    tables, share = [(one.scores, one.judged) for one in methods], 1 / len(methods)
    return [
        clustered(tables, [float(j == k) - share for j in range(len(methods))], trained=True).ci95
        for k in range(len(methods))
    ]


def only(scores: Scores, seeds: Sequence[int]) -> Scores:
    """Return the scores of some of the seeds."""
    rows = [scores.seeds.index(seed) for seed in seeds]
    return Scores(tuple(seeds), scores.scores[rows], scores.judged[rows])


def holm(p: Sequence[float]) -> list[float]:
    """Return p-values with Holm's familywise correction (Holm 1979, Scandinavian Journal of Statistics 6).

    Args:
        p: Of the family, which in every table and figure here is a column: all pairs of methods in one domain at one
            size. NaN, which counts as 1, where there is too little to say, and stays NaN.
    """
    order = sorted(range(len(p)), key=lambda i: (math.isnan(p[i]), p[i]))
    corrected, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i])) if not math.isnan(p[i]) else math.nan
        corrected[i] = largest
    return corrected


def ratio(total: float, count: float) -> float:
    """Return ``total / count``, NaN without a count."""
    return float(total / count) if count else math.nan
