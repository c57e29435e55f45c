"""From cells to the numbers of a figure. Reads run folders; draws nothing and starts no run.

Intervals are 95%, those of `ppg_agents.intervals`; NaN where there are too few seeds or personas to say.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path

import numpy as np

from ppg_agents.compare.cell import Result, results
from ppg_agents.compare.engine import folder_of
from ppg_agents.compare.plan import Job, config_of
from ppg_agents.compare.report import Row, rows, scores
from ppg_agents.compare.statistics import mean_interval, resampled, residual_intervals, weights
from ppg_agents.intervals import Array
from ppg_agents.reproduce.plans import LENGTHS, STEPS, measurements
from ppg_agents.runs.run import Run, is_run

ROLLOUT, STEP, UNTRAINED = "rollout", "step", "untrained"


@dataclass(frozen=True)
class Point:
    """One number of figures 2, 3 and 5.

    Attributes:
        domain: The domain.
        level: ``rollout`` or ``step``.
        planning: The policy class in words, or ``untrained``.
        k: Its lookahead: the number of turns for full planning, 0 for the untrained model.
        x: What the figure is drawn against: turn, training conversations, or turns of a conversation.
        value: Mean consistency, or its residual.
        low: Lower end of the 95% interval, NaN where there are too few seeds or personas to say.
        high: Upper end.
        seeds: The training seeds in the mean.
        personas: Number of held-out personas.
        reachable: The best value that can be reached according to the environment, NaN when unknown.
    """

    domain: str
    level: str
    planning: str
    k: int
    x: int
    value: float
    low: float
    high: float
    seeds: tuple[int, ...]
    personas: int
    reachable: float = math.nan


@dataclass(frozen=True)
class Standing:
    """How a class compares with the others of a domain and size, for figure 4.

    Attributes:
        domain: The domain.
        x: Training conversations.
        planning: The policy class in words.
        k: Its lookahead.
        share: Share of the resamples in which it is the best; classes that tie in one share it.
        best: Whether it has the highest mean.
        not_worse: Whether its difference from the best may be chance (corrected p >= .05).
        value: Mean consistency.
        low: Lower end of the 95% interval, NaN where there are too few seeds or personas to say.
        high: Upper end.
        p: Of the difference from the best, corrected for all pairs of classes of that domain and size, as in `compare`
            (Holm); NaN for the best, and where there are too few seeds or personas to say.
        seeds: The seeds that all classes have.
    """

    domain: str
    x: int
    planning: str
    k: int
    share: float
    best: bool
    not_worse: bool
    value: float
    low: float
    high: float
    p: float
    seeds: tuple[int, ...]


def cells(wanted: Iterable[Job], out: Path) -> list[Result]:
    """Return the cells that have been filled."""
    return [one for job in wanted for one in results(job, folder_of(job, out)) if one.size in job.sizes]


def untrained(wanted: Iterable[Job], out: Path) -> list[Result]:
    """Return the evaluations before training as cells of size 0, one for each seed and domain."""
    first: dict[tuple[str, int], Result] = {}
    for job in wanted:
        folder = folder_of(job, out)
        before = Run.open(folder).evaluations().get("before") if is_run(folder) else None
        if before is not None:
            first.setdefault((job.domain, job.seed), Result(job, 0, before, 0, 0.0))
    return list(first.values())


def steps(wanted: Iterable[Job], out: Path) -> list[Result]:
    """Return the step-level results so far, as cells of the largest size."""
    measured = ((job, measurements(job, folder_of(job, out), STEPS)) for job in wanted)
    return [Result(job, job.sizes[-1], evaluation, 0, 0.0) for job, evaluation in measured if evaluation]


def lengths(wanted: Iterable[Job], out: Path) -> list[tuple[int, Result]]:
    """Return the results so far on conversations of other lengths, as (turns, cell of the largest size)."""
    return [
        (int(turns), Result(job, job.sizes[-1], evaluation, 0, 0.0))
        for job in wanted
        for turns, evaluation in measurements(job, folder_of(job, out), LENGTHS).items()
    ]


def lookahead(job: Job, turns: int) -> int:
    """Return a class's K: the number of turns for full planning, 0 for classes that have none."""
    planning = config_of(job).policy_class
    return 0 if planning == "auto" else planning.steps(job.config["env"].get("max_turns") or turns) or 0


def residuals(levels: Mapping[str, Sequence[Result]], turns: Mapping[str, int]) -> tuple[list[Point], float]:
    """Return figure 2: per turn, each class's consistency less the mean over the classes, scaled to [−1, 1].

    The paper scales the residual of its figure 2 to [−1, 1] without saying how. Our definition [D]: the residual of
    class k at turn t is ``PC[k, t] − mean over k' of PC[k', t]``, and all residuals are divided by the largest absolute
    value in the picture. Intervals are clustered by seed and persona, which all classes share; the scale is taken as
    fixed.

    Args:
        levels: Cells of one size by level, ``rollout`` or ``step``.
        turns: Turns of a conversation, by domain.

    Returns:
        The points, and the scale: the difference in consistency that 1 stands for.
    """
    points: list[Point] = []
    for level, cells in levels.items():
        for domain, methods in grouped(cells).items():
            methods = paired(methods)
            if len(methods) < 2:
                continue
            played = [cell.evaluation["personas"] for of_method in methods.values() for cell in of_method]
            n = max(len(row["judged"]) for personas in played for row in personas.values())
            for turn in range(n):
                points += _residuals(methods, domain, level, turn, turns[domain])
    scale = max((abs(point.value) for point in points if math.isfinite(point.value)), default=0.0) or 1.0
    scaled = [replace(p, value=p.value / scale, low=p.low / scale, high=p.high / scale) for p in points]
    return scaled, scale


def _residuals(methods: Mapping[str, list[Result]], domain: str, level: str, turn: int, turns: int) -> list[Point]:
    scored = scores(methods, turn)
    p = next(iter(scored.values())).scores.shape[1]
    means = np.array([one.mean for one in scored.values()])
    intervals = residual_intervals(list(scored.values()))
    made = []
    for method, value, ends in zip(methods, means - means.mean(), intervals, strict=True):
        job = methods[method][0].job
        seeds = tuple(one.job.seed for one in methods[method])
        made.append(Point(domain, level, method, lookahead(job, turns), turn + 1, float(value), *ends, seeds, p))
    return made


def curves(cells: Iterable[tuple[int, Result]], turns: Mapping[str, int]) -> list[Point]:
    """Return figures 3 and 5: consistency against training conversations, or against turns.

    Args:
        cells: (x, cell); cells of size 0 are those of the untrained model.
        turns: Turns of a conversation, by domain.
    """
    columns: dict[tuple[str, int], dict[str, list[Result]]] = {}
    for x, cell in cells:
        method = cell.job.method if cell.size else UNTRAINED
        columns.setdefault((cell.job.domain, x), {}).setdefault(method, []).append(cell)
    points = []
    for (domain, x), methods in columns.items():
        for method, scored in scores(methods).items():
            of_method = methods[method]
            known = [cell.evaluation["reachable"] for cell in of_method if cell.evaluation["reachable"] is not None]
            reachable = float(np.mean(known)) if known else math.nan
            k = 0 if method == UNTRAINED else lookahead(of_method[0].job, turns[domain])
            ends = mean_interval(scored)
            some = scored.seeds, int((scored.judged.sum(0) > 0).sum())
            points.append(Point(domain, ROLLOUT, method, k, x, scored.mean, *ends, *some, reachable))
    order = list(dict.fromkeys(domain for domain, _ in columns))
    return sorted(points, key=lambda point: (order.index(point.domain), point.k, point.x))


def standings(cells: Sequence[Result], turns: Mapping[str, int]) -> list[Standing]:
    """Return figure 4: how often each class is the best, by number of training conversations.

    "Not worse" is `compare`'s verdict on the paired difference from the class with the highest mean.
    """
    kept = [
        one
        for methods in (_of_size(cells, key) for key in dict.fromkeys((one.job.domain, one.size) for one in cells))
        for results_of in paired(methods).values()
        for one in results_of
    ]
    verdicts: dict[tuple[str, int, str], Row] = {(row.domain, row.size, row.method): row for row in rows(kept)}
    made = []
    for domain, size in dict.fromkeys((one.job.domain, one.size) for one in kept):
        methods = _of_size(kept, (domain, size))
        for method, share in zip(methods, shares(methods), strict=True):
            row, of_method = verdicts[domain, size, method], methods[method]
            k, seeds = lookahead(of_method[0].job, turns[domain]), tuple(one.job.seed for one in of_method)
            p = math.nan if row.to_best is None else row.to_best.p
            stands = (row.verdict == "best", row.verdict != "worse", row.mean, *row.ci95, p, seeds)
            made.append(Standing(domain, size, method, k, float(share), *stands))
    order = list(dict.fromkeys(one.domain for one in made))
    return sorted(made, key=lambda one: (order.index(one.domain), one.x, one.k))


def shares(methods: Mapping[str, Sequence[Result]]) -> Array:
    """Return the share of the resamples in which each method is the best, [methods]; they sum to 1."""
    scored = scores(methods)
    drawn = weights(*next(iter(scored.values())).scores.shape)
    means = np.stack([resampled(one, drawn) for one in scored.values()])
    means = means[:, np.isfinite(means).all(0)]
    first = means >= means.max(0) - 1e-12
    share: Array = (first / first.sum(0)).mean(1)
    return share


def grouped(cells: Iterable[Result]) -> dict[str, dict[str, list[Result]]]:
    """Return cells by domain and method."""
    domains: dict[str, dict[str, list[Result]]] = {}
    for cell in cells:
        domains.setdefault(cell.job.domain, {}).setdefault(cell.job.method, []).append(cell)
    return domains


def paired(methods: Mapping[str, Sequence[Result]]) -> dict[str, list[Result]]:
    """Return the cells of the seeds that all methods have, sorted by seed."""
    common = set.intersection(*({cell.job.seed for cell in cells} for cells in methods.values()))
    kept = {method: [cell for cell in cells if cell.job.seed in common] for method, cells in methods.items()}
    return {method: sorted(cells, key=lambda cell: cell.job.seed) for method, cells in kept.items() if cells}


def _of_size(cells: Iterable[Result], key: tuple[str, int]) -> dict[str, list[Result]]:
    return grouped(cell for cell in cells if (cell.job.domain, cell.size) == key).get(key[0], {})


def to_csv(table: Sequence[Point | Standing], x: str) -> str:
    """Return numbers as CSV; ``x`` is the name of the column they are drawn against; unknown values are empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [field.name for field in fields(table[0])] if table else []
    writer.writerow([{"planning": "class", "k": "K", "x": x}.get(name, name) for name in names])
    for row in table:
        writer.writerow([_plain(value) for value in astuple(row)])
    return text.getvalue()


def _plain(value: object) -> object:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    if isinstance(value, float):
        return "" if math.isnan(value) else round(value, 6)
    return value
