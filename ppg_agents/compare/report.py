"""The results of a comparison so far: a table as CSV and Markdown, and a picture.

Starts no run. A method whose difference from the best may be chance is called undecided.
"""

from __future__ import annotations

import csv
import io
import math
import statistics as basic
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from ppg_agents.compare.cell import Result
from ppg_agents.compare.statistics import Difference, Scores, difference, holm, mean_interval, only, table
from ppg_agents.intervals import FEWEST_SEEDS, Interval
from ppg_agents.plotting import new_figure, save, tidy
from ppg_agents.terminal.progress import interval
from ppg_agents.terminal.table import in_markdown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEVEL = 0.05
LEGEND = (
    "Consistency on held-out personas [95%: t, clustered by training seed and persona] after so many training "
    "conversations. Bold: the highest mean; °: cannot be told from it (paired by seed and persona, 5%, Holm-corrected "
    f"over all pairs of methods in a column). With fewer than {FEWEST_SEEDS} seeds there are too few to say."
)


@dataclass(frozen=True)
class Row:
    """A method in a domain after ``size`` training conversations.

    Attributes:
        domain: The domain.
        size: Training conversations.
        method: Agent and policy class.
        mean: Consistency on held-out personas, over all seeds.
        ci95: Its 95% interval, NaN with too few seeds or personas to say.
        seeds: Number of seeds.
        lowest: The lowest mean of a seed.
        highest: The highest mean of a seed.
        to_best: The difference from the best method of the domain and size, on the seeds that all methods have; p is
            corrected for all pairs of methods there. None for the best, and without a common seed.
        verdict: ``best``, ``worse`` or ``undecided``.
        reachable: The best value that can be reached according to the environment, NaN when unknown.
        judged_turns: Turns judged in training one seed, on average.
        seconds: Time for training one seed, the median.
    """

    domain: str
    size: int
    method: str
    mean: float
    ci95: Interval
    seeds: int
    lowest: float
    highest: float
    to_best: Difference | None
    verdict: str
    reachable: float
    judged_turns: float
    seconds: float


def rows(results: Sequence[Result], level: float = LEVEL) -> list[Row]:
    """Return the table: by domain and size, the best method first.

    Args:
        results: Cells; several seeds of a method make one row.
        level: A corrected p-value below this is ``worse``.
    """
    cells: dict[tuple[str, int], dict[str, list[Result]]] = {}
    for result in results:
        methods = cells.setdefault((result.job.domain, result.size), {})
        methods.setdefault(result.job.method, []).append(result)
    return [row for (domain, size), methods in cells.items() for row in _ranked(domain, size, methods, level)]


def _ranked(domain: str, size: int, methods: Mapping[str, Sequence[Result]], level: float) -> list[Row]:
    """Return the rows of one domain and size, ranked on the seeds that all methods have, if there are any."""
    scored = scores(methods)
    common = set.intersection(*(set(one.seeds) for one in scored.values()))
    shared = {name: only(one, sorted(common)) if common else one for name, one in scored.items()}
    ranked = sorted(scored, key=lambda name: (math.isnan(shared[name].mean), -_or(shared[name].mean, 0.0)))
    gaps = {pair: difference(shared[pair[0]], shared[pair[1]]) for pair in combinations(ranked, 2)}
    known = {pair: gap for pair, gap in gaps.items() if gap is not None}
    corrected = dict(zip(known, holm([gap.p for gap in known.values()]), strict=True))
    made = []
    for name in ranked:
        row, gap = _row(domain, size, name, methods[name], scored[name]), known.get((ranked[0], name))
        if name == ranked[0]:
            row = replace(row, verdict="best")
        elif gap is not None:
            p = corrected[ranked[0], name]
            to_best = Difference(-gap.value, (-gap.ci95[1], -gap.ci95[0]), p)
            row = replace(row, to_best=to_best, verdict="worse" if p < level and gap.value > 0 else "undecided")
        made.append(row)
    return made


def scores(methods: Mapping[str, Sequence[Result]], turn: int | None = None) -> dict[str, Scores]:
    """Return the scores of methods that were evaluated on the same personas; of one turn (from 0), or of all."""
    personas = sorted({name for cells in methods.values() for cell in cells for name in cell.evaluation["personas"]})
    return {
        method: table({cell.job.seed: cell.evaluation for cell in cells}, personas, turn)
        for method, cells in methods.items()
    }


def _row(domain: str, size: int, method: str, cells: Sequence[Result], scored: Scores) -> Row:
    means = [_or(cell.evaluation["persona_consistency"], math.nan) for cell in cells]
    reachable = [cell.evaluation["reachable"] for cell in cells if cell.evaluation["reachable"] is not None]
    return Row(
        domain=domain,
        size=size,
        method=method,
        mean=scored.mean,
        ci95=mean_interval(scored),
        seeds=len(cells),
        lowest=min(means),
        highest=max(means),
        to_best=None,
        verdict="undecided",
        reachable=basic.fmean(reachable) if reachable else math.nan,
        judged_turns=basic.fmean(cell.judged_turns for cell in cells),
        seconds=basic.median(cell.seconds for cell in cells),
    )


def to_csv(table: Sequence[Row]) -> str:
    """Return the rows as CSV; what is unknown is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = ("mean", "low", "high", "seeds", "lowest", "highest", "to_best", "to_best_low", "to_best_high", "p_holm")
    writer.writerow(("domain", "size", "method", *names, "verdict", "reachable", "judged_turns", "seconds"))
    for row in table:
        gap = (row.to_best.value, *row.to_best.ci95, row.to_best.p) if row.to_best else ("",) * 4
        numbers = (row.mean, *row.ci95, row.seeds, row.lowest, row.highest, *gap)
        last = (row.verdict, row.reachable, row.judged_turns, row.seconds)
        cells = (row.domain, row.size, row.method, *numbers, *last)
        writer.writerow(["" if isinstance(cell, float) and math.isnan(cell) else cell for cell in cells])
    return text.getvalue()


def to_grid(table: Sequence[Row]) -> str:
    """Return a Markdown table per domain, methods × sizes: the best in bold, ° for what cannot be told from it."""
    parts = []
    for domain in dict.fromkeys(row.domain for row in table):
        in_domain = [row for row in table if row.domain == domain]
        sizes = sorted({row.size for row in in_domain})
        cells = {(row.method, row.size): row for row in in_domain}
        highest: dict[str, float] = {}
        for row in in_domain:
            highest[row.method] = max(row.mean, highest.get(row.method, -math.inf))
        methods = sorted(highest, key=lambda method: -highest[method])
        rows = [[method, *(_short(cells.get((method, size))) for size in sizes)] for method in methods]
        lines = in_markdown([domain, *(f"{size:,}" for size in sizes)], rows)
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _short(row: Row | None) -> str:
    if row is None:
        return "–"
    mean = f"{row.mean:.3f}"
    marked = {"best": f"**{mean}**", "undecided": f"{mean}°"}.get(row.verdict, mean)
    return f"{marked} {interval(row.ci95)}"


def to_markdown(table: Sequence[Row], failed: Mapping[str, str] | None = None) -> str:
    """Return the rows as a Markdown table, and the runs that failed below it."""
    head = ("domain", "conversations", "method", "consistency [95%]", "seeds", "to the best [95%]", "p", "verdict")
    cells = []
    for row in table:
        gap = f"{row.to_best.value:+.3f} {interval(row.to_best.ci95, '+.3f')}" if row.to_best else "–"
        p = shown_p(row)
        value = (row.domain, f"{row.size:,}", row.method, f"{row.mean:.3f} {interval(row.ci95)}")
        cost = (f"{row.judged_turns:,.0f}", f"{row.seconds:.0f} s")
        cells.append((*value, str(row.seeds), gap, p, row.verdict, *cost))
    lines = in_markdown((*head, "judged turns", "time"), cells)
    lost = "".join(f"- {name}: {why}\n" for name, why in (failed or {}).items())
    return "\n".join(lines) + "\n" + (f"\nFailed runs:\n\n{lost}" if lost else "")


def shown_p(row: Row) -> str:
    """Return the corrected p-value of the difference to the best, a dash where there is none."""
    p = math.nan if row.to_best is None else row.to_best.p
    return "–" if math.isnan(p) else "< .001" if p < 0.001 else f"{p:.3f}"


def draw(table: Sequence[Row], path: Path) -> None:
    """Draw consistency against training conversations, or against the method where there is one size."""
    domains = list(dict.fromkeys(row.domain for row in table))
    most = max(len({row.method for row in table if row.domain == domain}) for domain in domains)
    sizes = {row.size for row in table}
    height = 3.6 if len(sizes) > 1 else 1.2 + 0.28 * most
    figure = new_figure(4.6 * len(domains), height)
    for i, (ax, domain) in enumerate(zip(figure.subplots(1, len(domains), squeeze=False)[0], domains, strict=True)):
        in_domain = [row for row in table if row.domain == domain]
        (_curves if len(sizes) > 1 else _dots)(ax, in_domain, labelled=i == 0)
        ax.set_title(domain)
        tidy(ax, grid=None)
    save(figure, path, dpi=120)


def _curves(ax: Axes, table: Sequence[Row], *, labelled: bool) -> None:
    from matplotlib import colormaps

    methods = sorted({row.method for row in table})
    colors = colormaps["viridis"](range(0, 256, max(1, 230 // max(1, len(methods)))))
    for i, method in enumerate(methods):
        points = sorted((row for row in table if row.method == method), key=lambda row: row.size)
        x = [row.size * (1 + 0.02 * (i - len(methods) / 2)) for row in points]  # side by side, not on top of each other
        means = [row.mean for row in points]
        spread = [[row.mean - row.ci95[0] for row in points], [row.ci95[1] - row.mean for row in points]]
        ax.errorbar(x, means, spread, label=method, color=colors[i], marker="o", markersize=4, capsize=2, linewidth=1.3)
    reach(ax, table, vertical=False)
    sizes = sorted({row.size for row in table})
    ax.set_xscale("log")
    ax.set_xticks(sizes, [f"{size:,}" for size in sizes])
    ax.minorticks_off()
    ax.set_xlabel("training conversations")
    if labelled:
        ax.set_ylabel("consistency, held-out personas")
    ax.legend(fontsize=8, frameon=False)


def _dots(ax: Axes, table: Sequence[Row], *, labelled: bool) -> None:
    table = sorted(table, key=lambda row: row.mean)
    for y, row in enumerate(table):
        color = {"best": "tab:blue", "undecided": "0.35", "worse": "tab:red"}[row.verdict]
        spread = [[row.mean - row.ci95[0]], [row.ci95[1] - row.mean]]
        ax.errorbar([row.mean], [y], xerr=spread, color=color, marker="o", markersize=5, capsize=2)
    ax.set_yticks(range(len(table)), [row.method for row in table], fontsize=8)
    reach(ax, table, vertical=True)
    ax.set_xlabel("consistency, held-out personas")


def reach(ax: Axes, table: Sequence[Row], *, vertical: bool) -> None:
    """Draw a line at the reachable value where it is known."""
    known = [row.reachable for row in table if math.isfinite(row.reachable)]
    if known:
        line = ax.axvline if vertical else ax.axhline
        line(basic.fmean(known), color="0.5", linestyle=":", linewidth=1)


def write(results: Sequence[Result], failed: Mapping[str, str], out: Path) -> list[Row]:
    """Write ``results.csv``, ``results.md`` and ``results.png`` into the comparison's folder; return the rows."""
    table = rows(results)
    (out / "results.csv").write_text(to_csv(table), encoding="utf-8")
    text = f"{to_grid(table)}\n{LEGEND}\n\n{to_markdown(table, failed)}"
    (out / "results.md").write_text(text, encoding="utf-8")
    if table:
        draw(table, out / "results.png")
    return table


def _or(value: float | None, other: float) -> float:
    return other if value is None or math.isnan(value) else value
