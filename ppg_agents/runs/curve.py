"""The picture of a run. Draws from plain numbers; loads no model and opens no window."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ppg_agents.plotting import BLUE, GREEN, ORANGE, new_figure, save, tidy
from ppg_agents.runs.files import writing
from ppg_agents.runs.run import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

BEFORE, AFTER, LINE, LIMIT = ORANGE, BLUE, BLUE, GREEN


WATCHED = {
    "entropy": "entropy (nats per token)",
    "kl_reference": "KL to the reference (nats per token)",
    "reply_tokens_mean": "tokens per reply",
}
"""The metrics of the policy itself that are drawn, and what they are called there."""


def curve(run: Run) -> Path:
    """Draw a run's ``curve.png`` from its metrics and evaluations; return the path."""
    metrics, offline = run.metrics(), bool(run.config.offline.files)
    watched = watched_points(metrics)
    figure = new_figure(11, 6.8 if watched else 4.6)
    title = f"{run.config.subject}, policy class: {run.config.label}, seed {run.config.seed}"
    figure.suptitle(title, fontweight="bold")
    above: FigureBase = figure
    if watched:
        above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(3, 1))[:, 0]
        draw_watched(below, watched)
    draw_results(above, metrics, run.evaluations(), offline=offline)
    path = run.folder / "curve.png"
    with writing(path, f"{{todo}}, then draw it with: ppg-agent train --resume {run.folder}"):
        save(figure, path, dpi=150)
    return path


def draw_results(
    figure: FigureBase, metrics: Sequence[Mapping[str, Any]], evaluations: Mapping[str, Any], *, offline: bool
) -> None:
    """Draw the learning curve, and the held-out results beside it."""
    from matplotlib.ticker import MaxNLocator

    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    if offline:
        draw_likelihood(left, metrics, evaluations)
        draw_likelihood_per_file(right, evaluations)
    else:
        draw_consistency(left, metrics, evaluations)
        draw_turns(right, evaluations)
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    tidy(left)
    tidy(right, grid="x" if offline else "y")


def watched_points(metrics: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Return (iteration, value) of the metrics in `WATCHED` that were measured more than once."""
    points = {key: [(int(m["iteration"]), float(m[key])) for m in metrics if m.get(key) is not None] for key in WATCHED}
    return {key: some for key, some in points.items() if len(some) > 1}


def draw_watched(figure: FigureBase, points: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    """Draw what `watched_points` returned, side by side."""
    from matplotlib.ticker import MaxNLocator

    for ax, (key, some) in zip(figure.subplots(1, len(points), squeeze=False)[0], points.items(), strict=True):
        steps, values = np.array(some, dtype=np.float64).T
        ax.plot(steps, values, color=LINE, linewidth=1.5)
        ax.set_ylim(0, 1.1 * max(values.max(), 1e-6))
        ax.set_title(WATCHED[key], fontsize=10)
        ax.set_xlabel("iteration")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        tidy(ax)


def draw_consistency(ax: Axes, metrics: Sequence[Mapping[str, Any]], evaluations: Mapping[str, Any]) -> None:
    """Draw consistency by iteration, the held-out results, and the reachable value."""
    last = _draw_training(ax, metrics, "consistency")
    for when, at, color in (("before", 0, BEFORE), ("after", last, AFTER)):
        if when in evaluations and evaluations[when]["persona_consistency"] is not None:
            point = evaluations[when]
            ax.errorbar(
                [at],
                [point["persona_consistency"]],
                yerr=_errors([point["persona_consistency"]], [point["ci95"]]).tolist(),
                fmt="o" if when == "before" else "D",
                color=color,
                markeredgecolor="white",
                markersize=8,
                capsize=4,
                zorder=5,
                label=f"held out, {when}: {point['persona_consistency']:.2f}",
            )
    reachable = next((e["reachable"] for e in evaluations.values() if e.get("reachable") is not None), None)
    if reachable is not None:
        ax.axhline(reachable, color=LIMIT, linestyle="--", linewidth=1.5, label=f"reachable: {reachable:.2f}")
    ax.set(xlabel="iteration", ylabel="persona consistency (judge's mean score)", ylim=(0, 1.02))
    ax.set_xlim(-0.03 * max(last, 1), 1.03 * max(last, 1))
    ax.legend(loc="best", frameon=True, framealpha=0.9, fontsize=9)
    ax.set_title("Consistency", fontsize=11)


def draw_turns(ax: Axes, evaluations: Mapping[str, Any]) -> None:
    """Draw the reward of each turn on held-out personas, before and after training."""
    shown = [when for when in ("before", "after") if when in evaluations]
    n = max((len(evaluations[when]["per_turn"]) for when in shown), default=1)
    lines = n > 12
    for k, when in enumerate(shown):
        result = evaluations[when]
        turns = np.arange(1, len(result["per_turn"]) + 1)
        means = np.array([np.nan if v is None else v for v in result["per_turn"]], dtype=float)
        color = BEFORE if when == "before" else AFTER
        errors = _errors(means.tolist(), result["per_turn_ci95"])
        if lines:
            ax.plot(turns, means, color=color, linewidth=2, label=when)
            ax.fill_between(turns, means - errors[0], means + errors[1], color=color, alpha=0.2, linewidth=0)
        else:
            width = 0.8 / len(shown)
            ax.bar(
                turns + (k - (len(shown) - 1) / 2) * width,
                means,
                width * 0.92,
                yerr=errors.tolist(),  # matplotlib mistakes a row of one for a number
                color=color,
                error_kw={"elinewidth": 1, "capsize": 2, "ecolor": "#444444"},
                label=when,
            )
    if not lines:
        ax.set_xticks(range(1, n + 1))
    ax.set(xlabel="turn", ylabel="mean reward (95% CI over personas)", ylim=(0, 1.18))
    ax.set_yticks(np.arange(0, 1.01, 0.2))
    if shown:
        ax.legend(loc="upper center", ncols=2, frameon=False, fontsize=9)
    ax.set_title("Per turn, held-out personas", fontsize=11)


def draw_likelihood(ax: Axes, metrics: Sequence[Mapping[str, Any]], evaluations: Mapping[str, Any]) -> None:
    """Draw the reward-weighted log-likelihood of each step, and of the held-out part before and after training."""
    last = _draw_training(ax, metrics, "weighted_token_log_prob")
    for when, at, color in (("before", 0, BEFORE), ("after", last, AFTER)):
        if when in evaluations and evaluations[when]["weighted_token_log_prob"] is not None:
            value = evaluations[when]["weighted_token_log_prob"]
            ax.plot(
                [at],
                [value],
                linestyle="",
                marker="o" if when == "before" else "D",
                markersize=8,
                markeredgecolor="white",
                color=color,
                zorder=5,
                label=f"held out, {when}: {value:.2f}",
            )
    ax.set(xlabel="step", ylabel="reward-weighted mean log-prob per token")
    ax.legend(loc="best", frameon=True, framealpha=0.9, fontsize=9)
    ax.set_title("Logged dialogues", fontsize=11)


def draw_likelihood_per_file(ax: Axes, evaluations: Mapping[str, Any]) -> None:
    """Draw the held-out likelihood of each file, before and after training."""
    shown = [when for when in ("before", "after") if when in evaluations]
    names = list(evaluations[shown[0]]["per_file"]) if shown else []
    for k, when in enumerate(shown):
        width = 0.8 / len(shown)
        values = [evaluations[when]["per_file"][name]["weighted_token_log_prob"] for name in names]
        heights = np.array([np.nan if value is None else value for value in values], dtype=float)
        place = np.arange(len(names)) + (k - (len(shown) - 1) / 2) * width
        ax.barh(place, heights, width * 0.92, color=BEFORE if when == "before" else AFTER, label=when)
    ax.set_yticks(range(len(names)), [textwrap.fill(Path(name).stem, 20) for name in names], fontsize=8)
    ax.invert_yaxis()
    ax.set(xlabel="reward-weighted mean log-prob per token")
    if shown:
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False, fontsize=9)
    ax.set_title("Held-out personas, per file", fontsize=11)


def smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the centred mean over about a tenth of the series, narrower at its ends, [len(values)]."""
    half = max(len(values) // 20, 1)
    return np.array([_nanmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def _draw_training(ax: Axes, metrics: Sequence[Mapping[str, Any]], key: str) -> int:
    """Draw a metric by iteration, and its running mean; return the last iteration."""
    points = [(m["iteration"], m[key]) for m in metrics if m.get(key) is not None]
    if points:
        steps, values = np.array(points, dtype=np.float64).T
        ax.plot(steps, values, color=LINE, alpha=0.25, linewidth=1, label="training, each batch")
        ax.plot(steps, smooth(values), color=LINE, linewidth=2, label="training, running mean")
    return max((int(m["iteration"]) for m in metrics), default=0)


def _errors(means: Sequence[float], intervals: Sequence[Sequence[float | None]]) -> NDArray[np.float64]:
    """Return the distances below and above each mean, [2, n]; NaN where there is no interval."""
    pairs = [
        (np.nan, np.nan) if low is None or high is None else (max(mean - low, 0.0), max(high - mean, 0.0))
        for mean, (low, high) in zip(means, intervals, strict=True)
    ]
    return np.array(pairs, dtype=np.float64).reshape(-1, 2).T


def _nanmean(values: NDArray[np.float64]) -> float:
    return float(values[np.isfinite(values)].mean()) if np.isfinite(values).any() else float("nan")
