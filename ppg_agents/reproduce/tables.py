"""The table of methods × domains, as Markdown and CSV, from the rows of `compare`."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence

from ppg_agents.compare.plan import Job
from ppg_agents.compare.report import Row, shown_p, to_csv
from ppg_agents.terminal.progress import interval
from ppg_agents.terminal.table import in_markdown

NOT_RUN = "not run yet"


def failed_methods(wanted: Sequence[Job], table: Sequence[Row], lost: Mapping[str, str]) -> dict[tuple[str, str], str]:
    """Return why a method has no row in a domain, by (domain, method)."""
    there = {(row.domain, row.method) for row in table}
    reasons: dict[tuple[str, str], str] = {}
    for job in wanted:
        if (job.domain, job.method) not in there:
            reasons.setdefault((job.domain, job.method), lost.get(job.name, NOT_RUN))
    return reasons


def to_markdown(table: Sequence[Row], failed: Mapping[tuple[str, str], str], lost: Mapping[str, str]) -> str:
    """Return a Markdown table with a row per method, the best on average first, and the failed runs below.

    Args:
        table: Rows of one size.
        failed: What `failed_methods` returned.
        lost: Why each run failed, by its name.
    """
    domains = list(dict.fromkeys([row.domain for row in table] + [domain for domain, _ in failed]))
    rows = {(row.domain, row.method): row for row in table}
    means: dict[str, list[float]] = {method: [] for _, method in (*rows, *failed)}
    for (_, method), row in rows.items():
        means[method].append(row.mean)
    ranked = sorted(means, key=lambda method: -sum(means[method]) / len(means[method]) if means[method] else math.inf)
    cells = [
        [method, *(_cells(rows.get((domain, method)), failed.get((domain, method), NOT_RUN)) for domain in domains)]
        for method in ranked
    ]
    lines = in_markdown(["method", *(name for domain in domains for name in (domain, "to the best", "p"))], cells)
    notes = [f"- {domain}, {method}: {why}" for (domain, method), why in failed.items() if why != NOT_RUN]
    notes += [f"- {name}: {why}" for name, why in lost.items() if why not in failed.values()]
    return "\n".join(lines) + ("\n\nFailed:\n\n" + "\n".join(notes) if notes else "") + "\n"


def _verdict(why: str) -> str:
    return "not run" if why == NOT_RUN else "failed"


def _cells(row: Row | None, why: str) -> str:
    if row is None:
        return f"{_verdict(why)} | – | –"
    value = f"{row.mean:.3f} {interval(row.ci95)}"
    if row.to_best is None:
        return f"**{value}** | best | –" if row.verdict == "best" else f"{value} | – | –"
    value = f"**{value}**" if row.verdict != "worse" else value
    return f"{value} | {row.to_best.value:+.3f} {interval(row.to_best.ci95, '+.3f')} | {shown_p(row)}"


def to_long_csv(table: Sequence[Row], failed: Mapping[tuple[str, str], str], size: int) -> str:
    """Return `compare`'s CSV, with a line for every method that failed."""
    text = to_csv(table)
    names = text.splitlines()[0].split(",")
    lines = io.StringIO()
    writer = csv.DictWriter(lines, names, restval="", lineterminator="\n")
    for (domain, method), why in failed.items():
        writer.writerow({"domain": domain, "size": size, "method": method, "seeds": 0, "verdict": _verdict(why)})
    return text + lines.getvalue()
