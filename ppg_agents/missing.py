"""Rewards that a fault took away: the judge gave no score, or judge or partner was lost and the rest was not played.

A fault must cost nobody anything: neither this conversation's earlier replies, nor those of the others, which would be
compared with a sum that lacks a term. So a reward is compared with the others of *its own turn* before credit is
formed, and what was seen stands for what was not:

    A_{b,t} = Σ_ℓ M[t, ℓ] · discount^(ℓ−t) · w_{b,t,ℓ} · (r_{b,ℓ} − c_{b,t,ℓ})

    w_{b,t,ℓ} = 1 / P(reward ℓ is seen | reply t is judged),   0 where it was not seen                             (own)

with c any baseline, a mean over conversations that have both. Inverse probability of censoring weights: Robins and
Rotnitzky (1992); P is estimated from the batch, turn by turn, as Kaplan and Meier (1958) do it. An end that the policy
chose is no fault: what follows it is seen, and is 0.

What is assumed, whatever the policy class and the baseline: **faults do not depend on the replies**. Then, where all
conversations have one length, the expected gradient of every pair (t, ℓ) that some conversation of the batch has is
exactly the one without faults, for every single pattern of faults. Where the policy chooses ends, it is so for known
probabilities, and nearly so for estimated ones. A pair that no conversation has says nothing.

Numpy only; nothing here may know a token, a model or a judge.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from ppg_agents import baselines
from ppg_agents.credit import Mask, credit

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]
Baseline = Callable[[Array, Flags], Array]
"""``(rewards [B, N], seen [B, N]) -> [B, N]``, column by column; see `ppg_agents.baselines`."""


def rates(reached: Flags, lost: Flags, unjudged: Flags) -> tuple[Array, Array]:
    """Return how often faults happened at each turn.

    Args:
        reached: [B, n], the turn was played.
        lost: [B, n], the conversation was lost after it.
        unjudged: [B, n], it was played and has no score.

    Returns:
        ``loss`` [n]: the share lost after turn t, of the conversations that would have gone on; ``silence`` [n]: the
        share without a score, of those that played turn t. 0 where there is no such conversation.
    """
    going_on = reached & (lost | np.pad(reached[:, 1:], ((0, 0), (0, 1))))
    loss = (going_on & lost).sum(0) / np.maximum(going_on.sum(0), 1)
    return loss, (reached & unjudged).sum(0) / np.maximum(reached.sum(0), 1)


def observation_weights(valid: Flags, missing: Flags) -> tuple[Array, Array]:
    """Return one over the probability that faults left a reply, or a reward, to be seen.

    Args:
        valid: [B, n], played and judged.
        missing: [B, n], a fault took the reward. Neither: the conversation had ended.

    Returns:
        ``replies`` [B, n]: 1 / P(reply t is judged), 0 where it is not. ``pairs`` [B, n, n]: w[b, t, ℓ], 0 where
        reply t or reward ℓ was not seen, and for ℓ < t. All of them are 1 or 0 without faults.
    """
    size, n = valid.shape
    # A turn before the first, which all conversations have, makes the replies' own probabilities a case of the pairs'.
    first = ((0, 0), (1, 0))
    valid, missing = np.pad(valid, first, constant_values=True), np.pad(missing, first)
    after = np.flip(np.logical_and.accumulate(np.flip(missing, 1), axis=1), 1)  # nothing was seen from here on
    reached = valid | (missing & ~after)
    lost = reached & np.pad(after[:, 1:], ((0, 0), (0, 1)))
    last = n - np.argmax(np.flip(reached, 1), axis=1)  # the last turn that was played
    turn = np.arange(n + 1)
    weights = np.zeros((size, n + 1, n + 1))
    for t in turn:
        rows = valid[:, t]
        loss, silence = rates(reached[rows, t:], lost[rows, t:], missing[rows, t:])
        survival = np.concatenate([[1.0], np.cumprod(1.0 - loss)[:-1]])  # P(not lost before turn ℓ | reply t is judged)
        # After its own end a conversation can no longer be lost: only the turns that it played count.
        chance = survival[np.minimum(turn[None, t:], last[rows, None]) - t]
        chance = np.where(reached[rows, t:], chance * (1.0 - silence), chance)
        chance[:, 0] = 1.0
        seen = ~missing[rows, t:]
        weights[rows, t, t:] = np.where(seen, 1.0 / np.where(seen, chance, 1.0), 0.0)
    return weights[:, 0, 1:] * valid[:, 1:], weights[:, 1:, 1:]


class Credits:
    """The credit of a batch, with what faults took away made up for.

    Attributes:
        valid: [B, n], played and judged.
        missing: [B, n], a fault took the reward.
        replies: [B, n], 1 / P(reply t is judged), 0 where it is not; see `observation_weights`.
    """

    def __init__(self, rewards: Array, valid: Flags, missing: Flags, mask: Mask, discount: float = 1.0) -> None:
        """Weigh every pair of a reply and a later reward.

        Args:
            rewards: r [B, n]; read where ``valid``.
            valid: [B, n].
            missing: [B, n]; where neither, the conversation had ended and the reward is 0.
            mask: A policy class M [n, n].
            discount: γ in [0, 1], per turn.

        Raises:
            ValueError: What `credit.credit` refuses, or a reward that is both valid and missing.
        """
        self._plain = credit(rewards, mask, valid, discount)
        if missing.shape != valid.shape or missing.dtype != np.bool_ or (missing & valid).any():
            raise ValueError(
                f"expected boolean missing of shape {list(valid.shape)}, true only where valid is false, got "
                f"{missing.dtype} {list(missing.shape)}"
            )
        self.valid, self.missing = valid, missing
        self.replies, self._weights = observation_weights(valid, missing)
        n = valid.shape[1]
        steps = np.arange(n)[None, :] - np.arange(n)[:, None]
        self._factors = np.asarray(mask, dtype=np.float64) * float(discount) ** np.maximum(steps, 0)
        self._rewards: Array = np.where(valid, rewards, 0.0)

    def against(self, baseline: Baseline) -> Array:
        """Return A [B, n]: every turn's reward less its baseline, weighed and added up; 0 at invalid turns.

        Args:
            baseline: Such as `baselines.batch_mean`; called once, with a column for each of the n·n pairs (t, ℓ).
        """
        rewards, seen = self._columns()
        terms = np.where(seen, rewards - baseline(rewards, seen), 0.0).reshape(self._weights.shape)
        total: Array = (self._factors * self._weights * terms).sum(2)
        return total

    def filled(self, groups: Sequence[Hashable] | None = None) -> Array:
        """Return the credit [B, n] with every missing reward made up for, Σ_ℓ M[t, ℓ] · discount^(ℓ−t) · r̃_{b,t,ℓ}.

        Where nothing is missing it is `credit.credit`. See `pairs` for r̃ and ``groups``.
        """
        if not self.missing.any():
            return self._plain
        total: Array = (self._factors * self.pairs(groups)).sum(2)
        return total

    def pairs(self, groups: Sequence[Hashable] | None = None) -> Array:
        """Return what reward ℓ counts for reply t, r̃ = c + w · (r − c) [B, n, n]; 0 where reply t is not judged.

        Args:
            groups: B labels; c is the mean over conversations of *other* groups, so that it depends on no reply of the
                group itself. Default: every conversation is a group.
        """
        rewards, seen = self._columns()
        others = baselines.mean_of_others(rewards, seen, range(len(rewards)) if groups is None else groups)
        later = self.valid[:, :, None] & np.triu(np.ones_like(self._factors, dtype=np.bool_))
        rewards, others = (columns.reshape(self._weights.shape) for columns in (rewards, others))
        filled: Array = np.where(later, others + self._weights * (rewards - others), 0.0)
        return filled

    def filled_rewards(self) -> Array:
        """Return the rewards [B, n]: 0 after an end, the mean of the other conversations where one is missing."""
        others = baselines.mean_of_others(self._rewards, ~self.missing, range(len(self._rewards)))
        return np.where(self.missing, others, self._rewards)

    def _columns(self) -> tuple[Array, Flags]:
        """Return every reward once for each reply [B, n·n], and where both were seen."""
        size, n = self.valid.shape
        rewards = np.broadcast_to(self._rewards[:, None, :], (size, n, n)).reshape(size, -1)
        return rewards, (self._weights > 0).reshape(size, -1)
