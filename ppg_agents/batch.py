"""Conversations as padded arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppg_agents.trajectory import Trajectory


@dataclass(frozen=True)
class Batch:
    """Conversations as arrays; B conversations, L tokens in the longest, n turns.

    Every [B, L] array is indexed by the position of the token itself.

    Attributes:
        ids: Tokens [B, L] long, padded on the right.
        attention: Bool [B, L], True on real tokens.
        token_mask: Bool [B, L], True on sampled reply tokens.
        turn_index: Long [B, L], each token's turn, from 0; 0 on padding.
        rewards: Float64 [B, n], NaN where a turn was not judged or not played.
        valid: Bool [B, n], True where a turn was played and judged.
        missing: Bool [B, n], True where a fault took the reward: a turn without a score, and all that follow the loss
            of judge or partner. Where neither, the conversation had ended.
        sampling_log_probs: Float32 [B, L], 0 outside ``token_mask``, NaN where unknown.
        spans: Int64 [B, n, 3], the `Span` of every turn; -1 where it was not played.
    """

    ids: Tensor
    attention: Tensor
    token_mask: Tensor
    turn_index: Tensor
    rewards: NDArray[np.float64]
    valid: NDArray[np.bool_]
    missing: NDArray[np.bool_]
    sampling_log_probs: Tensor
    spans: NDArray[np.int64]


def batch(trajectories: Sequence[Trajectory], pad_id: int, n_turns: int | None = None) -> Batch:
    """Put conversations into one batch, a row each.

    Args:
        trajectories: At least one, unless ``n_turns`` is given: a process may have no share of a small batch.
        pad_id: Pads the rows on the right.
        n_turns: n; by default the turns of the longest conversation, at least 1.

    Raises:
        ValueError: No trajectory and no ``n_turns``, or a conversation of more turns.
    """
    if not trajectories and n_turns is None:
        raise ValueError("expected at least one trajectory, got none")
    longest = max((len(t.turns) for t in trajectories), default=0)
    n = max(longest, 1) if n_turns is None else n_turns
    if longest > n:
        raise ValueError(f"expected at most n_turns={n} turns, got a conversation of {longest}")
    rows = [t.token_ids() for t in trajectories]
    length = max(1, max(map(len, rows), default=1))
    ids = np.full((len(rows), length), pad_id, dtype=np.int64)
    attention = np.zeros(ids.shape, dtype=np.bool_)
    token_mask = np.zeros(ids.shape, dtype=np.bool_)
    turn_index = np.zeros(ids.shape, dtype=np.int64)
    log_probs = np.zeros(ids.shape, dtype=np.float32)
    rewards = np.full((len(rows), n), np.nan)
    played = np.zeros(rewards.shape, dtype=np.bool_)
    spans = np.full((len(rows), n, 3), -1, dtype=np.int64)
    for b, (row, trajectory) in enumerate(zip(rows, trajectories, strict=True)):
        ids[b, : len(row)] = row
        attention[b, : len(row)] = True
        for t, (turn, span) in enumerate(zip(trajectory.turns, trajectory.spans(), strict=True)):
            turn_index[b, span.prompt : span.end] = t
            token_mask[b, span.start : span.end] = True
            log_probs[b, span.start : span.end] = turn.log_probs
            rewards[b, t], played[b, t] = turn.reward, True
            spans[b, t] = span
    lost = np.array([trajectory.lost for trajectory in trajectories], dtype=np.bool_)
    return Batch(
        ids=torch.from_numpy(ids),
        attention=torch.from_numpy(attention),
        token_mask=torch.from_numpy(token_mask),
        turn_index=torch.from_numpy(turn_index),
        rewards=rewards,
        valid=np.isfinite(rewards),
        missing=~np.isfinite(rewards) & (played | lost[:, None]),
        sampling_log_probs=torch.from_numpy(log_probs),
        spans=spans,
    )
