"""Show what the paper's advantage (eq. 9) pays for: the reply, or how early it comes.

    python scripts/early_and_late.py [FILES …] [--out docs]

Draws the advantage of every turn where all rewards are equal, exactly. For files of judged dialogues it prints the
share of the advantage's variance that the number of turns left alone explains (between / total, over judged turns), for
the paper's form and for the one standardised per turn index. Missing scores are made up for as in training.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ppg_agents import credit
from ppg_agents.credit import PolicyClass
from ppg_agents.group_advantage import PER_TURN, GroupAdvantage
from ppg_agents.missing import Credits
from ppg_gym.data import LoggedDialogue, read_dialogues

Array = NDArray[np.float64]
COLORS = {"greedy": "#009E73", "3-step": "#0072B2", "full": "#E69F00"}  # Okabe-Ito
CLASSES = {name: PolicyClass.parse(name) for name in COLORS}


def with_equal_rewards(name: str, n: int) -> Array:
    """Return A [n] by eq. (9) where every turn has the same reward."""
    played = np.ones((1, n), dtype=np.bool_)
    sums = credit.credit(np.ones((1, n)), CLASSES[name].mask(n), played)
    found: Array = GroupAdvantage(sums, played, [0], per_turn=False)(sums, played, [0])[0]
    return found


def picture() -> Figure:
    """Return the advantage of every turn, in short and in long conversations."""
    figure = Figure(figsize=(10.4, 3.2), layout="constrained", dpi=140)
    for axes, n in zip(figure.subplots(1, 2, sharey=True), (8, 60), strict=True):
        for name, color in COLORS.items():
            mark = "o" if n < 20 else None
            axes.plot(range(1, n + 1), with_equal_rewards(name, n), color=color, marker=mark, linewidth=1.8, label=name)
        axes.set_title(f"{n} turns, every reward the same", fontsize=11)
        axes.set_xlabel("turn")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="lower left", frameon=False, fontsize=9)
    figure.axes[0].set_ylabel("advantage, eq. (9)")
    return figure


def explained(dialogues: Sequence[LoggedDialogue], policy_class: PolicyClass, *, per_turn: bool) -> float:
    """Return the advantage's variance between numbers of turns left over its total variance; 0 where there is none."""
    n = max(len(dialogue.turns) for dialogue in dialogues)
    rewards = np.full((len(dialogues), n), np.nan)
    played = np.zeros(rewards.shape, dtype=np.bool_)
    for row, dialogue in enumerate(dialogues):
        scores = [np.nan if turn.verdict.score is None else turn.verdict.score for turn in dialogue.turns]
        rewards[row, : len(scores)], played[row, : len(scores)] = scores, True
    valid = np.isfinite(rewards)
    sums = Credits(rewards, valid, played & ~valid, policy_class.mask(n)).filled()
    groups = [(dialogue.persona.instruction, dialogue.topic) for dialogue in dialogues]
    found = GroupAdvantage(sums, valid, groups, per_turn=per_turn)(sums, valid, groups)[valid]
    left = np.flip(np.flip(played, 1).cumsum(1), 1)[valid]
    between = sum((left == k).mean() * (found[left == k].mean() - found.mean()) ** 2 for k in np.unique(left))
    return float(between / found.var()) if found.var() else 0.0


def main() -> None:
    """Draw the picture, and print a line per file and class."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="judged dialogues, of any format that ppg-agent data reads")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder (default: docs)")
    arguments = parser.parse_args()
    for path in arguments.files:
        dialogues, _ = read_dialogues(path)
        groups = {(dialogue.persona.instruction, dialogue.topic) for dialogue in dialogues}
        print(f"{path.parent.name}/{path.stem}: {len(dialogues)} sides of dialogues, {len(groups)} groups")
        for name, policy_class in CLASSES.items():
            shares = {form: explained(dialogues, policy_class, per_turn=each) for form, each in PER_TURN.items()}
            print(f"  {name:<8}" + "".join(f"  {form} {share:.2f}" for form, share in shares.items()))
    arguments.out.mkdir(parents=True, exist_ok=True)
    picture().savefig(arguments.out / "early-and-late.png")
    print(f"wrote {arguments.out / 'early-and-late.png'}")


if __name__ == "__main__":
    main()
