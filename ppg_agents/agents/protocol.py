"""What the training loop asks of an agent. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from ppg_agents.trajectory import Trajectory


@dataclass(frozen=True)
class Needs:
    """What an agent needs from batches and settings; the defaults ask for nothing.

    Attributes:
        group: Fewest conversations with one persona.
        together: Consecutive conversations that must be on one process.
        branch: Whether a batch consists of pairs that share a history (see `ppg_agents.rollout.pairs`).
        full_only: Whether full planning is the only policy class it takes.
        one_class: Whether it learns the values of one policy class, so the class may not change during the run.
        best_of: How often an evaluation plays every conversation; the best one counts.
    """

    group: int = 1
    together: int = 1
    branch: bool = False
    full_only: bool = False
    one_class: bool = False
    best_of: int = 1


@runtime_checkable
class Agent(Protocol):
    """Learns from judged conversations, and can be saved.

    The policy and its sampler speak, unless the agent also has the methods of `SpeakingAgent`. It is made as
    ``Class(policy, mask, **settings)``, must accept settings it does not know, and counts its optimiser steps in
    ``policy.version``.
    """

    @property
    def needs(self) -> Needs:
        """What it needs from the loop; nothing by default."""
        return Needs()

    def learn(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """Learn from a batch of conversations; return metrics, ``policy_version`` among them."""

    def save(self, folder: str | Path) -> None:
        """Write everything needed to continue."""

    def load(self, folder: str | Path) -> None:
        """Read what `save` wrote."""


@runtime_checkable
class OfflineAgent(Agent, Protocol):
    """An agent that can learn from logged dialogues."""

    @property
    def learns_offline(self) -> bool:
        """Whether it does so with its current options."""

    @property
    def loss_is_likelihood(self) -> bool:
        """Whether the loss that `learn_offline` returns is minus the credit-weighted log-likelihood, summed."""

    def learn_offline(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """Learn from a batch of logged conversations; return metrics."""

    def evaluate_offline(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """Return ``objective``, the credit-weighted log-likelihood per conversation, and judged ``turns``."""


@runtime_checkable
class PreparingAgent(Protocol):
    """An offline agent that looks at all training conversations before the first step."""

    def prepare(self, trajectories: Sequence[Trajectory]) -> None:
        """Take what it needs of them. Every process sees all of them; a resumed run calls it again."""


@runtime_checkable
class SpeakingAgent(Protocol):
    """Speaks for itself: its replies are what the environment hears."""

    def start(self, n: int, seed: int = 0) -> None:
        """Begin n new conversations, with randomness from the seed."""

    def act(self, observations: Mapping[str, Sequence[str]]) -> list[str]:
        """Answer a batch of observations ``{"instruction": [n], "message": [n]}``.

        An ended conversation has an empty message, and the answer to it is ignored.
        """
