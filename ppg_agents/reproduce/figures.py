"""The pictures, drawn from numbers alone.

A class has the same colour and marker in every picture: viridis from dark (K = 1) to light; full planning is black.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppg_agents.plotting import VERMILION, new_figure, save, tidy
from ppg_agents.reproduce.numbers import ROLLOUT, STEP, UNTRAINED, Point, Standing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

VIRIDIS = ("#440154", "#3b528b", "#21918c", "#5ec962", "#d8b408")  # the last is darkened to show on white
MARKS = "osD^v"
FULL, GREY = "#000000", "#777777"
PC = "persona consistency, held-out personas"


def draw_residuals(points: Sequence[Point], scale: float, path: Path, *, title: str, caption: str) -> None:
    """Draw figure 2: a row per level, a column per domain."""
    domains = _domains(points)
    levels = [level for level in (ROLLOUT, STEP) if any(p.level == level for p in points)]
    words = {ROLLOUT: "rollout-level", STEP: "step-level"}
    figure, axes = _sheet(len(levels), len(domains), 2.75)
    for r, level in enumerate(levels):
        for c, domain in enumerate(domains):
            ax = axes[r][c]
            shown = [p for p in points if (p.domain, p.level) == (domain, level)]
            ax.axhline(0, color=GREY, linewidth=0.8)
            _lines(ax, shown, dodge=0.09)
            turns = sorted({p.x for p in shown})
            ax.set_xticks(turns if len(turns) <= 12 else turns[:: len(turns) // 10])
            _clean(ax, title=domain if r == 0 else "", xlabel="turn" if r == len(levels) - 1 else "")
            if c == 0:
                ax.set_ylabel(f"{words[level]}\nresidual (1 = {scale:.2f} of consistency)")
    _same_height([ax for row in axes for ax in row])
    _finish(figure, axes, path, title, caption)


def draw_curves(points: Sequence[Point], path: Path, *, xlabel: str, title: str, caption: str) -> None:
    """Draw figure 3 or 5: a column per domain, against a number on a logarithmic scale."""
    domains = _domains(points)
    figure, axes = _sheet(1, len(domains), 3.5)
    for c, domain in enumerate(domains):
        ax = axes[0][c]
        shown = [p for p in points if p.domain == domain]
        trained = [p for p in shown if p.planning != UNTRAINED]
        ticks = sorted({p.x for p in trained})
        ax.set_xscale("log")
        _lines(ax, trained, dodge=0.022, factor=True)
        _untrained(ax, [p for p in shown if p.planning == UNTRAINED])
        limits = sorted({(p.x, p.reachable) for p in trained if math.isfinite(p.reachable)})
        if limits:
            ends = [(ticks[0] * 0.9, limits[0][1]), *limits, (ticks[-1] * 1.11, limits[-1][1])]
            ax.plot(*zip(*ends, strict=True), color=GREY, linestyle="--", linewidth=1.1, label="reachable")
        ax.set_xticks(ticks, [f"{x:,}" for x in ticks])
        ax.minorticks_off()
        ax.set_xlim(ticks[0] * 0.88, ticks[-1] * 1.14)
        _clean(ax, title=domain, xlabel=xlabel)
        if c == 0:
            ax.set_ylabel(PC)
    _finish(figure, axes, path, title, caption)


def _untrained(ax: Axes, points: Sequence[Point]) -> None:
    """Draw the untrained model as a level if it has one value; if it has several, `_lines` draws them."""
    for p in points if len(points) == 1 else ():
        if math.isfinite(p.low):
            ax.axhspan(p.low, p.high, color=GREY, alpha=0.15, linewidth=0)
        ax.axhline(p.value, color=GREY, linestyle=":", linewidth=1.4, label="untrained")


def draw_standings(table: Sequence[Standing], path: Path, *, title: str, caption: str) -> None:
    """Draw figure 4: the share of resamples in which each K is the best, against training conversations."""
    import numpy as np

    domains = list(dict.fromkeys(one.domain for one in table))
    figure, axes = _sheet(1, len(domains), 3.3)
    for c, domain in enumerate(domains):
        ax = axes[0][c]
        shown = [one for one in table if one.domain == domain]
        sizes = sorted({one.x for one in shown})
        names = {one.k: f"{one.k}" for one in sorted(shown, key=lambda one: one.k)}
        names |= {one.k: f"full ({one.k})" for one in shown if one.planning == "full"}
        at = {k: row for row, k in enumerate(names)}
        grid = np.full((len(at), len(sizes)), np.nan)
        for one in shown:
            grid[at[one.k], sizes.index(one.x)] = one.share
        image = ax.imshow(grid, cmap="Blues", vmin=0, vmax=1, aspect="auto", origin="lower", interpolation="none")
        for one in shown:
            x, y = sizes.index(one.x), at[one.k]
            shade = "white" if one.share > 0.55 else "black"
            weight = "bold" if one.best else "normal"
            ax.text(x, y, _percent(one.share), ha="center", va="center", color=shade, fontsize=8.5, fontweight=weight)
            if one.not_worse:
                box = {"xy": (x - 0.44, y - 0.42), "width": 0.88, "height": 0.84, "fill": False}
                ax.add_patch(_rectangle(**box, edgecolor=VERMILION, linewidth=2.2 if one.best else 1.0))
        ax.set_xticks(range(len(sizes)), [f"{size:,}" for size in sizes])
        ax.set_yticks(range(len(names)), list(names.values()))
        ax.tick_params(length=0)
        ax.set_title(domain, fontsize=11)
        ax.set_xlabel("training conversations")
        ax.spines[:].set_visible(False)
        if c == 0:
            ax.set_ylabel("lookahead K")
    bar = figure.colorbar(image, ax=axes[0], shrink=0.8, pad=0.02)
    bar.set_label("share of resamples in which it is the best", fontsize=8.5)
    bar.outline.set_visible(False)
    _save(figure, path, title, caption)


def _rectangle(**options: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(options.pop("xy"), options.pop("width"), options.pop("height"), **options)


def _percent(share: float) -> str:
    return "0" if share < 0.0005 else "<1%" if share < 0.01 else ">99%" if 0.99 < share < 1 else f"{share:.0%}"


def style(planning: str, k: int) -> dict[str, Any]:
    """Return how a class is drawn."""
    if planning == "full":
        return {"color": FULL, "marker": "x", "linestyle": "--", "label": "full (K = turns)"}
    i = min(max(k, 1), len(VIRIDIS)) - 1
    name = "K = 1 (greedy)" if k == 1 else f"K = {k}" if k <= len(VIRIDIS) and k else planning
    return {"color": VIRIDIS[i], "marker": MARKS[i], "linestyle": "-", "label": name}


def _lines(ax: Axes, points: Sequence[Point], *, dodge: float, factor: bool = False) -> None:
    """Draw a line per class with its intervals, shifted a little so that they do not overlap."""
    classes = {p.planning: p.k for p in sorted(points, key=lambda p: (p.planning == "full", p.k))}
    for i, (planning, k) in enumerate(classes.items()):
        line = sorted((p for p in points if p.planning == planning), key=lambda p: p.x)
        aside = dodge * (i - (len(classes) - 1) / 2)
        x = [p.x * (1 + aside) if factor else p.x + aside for p in line]
        look = style(planning, k)
        for at, p in zip(x, line, strict=True):
            ax.plot([at, at], [p.low, p.high], color=look["color"], linewidth=1.6, alpha=0.55, solid_capstyle="butt")
        ax.plot(x, [p.value for p in line], **look, markersize=4.2, linewidth=1.4, zorder=3)


def _domains(points: Sequence[Point]) -> list[str]:
    return list(dict.fromkeys(p.domain for p in points))


def _sheet(rows: int, columns: int, height: float) -> tuple[Figure, list[list[Axes]]]:
    figure = new_figure(max(4.1 * columns, 6.6), height * rows + 1.1)
    return figure, [list(row) for row in figure.subplots(rows, columns, squeeze=False)]


def _clean(ax: Axes, *, title: str, xlabel: str) -> None:
    ax.set_title(title, fontsize=11)
    ax.set_xlabel(xlabel)
    tidy(ax)


def _same_height(axes: Sequence[Axes]) -> None:
    low = min(ax.get_ylim()[0] for ax in axes)
    high = max(ax.get_ylim()[1] for ax in axes)
    for ax in axes:
        ax.set_ylim(low, high)


def _finish(figure: Figure, axes: Sequence[Sequence[Axes]], path: Path, title: str, caption: str) -> None:
    """Add one legend for all panels, with the classes by K first, and save."""
    entries: dict[str, Any] = {}
    for ax in (ax for row in axes for ax in row):
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    order = sorted(entries, key=lambda label: (label in ("untrained", "reachable"), label.startswith("full"), label))
    figure.legend([entries[label] for label in order], order, loc="outside right center", frameon=False, fontsize=9)
    _save(figure, path, title, caption)


def _save(figure: Figure, path: Path, title: str, caption: str) -> None:
    width = figure.get_size_inches()[0]
    figure.suptitle(textwrap.fill(title, int(9 * width)), fontsize=12, fontweight="bold")
    figure.supxlabel(textwrap.fill(caption, int(15 * width)), fontsize=8, color="#444444")
    save(figure, path, dpi=130)
