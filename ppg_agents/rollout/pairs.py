"""Pairs of conversations that share a history up to a turn, through the environment's interface alone.

A conversation is played; a turn is drawn; it is played again with the same seed, the replies before that turn being the
first conversation's, as they were sampled. Whether the partner said the same both times is seen from the conversations:
`branch_point`. Nothing here learns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ppg_agents.generation import Sample
from ppg_agents.trajectory import Trajectory, Turn

Play = Callable[[Any, Sequence[int]], list[Trajectory]]


def play_pairs(
    play: Play, sampler: Any, seeds: Sequence[int], rng: np.random.Generator, end_of_turn: int
) -> list[Trajectory]:
    """Play pairs of conversations that share a history.

    Args:
        play: Holds one conversation per seed with a sampler.
        sampler: How replies are drawn.
        seeds: 2P seeds, two equal ones for each pair.
        rng: Draws the turn at which each pair parts, all turns of the first conversation alike.
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
    second = play(Forced(sampler, shared, end_of_turn), seeds[::2])
    return [trajectory for pair in zip(first, second, strict=True) for trajectory in pair]


def branch_point(one: Trajectory, other: Trajectory) -> int | None:
    """Return the first turn at which two conversations with the same history have different replies, from 0.

    None where the partner's lines (or the instructions) part before the replies do, and where nothing differs.
    """
    for t, (a, b) in enumerate(zip(one.turns, other.turns, strict=False)):
        if a.prompt_ids != b.prompt_ids:
            return None
        if a.token_ids != b.token_ids:
            return t
    return None


class Forced:
    """A sampler whose first replies are given; what comes after them is sampled by another.

    What is said before the other sampler's turn comes is its first prompt, so that it need know nothing of this.
    """

    def __init__(self, sampler: Any, given: Sequence[Sequence[Turn]], end_of_turn: int) -> None:
        """Take the first replies of each conversation."""
        self._sampler, self._given, self._end = sampler, given, end_of_turn
        self.start_over()

    def __getattr__(self, name: str) -> Any:
        """Return what the other sampler says of itself: its limits, its temperature, how to stop it."""
        return getattr(self._sampler, name)

    def start(self, n: int) -> None:
        """Begin n new conversations.

        Raises:
            ValueError: Not as many as replies are given for.
        """
        if n != len(self._given):
            raise ValueError(f"expected {len(self._given)} conversations, got {n}")
        self.start_over()
        self._sampler.start(n)

    def start_over(self) -> None:
        """Forget what was said."""
        self._said: list[list[int]] = [[] for _ in self._given]
        self._turn = [0] * len(self._given)

    def reply(
        self, prompts: Sequence[Sequence[int] | None], generator: torch.Generator | None
    ) -> list[Sample | None]:
        """Return one reply per conversation; None in, None out. See `generation.Sampler`."""
        forced = [None if prompt is None else self._forced(i, prompt) for i, prompt in enumerate(prompts)]
        left = [
            None if prompt is None or sample is not None else self._whole(i, prompt)
            for i, (prompt, sample) in enumerate(zip(prompts, forced, strict=True))
        ]
        drawn = self._sampler.reply(left, generator)
        return [one or other for one, other in zip(forced, drawn, strict=True)]

    def reply_one(self, conversation: int, prompt: Sequence[int], seed: int | None) -> Sample:
        """Return a conversation's next reply. See `generation.SingleSampler`."""
        forced = self._forced(conversation, prompt)
        if forced is not None:
            return forced
        sample: Sample = self._sampler.reply_one(conversation, self._whole(conversation, prompt), seed)
        return sample

    def _forced(self, i: int, prompt: Sequence[int]) -> Sample | None:
        """Return conversation i's given reply, None when there is none left."""
        if self._turn[i] >= len(self._given[i]):
            return None
        turn = self._given[i][self._turn[i]]
        self._turn[i] += 1
        self._said[i] += [*prompt, *turn.token_ids]
        ended = turn.token_ids[-1:] == (self._end,)
        return Sample(turn.token_ids, turn.log_probs, ended, turn.policy_version, turn.temperature, turn.sampler)

    def _whole(self, i: int, prompt: Sequence[int]) -> list[int]:
        """Return the prompt after all that the other sampler has not heard of."""
        unheard, self._said[i] = self._said[i], []
        return [*unheard, *prompt]
