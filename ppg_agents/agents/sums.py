"""Sums and counts over a batch; those of micro-batches and processes add up."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from ppg_agents.agents.importance import effective_share
from ppg_agents.agents.watch import Watched
from ppg_agents.ledger import Gap


@dataclass(frozen=True)
class WeightSums:
    """Sums over the importance weights w of a batch; those of parts add up.

    Attributes:
        total: Σw.
        squares: Σw².
        count: Number of weights.
        truncated: How many of them were cut down to the largest allowed weight.
    """

    total: float = 0.0
    squares: float = 0.0
    count: int = 0
    truncated: int = 0

    def __add__(self, other: WeightSums) -> WeightSums:
        return WeightSums(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))


@dataclass(frozen=True)
class Ratios:
    """Counts of a loss's ratios w = π / π° of learner to sampler at its tokens; those of parts add up.

    Attributes:
        largest: The largest w.
        count: Tokens.
        bounded: Tokens whose w the loss bounds.
        outside: How many of these have w outside the bounds.
    """

    largest: float = 0.0
    count: int = 0
    bounded: int = 0
    outside: int = 0

    def __add__(self, other: Ratios) -> Ratios:
        largest = max(self.largest, other.largest)
        return Ratios(largest, self.count + other.count, self.bounded + other.bounded, self.outside + other.outside)


@dataclass
class Sums:
    """The sums of one process over a batch.

    Attributes:
        loss: Sum of the micro-batches' losses.
        tokens: Real tokens in the batch.
        needed: Tokens up to each conversation's last trained one.
        read: Tokens in the micro-batches, padding included.
        turns: Trained turns; only counted if the divergence is measured.
        kl: Estimated divergence from the reference, in nats, summed over these turns.
        weights: Importance weights, if any.
        gap: Log-prob gap over turns that the learner's current version sampled.
        ratios: The loss's ratios of learner to sampler.
        watched: Entropy and divergences of the policy.
    """

    loss: float = 0.0
    tokens: int = 0
    needed: int = 0
    read: int = 0
    turns: int = 0
    kl: float = 0.0
    weights: WeightSums = field(default_factory=WeightSums)
    gap: Gap = field(default_factory=Gap)
    ratios: Ratios = field(default_factory=Ratios)
    watched: Watched = field(default_factory=Watched)

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))

    def metrics(self, *, divergence: bool, weighted: bool) -> dict[str, float]:
        """Return ``loss``, ``tokens``, ``padding``, and whatever else was measured.

        Args:
            divergence: Whether the divergence from the reference was measured.
            weighted: Whether there were importance weights.
        """
        metrics: dict[str, float] = {
            "loss": self.loss,
            "tokens": self.tokens,
            "padding": 1 - self.needed / self.read if self.read else 0.0,
            **self.watched.metrics(),
        }
        if self.gap.count:
            metrics |= {"log_prob_gap_mean": self.gap.mean, "log_prob_gap_max": self.gap.largest}
        if divergence:
            metrics["kl"] = self.kl / max(1, self.turns)
        if weighted:
            weights = self.weights
            metrics["importance_ess"] = effective_share(weights.total, weights.squares, weights.count)
            metrics["importance_truncated"] = weights.truncated / max(1, weights.count)
        if self.ratios.count:
            metrics["ratio_max"] = self.ratios.largest
        if self.ratios.bounded:
            metrics["clip_fraction"] = self.ratios.outside / self.ratios.bounded
        return metrics
