"""Rewards from a judge of the conversation so far: Lemma 1 of arXiv 2603.06138 [P], with its running maximum.

The judge's score of turn t is taken as f(x, τ_t), its verdict on the whole conversation up to and including turn t,
with f(x, τ_0) = 0, and the turn's reward is

    r_t = max_{s ≤ t} f(x, τ_s) − max_{s < t} f(x, τ_s) ≥ 0,      Σ_t r_t = max_t f(x, τ_t)

so full planning credits the first reply with the best score that the conversation ever had, not with its last one:
what was lost afterwards costs nothing. `price` says how much that is. A judge that scores the newest line alone is
another thing, and its running maximum pays for one good line; nothing here can tell.

Own: where a score is missing, the maximum is unknown from there on, so this turn's and all later rewards are missing
too (`ppg_agents.missing` makes up for them), also when the score comes back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Literal

import numpy as np

from ppg_agents.credit import decompose
from ppg_agents.trajectory import Trajectory

Reward = Literal["turn", "prefix"]


def rewarded(trajectories: Sequence[Trajectory], reward: Reward) -> list[Trajectory]:
    """Return the conversations with the rewards that are learned from.

    Args:
        trajectories: With the judge's score of every turn as its reward.
        reward: ``turn`` leaves them as they are; ``prefix`` takes the scores as f.
    """
    return list(trajectories) if reward == "turn" else list(map(_decomposed, trajectories))


def price(trajectories: Sequence[Trajectory]) -> dict[str, float | None]:
    """Return what the running maximum pays for beyond the last score, as metrics.

    Args:
        trajectories: With the judge's scores, before `rewarded`.

    Returns:
        ``final_score``: f(x, τ_n), the mean over conversations; ``final_score_gap``: max_t f(x, τ_t) − f(x, τ_n), their
        mean, ≥ 0. Conversations that lack a score, or were lost, are left out; None without any other.
    """
    scores = [[turn.reward for turn in one.turns] for one in trajectories if one.turns and not one.lost]
    whole = [row for row in scores if all(map(math.isfinite, row))]
    if not whole:
        return {"final_score": None, "final_score_gap": None}
    final = float(np.mean([row[-1] for row in whole]))
    return {"final_score": final, "final_score_gap": float(np.mean([max(0.0, *row) - row[-1] for row in whole]))}


def _decomposed(trajectory: Trajectory) -> Trajectory:
    known = list(takewhile(math.isfinite, (turn.reward for turn in trajectory.turns)))
    steps = decompose(np.array([[0.0, *known]]), "running_max")[0].tolist() if known else []
    rewards = steps + [math.nan] * (len(trajectory.turns) - len(known))
    turns = (replace(turn, reward=r) for turn, r in zip(trajectory.turns, rewards, strict=True))
    return replace(trajectory, turns=tuple(turns))
