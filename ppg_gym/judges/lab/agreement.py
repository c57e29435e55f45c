"""How well a judge's scores agree with labels: agreement, Cohen's kappa and ROC AUC, with intervals over dialogues.

Numbers in, numbers out: nothing here reads a file or calls a judge. A statistic that the lines do not determine is
None, with the reason.

The intervals are made as those of ``ppg_agents.intervals``, which the environment can not import; a test holds the two
to the same numbers.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

THRESHOLD = 0.5
"""Scores and labels of at least this much are read as "consistent" by agreement and kappa; so are labels by AUC."""

FEWEST_DIALOGUES = 4
"""With fewer dialogues there is no interval: too few to say."""

_CELLS = 4_000_000  # weights held at a time: jackknife samples x lines

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
) -> Agreement:
    """Compare scores with labels.

    The intervals leave out whole dialogues in turn, because the lines of a dialogue are not independent (the jackknife,
    Tukey 1958), and take a t distribution. Two dialogues are added of which the judge gets all lines right, or all
    wrong, of the mean length and with the mean share of consistent lines: Agresti & Coull (1998) add trials to a
    proportion likewise. So a judge that was right on every line is not taken to be right for certain.

    Args:
        scores: The judge's, in [0, 1].
        labels: In [0, 1], binary or graded; 1 is consistent.
        dialogues: The dialogue of each line.

    Raises:
        ValueError: Lengths differ, or a number is not in [0, 1].
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

    plain = _Statistics(given, judged, actual, cluster, np.ones(given.size))
    (agreement,), (kappa,), (auc,) = plain(np.ones((1, len(number))))
    few = len(number) < FEWEST_DIALOGUES
    ends = [None] * 3 if few else _intervals(given, judged, actual, cluster)
    return Agreement(
        lines=given.size,
        dialogues=len(number),
        consistent=float(actual.mean()),
        agreement=_estimate(agreement, ends[0]),
        kappa=Estimate(None, reason=no_kappa) if no_kappa else _estimate(kappa, ends[1], no_auc),
        auc=Estimate(None, reason=no_auc) if no_auc else _estimate(auc, ends[2]),
    )


def _estimate(value: float, ends: tuple[float, float] | None, why_none: str = "") -> Estimate:
    """Return an estimate with its interval, or with the reason why there is none."""
    if ends is None:
        return Estimate(float(value), reason=f"fewer than {FEWEST_DIALOGUES} dialogues are too few to say")
    return Estimate(float(value), reason=why_none) if why_none else Estimate(float(value), *ends)


def _intervals(given: Floats, judged: Bools, actual: Bools, cluster: NDArray[np.int64]) -> list[tuple[float, float]]:
    """Return the intervals of agreement, kappa and AUC."""
    dialogues = int(cluster.max()) + 1
    share, length = actual.mean(), given.size / dialogues
    # Four heavy lines: consistent and inconsistent ones of the dialogue judged right, then of the one judged wrong.
    statistics = _Statistics(
        np.r_[given, 2.0, -1.0, -1.0, 2.0],
        np.r_[judged, True, False, False, True],
        np.r_[actual, True, False, True, False],
        np.r_[cluster, dialogues, dialogues, dialogues + 1, dialogues + 1],
        np.r_[np.ones(given.size), np.tile([length * share, length * (1 - share)], 2)],
    )
    total = dialogues + 2
    left_out = 1.0 - np.eye(total)
    block = max(1, _CELLS // (given.size + 4))
    parts = [statistics(left_out[at : at + block]) for at in range(0, total, block)]
    half = _quantile(total - 1) * np.sqrt((total - 1) / total)
    ends = []
    for (value,), values, least in zip(
        statistics(np.ones((1, total))), map(np.concatenate, zip(*parts, strict=True)), (0.0, -1.0, 0.0), strict=True
    ):
        error = half * float(np.sqrt(((values - values.mean()) ** 2).sum()))
        ends.append((max(least, float(value) - error), min(1.0, float(value) + error)))
    return ends


def _quantile(freedom: int) -> float:
    """Return the 97.5% quantile of a t distribution; the environment has no SciPy.

    With t = √ν tan θ the density of θ is proportional to cos^(ν−1) θ, on (−π/2, π/2).
    """
    angle = np.linspace(0, np.pi / 2, 20_001)
    density = np.cos(angle) ** (freedom - 1)
    mass = np.r_[0.0, np.cumsum((density[1:] + density[:-1]) / 2)]
    return float(np.sqrt(freedom) * np.tan(np.interp(0.95 * mass[-1], mass, angle)))


class _Statistics:
    """Agreement, kappa and AUC as functions of a weight per dialogue; the lines are counted and sorted once."""

    def __init__(self, given: Floats, judged: Bools, actual: Bools, cluster: NDArray[np.int64], times: Floats) -> None:
        """Take lines, each of which counts so many times."""
        self._table = np.zeros((cluster.max() + 1, 4))  # per dialogue, lines by what judge and label say
        np.add.at(self._table, (cluster, 2 * judged + actual), times)
        order = np.argsort(given, kind="stable")
        self._cluster, self._actual, self._times = cluster[order], actual[order], times[order]
        self._starts = np.flatnonzero(np.r_[True, np.diff(given[order]) > 0])

    def __call__(self, weights: Floats) -> tuple[Floats, Floats, Floats]:
        """Return the three statistics [samples] for weights [samples, dialogues]."""
        cells, lines = weights @ self._table, weights[:, self._cluster] * self._times
        return _accuracies(cells), _kappas(cells), _aucs(lines, self._actual, self._starts)


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
        lines: Weights [samples, lines], lines in the order of their scores.
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
