"""Pairs of conversations that share a history up to a turn, through the environment's interface alone.

A conversation is played and a turn drawn; then it is played again with the same seed, repeating the sampled replies
before that turn. `branch_point` checks whether the partner said the same both times. Nothing here learns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ppg_agents.generation import Sampler
from ppg_agents.rollout.handover import Given, Handover
from ppg_agents.trajectory import Trajectory

Play = Callable[[Sampler, Sequence[int]], list[Trajectory]]


def play_pairs(
    play: Play, sampler: Sampler, seeds: Sequence[int], rng: np.random.Generator, end_of_turn: int
) -> list[Trajectory]:
    """Play pairs of conversations that share a history.

    Args:
        play: Holds one conversation per seed with a sampler.
        sampler: Draws the replies.
        seeds: 2P seeds, two equal ones for each pair.
        rng: Draws the turn at which each pair parts, uniformly over the first conversation.
        end_of_turn: The token that closes a reply.

    Returns:
        2P conversations; 2p and 2p + 1 are a pair. Their shared turns have the same tokens and log-probs.

    Raises:
        ValueError: Seeds that are not pairs.
    """
    if list(seeds[::2]) != list(seeds[1::2]):
        raise ValueError("expected two equal seeds for each pair; set the batch to a multiple of 2 × processes")
    first = play(sampler, seeds[::2])
    shared = [t.turns[: int(rng.integers(max(1, len(t.turns))))] for t in first]
    given = Given(shared, sampler, end_of_turn)
    second = play(Handover(given, sampler, [len(turns) for turns in shared]), seeds[::2])
    return [trajectory for pair in zip(first, second, strict=True) for trajectory in pair]


def branch_point(one: Trajectory, other: Trajectory) -> int | None:
    """Return the first turn at which two conversations with the same history have different replies, from 0.

    None if the partner's lines (or the instructions) differ before the replies do, or if nothing differs.
    """
    for t, (a, b) in enumerate(zip(one.turns, other.turns, strict=False)):
        if a.prompt_ids != b.prompt_ids:
            return None
        if a.token_ids != b.token_ids:
            return t
    return None
