"""How well a judge's scores agree with labels: agreement, Cohen's kappa and ROC AUC, with bootstrap intervals.

Numbers in, numbers out: nothing here reads a file or calls a judge. A statistic that the lines do not determine is
None, with the reason.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

THRESHOLD = 0.5
"""Scores and labels of at least this much are read as "consistent" by agreement and kappa; so are labels by AUC."""

RESAMPLES = 1_000
_CELLS = 4_000_000  # weights held at a time: resamples x lines
_UNDEFINED = 0.05  # share of resamples that may leave a statistic undefined

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Estimate:
    """A statistic and its 95% interval.

    Attributes:
        value: None when it is undefined.
        low: Lower end of the interval; None when there is none.
        high: Upper end.
        reason: Why the value, or else the interval, is None; otherwise empty.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    reason: str = ""

    def text(self) -> str:
        """Return ``0.812 [0.770, 0.851]``, or dashes for what is undefined."""
        if self.value is None:
            return "-"
        interval = "-" if self.low is None or self.high is None else f"{self.low:.3f}, {self.high:.3f}"
        return f"{self.value:.3f} [{interval}]"


@dataclass(frozen=True)
class Agreement:
    """How far a judge's scores agree with labels on the same lines.

    Attributes:
        lines: Lines with both.
        dialogues: The dialogues these come from.
        consistent: Share of the labels that say "consistent"; None without lines.
        agreement: Share of the lines on which score and label fall on the same side of the threshold.
        kappa: Cohen's kappa of the same: agreement beyond chance.
        auc: Area under the ROC curve of the raw score: the chance that a consistent line scores higher than an
            inconsistent one, ties counting half.
    """

    lines: int
    dialogues: int
    consistent: float | None
    agreement: Estimate
    kappa: Estimate
    auc: Estimate

    def to_dict(self) -> dict[str, Any]:
        """Return nested plain dicts."""
        return asdict(self)


def compare(
    scores: Sequence[float],
    labels: Sequence[float],
    dialogues: Sequence[Hashable],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Agreement:
    """Compare scores with labels.

    The intervals are percentiles of a cluster bootstrap: whole dialogues are drawn with replacement, because the lines
    of a dialogue are not independent (Field and Welsh 2007, "Bootstrapping clustered data"). The same seed draws the
    same dialogues, so that two judges of the same lines are compared on the same resamples.

    Args:
        scores: The judge's, in [0, 1].
        labels: In [0, 1], binary or graded; 1 is consistent.
        dialogues: The dialogue of each line.
        seed: Seed of the bootstrap.
        resamples: How many.

    Raises:
        ValueError: Lengths differ, a number is not in [0, 1], or there are no resamples.
    """
    given, truth = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    if not given.shape == truth.shape == (len(dialogues),):
        raise ValueError(
            f"expected one score, label and dialogue per line, got {given.size}, {truth.size} and {len(dialogues)}"
        )
    for name, numbers in (("scores", given), ("labels", truth)):
        wrong = numbers[~((numbers >= 0) & (numbers <= 1))]
        if wrong.size:
            raise ValueError(f"expected {name} in [0, 1], got {wrong[0]}")
    if resamples < 1:
        raise ValueError(f"expected at least 1 resample, got {resamples}")
    if not given.size:
        nothing = Estimate(None, reason="no line has both a label and a score")
        return Agreement(0, 0, None, nothing, nothing, nothing)
    number = {name: i for i, name in enumerate(dict.fromkeys(dialogues))}
    cluster = np.array([number[name] for name in dialogues])
    judged, actual = given >= THRESHOLD, truth >= THRESHOLD
    one_class = len(set(actual)) == 1
    only = "consistent" if actual[0] else "inconsistent"
    no_kappa = f"judge and labels call every line {only}" if one_class and (judged == actual).all() else ""
    no_auc = f"every label says {only}" if one_class else ""

    statistics = _Statistics(given, judged, actual, cluster)
    (agreement,), (kappa,), (auc,) = statistics(np.ones((1, len(number))))
    drawn = _resampled(statistics, len(number), given.size, np.random.default_rng(seed), resamples)
    return Agreement(
        lines=given.size,
        dialogues=len(number),
        consistent=float(actual.mean()),
        agreement=_estimate(agreement, drawn[0]),
        kappa=Estimate(None, reason=no_kappa) if no_kappa else _estimate(kappa, drawn[1]),
        auc=Estimate(None, reason=no_auc) if no_auc else _estimate(auc, drawn[2]),
    )


def _estimate(value: float, drawn: Floats) -> Estimate:
    if not drawn.size:
        return Estimate(float(value), reason="one dialogue has no interval")
    defined = drawn[np.isfinite(drawn)]
    lost = 1 - defined.size / drawn.size
    if lost > _UNDEFINED:
        return Estimate(float(value), reason=f"{lost:.0%} of the resamples hold lines of one class only")
    low, high = np.quantile(defined, [0.025, 0.975])
    return Estimate(float(value), float(low), float(high))


def _resampled(
    statistics: _Statistics, dialogues: int, lines: int, rng: np.random.Generator, resamples: int
) -> list[Floats]:
    """Return agreement, kappa and AUC of every resample, NaN where undefined; empty when there is one dialogue.

    A resample is a weight per dialogue: how often it was drawn. Resamples are worked through in blocks, because the
    weights of all lines in all resamples may not fit into memory.
    """
    if dialogues < 2:
        return [np.empty(0)] * 3
    share = np.full(dialogues, 1 / dialogues)
    block = max(1, _CELLS // lines)
    sizes = (min(block, resamples - at) for at in range(0, resamples, block))
    parts = [statistics(rng.multinomial(dialogues, share, size=size).astype(np.float64)) for size in sizes]
    return [np.concatenate(part) for part in zip(*parts, strict=True)]


class _Statistics:
    """Agreement, kappa and AUC as functions of a weight per dialogue; the lines are counted and sorted once."""

    def __init__(self, given: Floats, judged: Bools, actual: Bools, cluster: NDArray[np.int64]) -> None:
        self._table = np.zeros((cluster.max() + 1, 4))  # per dialogue, lines by what judge and label say
        np.add.at(self._table, (cluster, 2 * judged + actual), 1.0)
        order = np.argsort(given, kind="stable")
        self._cluster, self._actual = cluster[order], actual[order]
        self._starts = np.flatnonzero(np.r_[True, np.diff(given[order]) > 0])

    def __call__(self, weights: Floats) -> tuple[Floats, Floats, Floats]:
        """Return the three statistics [resamples] for weights [resamples, dialogues]."""
        cells = weights @ self._table
        return _accuracies(cells), _kappas(cells), _aucs(weights[:, self._cluster], self._actual, self._starts)


def _accuracies(cells: Floats) -> Floats:
    accuracies: Floats = (cells[:, 0] + cells[:, 3]) / cells.sum(axis=1)
    return accuracies


def _kappas(cells: Floats) -> Floats:
    neither, only_label, only_judge, both = cells.T
    total = cells.sum(axis=1)
    observed = (neither + both) / total
    by_chance = (both + only_judge) * (both + only_label) + (neither + only_label) * (neither + only_judge)
    expected = by_chance / total**2
    with np.errstate(invalid="ignore"):
        kappas: Floats = np.where(expected < 1, (observed - expected) / (1 - expected), np.nan)
    return kappas


def _aucs(lines: Floats, actual: Bools, starts: NDArray[np.int64]) -> Floats:
    """Return weighted Mann-Whitney statistics.

    Args:
        lines: Weights [resamples, lines], lines in the order of their scores.
        actual: Labels in the same order.
        starts: Where a new score begins.
    """
    up = np.add.reduceat(lines * actual, starts, axis=1)
    down = np.add.reduceat(lines * ~actual, starts, axis=1)
    below = np.cumsum(down, axis=1) - down / 2
    with np.errstate(invalid="ignore"):
        aucs: Floats = (up * below).sum(axis=1) / (up.sum(axis=1) * down.sum(axis=1))
    return aucs


def failures(statuses: Mapping[str, int]) -> str:
    """Return ``3 unparsed (1.2%), 1 timeout (0.4%)`` for verdicts by status; empty when all are scored."""
    total = sum(statuses.values())
    lost = [(status, n) for status, n in sorted(statuses.items()) if status != "scored" and n]
    return ", ".join(f"{n} {status} ({n / total:.1%})" for status, n in lost)
