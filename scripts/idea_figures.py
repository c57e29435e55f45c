"""Draw the two pictures of ``docs/idea.md``: what a policy class credits, and why the horizon matters.

    python scripts/idea_figures.py [--out docs]

All of it is exact and takes seconds: masks and credits from ``ppg_agents.credit``, rewards from the rule tables under
``envs/``, and the values of the last panel from the domains' exact twins. No language, no sampling.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ppg_agents import credit
from ppg_gym.domain.loading import DOMAINS, RuleTable, load
from ppg_gym.domain.twin import Twin

TURNS, SHOWN = 8, 5  # of the plans; the lookaheads of the middle panel
PATIENT = ["tentative", "tentative", *["disclose"] * (TURNS - 2)]
HASTY = ["disclose"] * TURNS
# Okabe-Ito, as in the pictures of a run; the plans have colours that no domain has
BLUE, ORANGE, GREEN, PURPLE, BLACK, QUIET = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#000000", "#666666"
COUNTED, UNCOUNTED = BLUE, "#f0f0f0"
MARKS = {"chatting": ("o", GREEN), "therapy": ("s", BLUE), "education": ("D", ORANGE)}

Array = npt.NDArray[np.float64]


def rewards(table: RuleTable, kinds: Sequence[str]) -> Array:
    """Return the rewards [n] of a plan: a reply kind per turn, from the first state on."""
    state, earned = table.states[0], []
    for kind in kinds:
        earned.append(table.score[state, kind])
        state = table.next[state, kind]
    return np.array(earned)


def classes() -> Figure:
    """Return the masks of four policy classes, each with the credit that it gives to the same eight rewards."""
    earned = rewards(load("therapy").table, PATIENT)
    shown = {
        "greedy": credit.greedy(TURNS),
        "3-step lookahead": credit.k_step(TURNS, 3),
        "segment 3,3,2": credit.segment(TURNS, (3, 3, 2)),
        "full planning": credit.full(TURNS),
    }
    figure = Figure(figsize=(10.4, 3.2), layout="constrained", dpi=140)
    panels = figure.subplots(1, len(shown))
    for panel, (name, mask) in zip(panels, shown.items(), strict=True):
        given = credit.credit(earned[None], mask, np.ones((1, TURNS), dtype=np.bool_))[0]
        for t in range(TURNS):
            for ell in range(TURNS):
                color = COUNTED if mask[t, ell] else UNCOUNTED
                panel.add_patch(Rectangle((ell + 0.54, t + 0.54), 0.92, 0.92, facecolor=color, edgecolor="none"))
            panel.text(TURNS + 0.75, t + 1, f"{given[t]:.1f}", va="center", fontsize=9.5, family="monospace")
            panel.text(t + 1, 0.25, f"{earned[t]:.1f}", ha="center", va="bottom", fontsize=7.5, family="monospace")
        panel.text(TURNS + 0.65, 0.25, "credit", va="bottom", fontsize=8.5, color=QUIET)
        panel.set(xlim=(0.4, TURNS + 2.1), ylim=(TURNS + 0.6, -0.4), aspect="equal")
        panel.set_xticks(range(1, TURNS + 1))
        panel.set_yticks(range(1, TURNS + 1))
        panel.set_xlabel("reward ℓ", loc="left")
        panel.set_title(name, fontsize=11, loc="left", fontweight="bold")
        panel.spines[:].set_visible(False)
        panel.tick_params(length=0, labelsize=8.5)
    panels[0].set_ylabel("reply t")
    panels[0].text(0.4, 0.25, "r", ha="right", va="bottom", fontsize=8.5, color=QUIET)
    return figure


def horizon(steps: int) -> Figure:
    """Return the two plans in therapy, the credit of their first reply, and what every lookahead can reach."""
    figure = Figure(figsize=(10.4, 3.6), layout="constrained", dpi=140)
    left, middle, right = figure.subplots(1, 3)
    table, turn = load("therapy").table, np.arange(1, TURNS + 1)
    plans = {"tell all at once": (HASTY, PURPLE, "o"), "two half-steps, then tell": (PATIENT, BLACK, "s")}
    for name, (kinds, color, mark) in plans.items():
        earned = rewards(table, kinds)
        left.plot(turn, earned, color=color, marker=mark, linewidth=1.8, label=name)
        played = np.ones((1, TURNS), dtype=np.bool_)
        first = [credit.credit(earned[None], credit.k_step(TURNS, k), played)[0, 0] for k in turn[:SHOWN]]
        middle.plot(turn[:SHOWN], first, color=color, marker=mark, linewidth=1.8, label=name)
    left.set(xlabel="turn", ylabel="reward", ylim=(0, 1.3), title="Two plans for a guarded patient")
    middle.set(xlabel="lookahead K", ylabel="credit of the first reply", title="Credit of the first reply")
    middle.set(ylim=(0, 5))
    for axes in (left, middle):
        axes.legend(loc="upper left", frameon=False, fontsize=9)
    for name in DOMAINS:
        _reach(right, name, steps)
    right.set(
        xlabel="lookahead K", ylabel="mean reward per turn", ylim=(0.4, 1.12), title="What each K can reach, by domain"
    )
    right.legend(loc="lower right", frameon=False, fontsize=9)
    for axes in (left, middle, right):
        axes.title.set_fontsize(11)
        axes.spines[["top", "right"]].set_visible(False)
    for axes, last in ((left, TURNS), (middle, SHOWN), (right, max(load(name).turns for name in DOMAINS))):
        axes.set_xticks(range(1, last + 1))
    return figure


def _reach(axes: Axes, name: str, steps: int) -> None:
    """Draw the value at which every lookahead's exact gradient ends on a domain's twin, and the best there is."""
    domain = load(name)
    twin, n = Twin.of(domain.table), domain.turns
    start = twin.start(domain, n)
    ends = [float(twin.rewards(twin.ascend(credit.k_step(n, k), start, steps=steps)).mean()) for k in range(1, n + 1)]
    mark, color = MARKS[name]
    axes.plot(range(1, n + 1), ends, color=color, marker=mark, linewidth=1.8, label=f"{name}, best {twin.best(n):.3f}")


def main() -> None:
    """Draw both pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder (default: docs)")
    parser.add_argument("--steps", type=int, default=1000, help="steps of exact gradient ascent (default: 1000)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, figure in (("policy-classes", classes()), ("why-the-horizon", horizon(arguments.steps))):
        path = arguments.out / f"{name}.png"
        figure.savefig(path)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
