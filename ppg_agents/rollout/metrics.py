"""Metrics of a batch of judged conversations, and a limit on the judge's failures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ppg_agents.rollout.environment import ConversationError

if TYPE_CHECKING:
    from ppg_agents.trajectory import Trajectory, Turn

FEW = 200  # turns: a smaller batch may have as many failures as one of this size
SHOWN = 3  # causes


def check_judge(trajectories: Sequence[Trajectory], limit: float) -> None:
    """Stop when the judge fails too often; an environment with one conversation cannot see that.

    Raises:
        ConversationError: More than ``limit`` of the turns (of at least ``FEW``) have a failed verdict.
    """
    turns = [turn for trajectory in trajectories for turn in trajectory.turns]
    lost = [turn for turn in turns if turn.verdict.get("status", "scored") != "scored"]
    if len(lost) > limit * max(len(turns), FEW):
        causes = Counter(_cause(turn) for turn in lost)
        last = {_cause(turn): turn.reply[:80] for turn in lost}
        newest = list(dict.fromkeys(_cause(turn) for turn in reversed(lost)))[:SHOWN]
        shown = "; ".join(f"{causes[why]} × {why} (last: reply {last[why]!r})" for why in newest)
        raise ConversationError(
            f"expected at most {limit:.0%} of replies without a score, got {len(lost)} of {len(turns)}; fix the "
            f"judge, or raise env.max_failure_rate. The last causes: {shown}"
        )


def _cause(turn: Turn) -> str:
    return f"[{turn.verdict['status']}] {turn.verdict.get('rationale') or 'no reason'}"


def batch_metrics(trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    """Return the metrics of a batch; unjudged turns are counted but left out of the means.

    Returns:
        ``consistency`` (mean over judged turns) and ``reward_per_turn`` (the same per turn), None where none was
        judged; ``judged_turns``, ``judge_failures`` (turns played and not judged) and ``judge_failure_rate`` (their
        share); ``partner_failures``, fault -> conversations that it ended; ``truncated``, conversations.
    """
    rewards = reward_table(trajectories)
    judged = np.isfinite(rewards)
    turns = sum(len(t.turns) for t in trajectories)
    lost = turns - int(judged.sum())
    counts, sums = judged.sum(0), np.where(judged, rewards, 0.0).sum(0)
    per_turn = [float(s / c) if c else None for s, c in zip(sums, counts, strict=True)]
    return {
        "consistency": float(sums.sum() / counts.sum()) if counts.sum() else None,
        "reward_per_turn": per_turn,
        "judged_turns": turns - lost,
        "judge_failures": lost,
        "judge_failure_rate": lost / turns if turns else None,
        "partner_failures": partner_faults(trajectories),
        "truncated": sum(t.truncated for t in trajectories),
    }


def reply_lengths(trajectories: Sequence[Trajectory], end_of_turn_id: int) -> dict[str, float | None]:
    """Return how long the replies are, in tokens; None where no reply has tokens.

    Args:
        trajectories: The conversations.
        end_of_turn_id: The token that ends a reply.

    Returns:
        ``reply_tokens_mean``, ``reply_tokens_max``, and ``reply_cut``, the share of replies cut before their end.
    """
    replies = [turn.token_ids for t in trajectories for turn in t.turns if turn.token_ids]
    lengths, cut = [len(tokens) for tokens in replies], sum(tokens[-1] != end_of_turn_id for tokens in replies)
    return {
        "reply_tokens_mean": sum(lengths) / len(lengths) if lengths else None,
        "reply_tokens_max": max(lengths, default=None),
        "reply_cut": cut / len(replies) if replies else None,
    }


def reward_table(trajectories: Sequence[Trajectory]) -> NDArray[np.float64]:
    """Return per-turn rewards as [B, n], NaN at unjudged turns and after the end of shorter conversations."""
    table = np.full((len(trajectories), max((len(t.turns) for t in trajectories), default=0)), np.nan)
    for row, trajectory in zip(table, trajectories, strict=True):
        row[: len(trajectory.turns)] = [turn.reward for turn in trajectory.turns]
    return table


def partner_faults(trajectories: Sequence[Trajectory]) -> dict[str, int]:
    """Return how many conversations each fault of the partner ended; empty when there was none."""
    return dict(Counter(t.partner_status for t in trajectories if t.partner_status != "ok"))
