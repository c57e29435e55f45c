"""One sampler starts, another takes over: for pairs that share a history, and turns judged one by one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ppg_agents.generation import Sample, Sampler, SingleSampler
from ppg_agents.policy.policy import Policy
from ppg_agents.trajectory import Turn


class Given:
    """A sampler that repeats the replies of logged turns, token by token, in order."""

    own_model = False

    def __init__(self, turns: Sequence[Sequence[Turn]], sampler: Sampler, end_of_turn: int) -> None:
        """Take the replies of n conversations; limits are those of the sampler that takes over."""
        self.max_new_tokens, self.context_length = sampler.max_new_tokens, sampler.context_length
        self.temperature = sampler.temperature
        self._turns, self._end = turns, end_of_turn
        self._next = [0] * len(turns)

    def start(self, n: int) -> None:
        """Start over.

        Raises:
            ValueError: Another number of conversations than there are replies for.
        """
        if n != len(self._turns):
            raise ValueError(f"expected {len(self._turns)} conversations, got {n}")
        self._next = [0] * n

    def reply(self, prompts: Sequence[Sequence[int] | None], generator: torch.Generator | None) -> list[Sample | None]:
        """Return the next given reply of each conversation; None in, None out."""
        return [None if prompt is None else self.reply_one(i, prompt, None) for i, prompt in enumerate(prompts)]

    def reply_one(self, conversation: int, prompt: Sequence[int], seed: int | None) -> Sample:
        """Return a conversation's next given reply."""
        turn = self._turns[conversation][self._next[conversation]]
        self._next[conversation] += 1
        ended = turn.token_ids[-1:] == (self._end,)
        return Sample(turn.token_ids, turn.log_probs, ended, turn.policy_version, turn.temperature, turn.sampler)

    def sync(self, policy: Policy | None = None) -> None:
        """Nothing to sync: there are no weights."""

    def cancel(self) -> None:
        """Nothing to cancel."""

    def close(self) -> None:
        """Nothing to close."""


class Handover:
    """A sampler made of two: the first speaks in a conversation's first turns, the other in all later ones.

    The second gets everything it has not heard in its first prompt, so it need not know about the first.
    """

    own_model = False  # the caller merges the policies that speak

    def __init__(self, first: Sampler, then: Sampler, turns: Sequence[int]) -> None:
        """Take two samplers.

        Args:
            first: Speaks in conversation i's first ``turns[i]`` turns.
            then: Speaks after them.
            turns: Per conversation.
        """
        self._first, self._then, self._turns = first, then, turns
        self.max_new_tokens = max(first.max_new_tokens, then.max_new_tokens)
        self.context_length = min(first.context_length, then.context_length)
        self.temperature = then.temperature

    def start(self, n: int) -> None:
        """Begin n new conversations."""
        self._now = [0] * n
        self._unheard: list[list[int]] = [[] for _ in range(n)]
        self._first.start(n)
        self._then.start(n)

    def reply(self, prompts: Sequence[Sequence[int] | None], generator: torch.Generator | None) -> list[Sample | None]:
        """Return one reply per conversation; None in, None out."""
        early = [prompt if self._is_early(i) else None for i, prompt in enumerate(prompts)]
        samples: list[Sample | None] = [None] * len(prompts)
        if any(prompt is not None for prompt in early):
            samples = self._first.reply(early, generator)
        late = [
            None if prompt is None or self._is_early(i) else self._whole(i, prompt) for i, prompt in enumerate(prompts)
        ]
        for i, (prompt, sample) in enumerate(zip(early, samples, strict=True)):
            if prompt is not None and sample is not None:
                self._hear(i, prompt, sample)
        return [one or other for one, other in zip(samples, self._then.reply(late, generator), strict=True)]

    def reply_one(self, conversation: int, prompt: Sequence[int], seed: int | None) -> Sample:
        """Return a conversation's next reply.

        Raises:
            TypeError: One of them can only speak in lockstep.
        """
        if not (isinstance(self._first, SingleSampler) and isinstance(self._then, SingleSampler)):
            raise TypeError("expected two samplers that speak in one conversation at a time, got one in lockstep")
        if self._is_early(conversation):
            sample = self._first.reply_one(conversation, prompt, seed)
            self._hear(conversation, prompt, sample)
            return sample
        return self._then.reply_one(conversation, self._whole(conversation, prompt), seed)

    def sync(self, policy: Policy | None = None) -> None:
        """Do nothing: both are synced by their owners."""

    def cancel(self) -> None:
        """Make every reply under way raise."""
        for sampler in (self._first, self._then):
            if isinstance(sampler, SingleSampler):
                sampler.cancel()

    def close(self) -> None:
        """Do nothing: both are closed by their owners."""

    def _is_early(self, i: int) -> bool:
        return self._now[i] < self._turns[i]

    def _hear(self, i: int, prompt: Sequence[int], sample: Sample) -> None:
        self._unheard[i] += [*prompt, *sample.token_ids]
        self._now[i] += 1

    def _whole(self, i: int, prompt: Sequence[int]) -> list[int]:
        """Return the prompt, preceded by everything the second sampler has not heard."""
        unheard, self._unheard[i] = self._unheard[i], []
        return [*unheard, *prompt]
