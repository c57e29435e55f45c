"""The exact twin of a domain: its rule table as a small tabular Markov decision process.

A domain's partner moves between a handful of states, and its judge scores a reply by the state and by the *kind* of
the reply. Both use one :class:`~ppg_gym.domain.loading.RuleTable`; so does this module, which computes exactly what
language can only sample: the best reachable value, and the value that every policy class converges to with infinite
data. Nothing here sees a word of text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from ppg_gym.domain.loading import Domain, RuleTable

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Twin:
    """A finite-horizon MDP with states, reply kinds and deterministic moves.

    Attributes:
        states: Names; the first is the initial state.
        kinds: Names of the actions.
        score: [S, A], the reward of kind ``a`` in state ``s``, in [0, 1].
        step: [S, A] of int, the next state.
    """

    states: tuple[str, ...]
    kinds: tuple[str, ...]
    score: Array
    step: npt.NDArray[np.int64]

    @classmethod
    def of(cls, table: RuleTable) -> Twin:
        """Build the twin of a rule table."""
        states, kinds = tuple(table.states), tuple(table.kinds)
        index = {name: i for i, name in enumerate(states)}
        score = np.array([[table.score[s, a] for a in kinds] for s in states], dtype=np.float64)
        step = np.array([[index[table.next[s, a]] for a in kinds] for s in states], dtype=np.int64)
        return cls(states, kinds, score, step)

    def best(self, n: int) -> float:
        """Return the best mean reward per turn over ``n`` turns, by backward induction."""
        value = np.zeros(len(self.states))
        for _ in range(n):
            value = (self.score + value[self.step]).max(axis=1)
        return float(value[0] / n)

    def policy(self, mix: dict[str, float], n: int) -> Array:
        """Return the policy [n, S, A] that plays the same mixture of kinds in every state.

        Raises:
            ValueError: An unknown kind, or weights that do not sum to a positive number.
        """
        unknown = set(mix) - set(self.kinds)
        weights = np.array([mix.get(kind, 0.0) for kind in self.kinds])
        if unknown or weights.sum() <= 0:
            raise ValueError(f"expected weights for some of the kinds {self.kinds}, got {mix}")
        return np.broadcast_to(weights / weights.sum(), (n, len(self.states), len(self.kinds))).copy()

    def start(self, domain: Domain, n: int) -> Array:
        """Return the policy [n, S, A] of the untrained embedded model: the domain's mixture in each state."""
        mixes = [domain.mix_in(state) for state in self.states]
        policy = np.array([[mix.get(kind, 0.0) for kind in self.kinds] for mix in mixes])
        return np.broadcast_to(policy, (n, *policy.shape)).copy()

    def visits(self, policy: Array) -> Array:
        """Return d[t, s], the probability of being in state ``s`` at turn ``t``, for a policy [n, S, A]."""
        n, states, _ = policy.shape
        d = np.zeros((n, states))
        d[0, 0] = 1.0
        for t in range(n - 1):
            np.add.at(d[t + 1], self.step, d[t][:, None] * policy[t])
        return d

    def rewards(self, policy: Array) -> Array:
        """Return the expected reward [n] of every turn under a policy [n, S, A]."""
        rewards: Array = np.einsum("ts,tsa,sa->t", self.visits(policy), policy, self.score)
        return rewards

    def action_value(self, policy: Array, mask: npt.NDArray[np.bool_]) -> Array:
        """Return Q[t, s, a] = E[sum of the rewards that ``mask[t]`` credits to the action at turn t].

        Args:
            policy: [n, S, A].
            mask: [n, n] boolean, upper triangular: the policy class.
        """
        n, states, kinds = policy.shape
        q = np.zeros((n, states, kinds))
        for t in range(n):
            ahead = np.zeros(states)  # E[credited rewards of turns > t | state at turn t + 1]
            for later in range(n - 1, t, -1):
                immediate = self.score * mask[t, later]
                ahead = (policy[later] * (immediate + ahead[self.step])).sum(axis=1)
            q[t] = self.score * mask[t, t] + ahead[self.step]
        return q

    def gradient(self, logits: Array, mask: npt.NDArray[np.bool_]) -> Array:
        """Return the exact partial policy gradient [n, S, A] for a softmax policy with these logits."""
        policy = softmax(logits)
        q = self.action_value(policy, mask)
        advantage = q - (policy * q).sum(axis=-1, keepdims=True)
        gradient: Array = self.visits(policy)[:, :, None] * policy * advantage
        return gradient

    def ascend(
        self,
        mask: npt.NDArray[np.bool_],
        start: Array | None = None,
        steps: int = 4000,
        step_size: float = 20.0,
    ) -> Array:
        """Follow the exact gradient of a policy class and return the policy [n, S, A] it ends at.

        Args:
            mask: [n, n] boolean policy class.
            start: Initial policy [n, S, A]; uniform when None.
            steps: Gradient steps.
            step_size: Step size of plain gradient ascent on the logits.
        """
        n = mask.shape[0]
        shape = (n, len(self.states), len(self.kinds))
        logits = np.zeros(shape) if start is None else np.log(np.maximum(start, 1e-12))
        for _ in range(steps):
            logits = logits + step_size * self.gradient(logits, mask)
            logits -= logits.max(axis=-1, keepdims=True)
        return softmax(logits)


def softmax(logits: Array) -> Array:
    """Return the softmax over the last axis."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities: Array = shifted / shifted.sum(axis=-1, keepdims=True)
    return probabilities


def influence(twin: Twin, policy: Array, turn: int, best: Sequence[str], worst: Sequence[str]) -> tuple[Array, Array]:
    """Return the expected rewards [n] when turn ``turn`` is played with the best and the worst kind.

    Args:
        twin: The domain's twin.
        policy: [n, S, A], played at every other turn.
        turn: Index from 0.
        best: One kind per state.
        worst: One kind per state.
    """

    def forced(kinds: Sequence[str]) -> Array:
        played = policy.copy()
        played[turn] = 0.0
        for state, kind in enumerate(kinds):
            played[turn, state, twin.kinds.index(kind)] = 1.0
        return twin.rewards(played)

    return forced(best), forced(worst)
