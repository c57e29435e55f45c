"""Metrics of a batch of judged conversations, and limits on the failures of judge and partner."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ppg_agents.rollout.environment import ConversationError
from ppg_agents.trajectory import NO_OPENING

if TYPE_CHECKING:
    from ppg_agents.trajectory import Trajectory

FEW = 200  # turns: a smaller batch may have as many failures as one of this size
SHOWN = 3  # causes


def check_judge(trajectories: Sequence[Trajectory], limit: float) -> None:
    """Stop when the judge fails too often; an environment with one conversation cannot see that.

    Raises:
        ConversationError: More than ``limit`` of the turns (of at least ``FEW``) have a failed verdict.
    """
    turns = [turn for trajectory in _opened(trajectories) for turn in trajectory.turns]
    lost = [turn for turn in turns if turn.verdict.get("status", "scored") != "scored"]
    if len(lost) > limit * max(len(turns), FEW):
        causes = [(_cause(turn.verdict["status"], turn.verdict.get("rationale")), turn.reply) for turn in lost]
        raise ConversationError(
            f"expected at most {limit:.0%} of replies without a score, got {len(lost)} of {len(turns)}; fix the "
            f"judge, or raise env.max_failure_rate. The last causes: {_shown(causes)}"
        )


def check_partner(trajectories: Sequence[Trajectory], limit: float) -> None:
    """Stop when the partner fails too often, or in every conversation.

    Raises:
        ConversationError: More than ``limit`` of the partner's lines (of at least ``FEW``) are missing, or all of two
            or more conversations were lost; not at a limit of 1.
    """
    lost = [trajectory for trajectory in trajectories if trajectory.partner_failed]
    unopened = len(trajectories) - len(_opened(trajectories))
    lines = sum(len(trajectory.turns) for trajectory in trajectories) + len(lost) - unopened
    everything = limit < 1 and 2 <= len(lost) == len(trajectories)
    if len(lost) > limit * max(lines, FEW) or everything:
        causes = [(_cause(t.partner_status, t.partner_reason), t.turns[-1].reply if t.turns else "") for t in lost]
        never = f", which never gave an opening line in {unopened} of {len(trajectories)}," if unopened else ""
        raise ConversationError(
            f"expected at most {limit:.0%} of the partner's lines to be missing, got {len(lost)} of {lines}: faults of "
            f"the partner{never} ended {len(lost)} of {len(trajectories)} conversations; mend the partner (its server, "
            f"its model, env.partner_options), or raise env.max_partner_failure_rate. The last causes: {_shown(causes)}"
        )


def _opened(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """Return the conversations that the partner opened; in the others, nothing was there to judge."""
    return [trajectory for trajectory in trajectories if trajectory.partner_status != NO_OPENING]


def _cause(status: str, why: str | None) -> str:
    return f"[{status}] {why or 'no reason'}"


def _shown(causes: Sequence[tuple[str, str]]) -> str:
    """Return the newest causes, how often each came, and the reply of its last example."""
    times, last = Counter(cause for cause, _ in causes), dict(causes)
    newest = list(dict.fromkeys(cause for cause, _ in reversed(causes)))[:SHOWN]
    return "; ".join(f"{times[cause]} × {cause} (last: reply {last[cause][:80]!r})" for cause in newest)


def batch_metrics(trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    """Return the metrics of a batch; unjudged turns are counted but left out of the means.

    Returns:
        ``consistency`` (mean over judged turns, see `partner_weights`) and ``reward_per_turn`` (the same per turn),
        None where none was judged; ``judged_turns``, ``judge_failures`` (turns played and not judged, without those
        that the partner never opened) and ``judge_failure_rate`` (their share); ``partner_failures``, fault ->
        conversations that it ended; ``truncated``, conversations.
    """
    rewards = reward_table(trajectories)
    judged = np.isfinite(rewards)
    turns = sum(len(t.turns) for t in _opened(trajectories))
    lost = turns - int(judged.sum())
    counts, sums = judged.sum(0), np.where(judged, rewards, 0.0).sum(0)
    weights = partner_weights(trajectories)
    total, weight = (sums * weights).sum(), (counts * weights).sum()
    per_turn = [float(s / c) if c else None for s, c in zip(sums, counts, strict=True)]
    return {
        "consistency": float(total / weight) if weight else None,
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


def partner_weights(trajectories: Sequence[Trajectory]) -> NDArray[np.float64]:
    """Return what a turn counts in a mean over turns, [n]: 1, and more after faults of the partner.

    Later turns often score less. Where the partner ended conversations, the turns that were played stand for those that
    were not: a turn counts 1 / S, with S the share of conversations that no fault had ended by then (Kaplan and Meier's
    product, 1958), so that a partner that fails does not raise the mean. Ends that are no fault change nothing.
    """
    lengths = np.array([len(t.turns) for t in trajectories], dtype=int)
    # One that was never opened lacks all of its turns alike.
    failed = np.array([t.partner_failed and t.partner_status != NO_OPENING for t in trajectories], dtype=bool)
    weights = np.ones(lengths.max(initial=0))
    for turn in range(1, len(weights)):
        played, lost = int((lengths > turn).sum()), int((failed & (lengths == turn)).sum())
        weights[turn] = weights[turn - 1] * (played + lost) / played
    return weights


def partner_faults(trajectories: Sequence[Trajectory]) -> dict[str, int]:
    """Return how many conversations each fault of the partner ended; empty when there was none."""
    return dict(Counter(t.partner_status for t in trajectories if t.partner_status != "ok"))
