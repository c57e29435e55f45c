"""Sampled replies and what can make them. No sampler here decides what a conversation is about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class Sample:
    """A reply as it was sampled.

    Attributes:
        token_ids: The sampled tokens, end-of-turn included when it was sampled.
        log_probs: Their log-probabilities under the policy at temperature 1.
        ended: Whether end-of-turn was sampled, rather than the length limit reached.
    """

    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    ended: bool


class Sampler(Protocol):
    """Speaks for n conversations in lockstep, and remembers their tokens from turn to turn."""

    @property
    def max_new_tokens(self) -> int:
        """Most tokens in a reply."""

    def start(self, n: int) -> None:
        """Begin n new conversations and forget the old ones."""

    def reply(self, prompts: Sequence[Sequence[int] | None], generator: torch.Generator | None) -> list[Sample | None]:
        """Return one reply per conversation; None in, None out.

        Args:
            prompts: The tokens since the conversation's last sampled token; None when it is finished.
            generator: Source of randomness; None only for greedy sampling.
        """


__all__ = ["Sample", "Sampler"]
