"""What is counted while a batch's gradient is added up; the counts of micro-batches and of processes add up too."""

from __future__ import annotations

from dataclasses import dataclass, field

from ppg_agents.importance import effective_share
from ppg_agents.ledger import Gap


@dataclass(frozen=True)
class WeightSums:
    """Sums over the importance weights w of a batch; those of parts add up.

    Attributes:
        total: Σw.
        squares: Σw².
        count: How many.
        truncated: Of these, those that the largest allowed weight cut down.
    """

    total: float = 0.0
    squares: float = 0.0
    count: int = 0
    truncated: int = 0

    def __add__(self, other: WeightSums) -> WeightSums:
        return WeightSums(
            self.total + other.total,
            self.squares + other.squares,
            self.count + other.count,
            self.truncated + other.truncated,
        )


@dataclass(frozen=True)
class Ratios:
    """What a loss says of w = π / π°, the learner against the sampler, at its tokens; those of parts add up.

    Attributes:
        largest: The largest w.
        count: Tokens.
        bounded: Tokens whose w the loss bounds.
        outside: Of these, those with w outside of the bounds.
    """

    largest: float = 0.0
    count: int = 0
    bounded: int = 0
    outside: int = 0

    def __add__(self, other: Ratios) -> Ratios:
        largest = max(self.largest, other.largest)
        return Ratios(
            largest, self.count + other.count, self.bounded + other.bounded, self.outside + other.outside
        )


@dataclass
class Sums:
    """What one process adds up over a batch.

    Attributes:
        loss: The micro-batches' losses.
        tokens: Real tokens in the batch.
        needed: Tokens up to each conversation's last trained one.
        read: Tokens in the micro-batches, padding included.
        turns: Trained turns, where the divergence is measured.
        kl: Estimated divergence from the reference, summed over them.
        weights: Importance weights, where there are any.
        gap: Of log-probs, over turns that the learner's own version sampled.
        ratios: Of the policy to the one that sampled, as the loss has them.
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

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.loss + other.loss,
            self.tokens + other.tokens,
            self.needed + other.needed,
            self.read + other.read,
            self.turns + other.turns,
            self.kl + other.kl,
            self.weights + other.weights,
            self.gap + other.gap,
            self.ratios + other.ratios,
        )

    def metrics(self, *, divergence: bool, weighted: bool) -> dict[str, float]:
        """Return ``loss``, ``tokens`` and ``padding``, and what else was measured.

        Args:
            divergence: Whether the reference model was read.
            weighted: Whether there were importance weights.
        """
        metrics: dict[str, float] = {
            "loss": self.loss,
            "tokens": self.tokens,
            "padding": 1 - self.needed / self.read if self.read else 0.0,
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
