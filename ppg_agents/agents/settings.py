"""The settings of a learner with any method, and their ranges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from ppg_agents.agents.importance import Importance
from ppg_agents.group_advantage import PER_TURN
from ppg_agents.losses import Aggregation

Baseline = Literal["none", "leave-one-out", "batch-mean", "moving-average", "group", "group-turn"]

Optimizer = Literal["adamw", "sgd"]


@dataclass(frozen=True)
class LearnerSettings:
    """Settings for every method; a method refuses those that it would ignore.

    Attributes:
        n_turns: n; None for the longest conversation of each batch.
        discount: Per turn.
        baseline: Subtracted from the credit when learning online; None for the method's own default.
            ``leave-one-out`` compares conversations with the same instruction; ``group`` and ``group-turn``, which also
            scale, those with the same instruction and topic (`ppg_agents.group_advantage`), and hold offline too.
        standardise: Divide advantages by their standard deviation.
        aggregation: How token losses become one number (see `losses`); ``sum`` is the gradient itself.
        constant: The divisor of the aggregation ``constant``.
        optimizer: ``adamw``, or ``sgd``: θ ← θ − rate · gradient, without momentum.
        learning_rate: The step size: a number, or a function of the steps taken.
        max_grad_norm: The gradient is scaled down to this 2-norm; 0 leaves it as it is.
        weight_decay: Every step also takes rate · weight_decay · θ off the weights.
        betas: AdamW's decay of its two moments, each in [0, 1).
        micro_batch_tokens: Tokens, padding included, per forward pass; at least one conversation.
        importance: Level of the weights for replies sampled by another version or engine, see `importance`.
        importance_cap: Largest weight.
        kl_coefficient: Weight of the divergence from the model without its adapter, per reply in nats.
        entropy_coefficient: Weight of the entropy bonus, per token in nats (see `gradient.Objective`).
        reference_kl_every: Batches from one measurement of the divergence from the model without its adapter to the
            next, where the loss does not need it; 0 for never.
        max_log_prob_gap: Learning stops where the log-probs of sampler and learner differ by more nats per uncertain
            token (`ledger.gap_fault`); None for a limit set by the learner's precision (`ledger.default_gap_limit`).
            Stale turns are exempt.
        max_staleness: How many optimiser steps a turn's policy version may be behind; 0 is on-policy.
        steps_per_batch: Optimiser steps on every online batch. From the second on, the replies come from an older
            policy, so more than 1 needs importance weights, or a method whose loss has its own ratios.
    """

    n_turns: int | None = None
    discount: float = 1.0
    baseline: Baseline | None = None
    standardise: bool = False
    aggregation: Aggregation = "sum"
    constant: float | None = None
    optimizer: Optimizer = "adamw"
    learning_rate: float | Callable[[int], float] = 1e-3
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    micro_batch_tokens: int = 8192
    importance: Importance = "none"
    importance_cap: float = 2.0
    kl_coefficient: float = 0.0
    entropy_coefficient: float = 0.0
    reference_kl_every: int = 5
    max_log_prob_gap: float | None = None
    max_staleness: int = 0
    steps_per_batch: int = 1

    def __post_init__(self) -> None:
        """Check ranges and combinations.

        Raises:
            ValueError: A value out of range, or settings that contradict one another.
        """
        if self.baseline is not None and self.baseline not in get_args(Baseline):
            raise ValueError(f"expected a baseline in {get_args(Baseline)}, got {self.baseline!r}")
        if self.baseline in PER_TURN and self.standardise:
            raise ValueError(f"expected standardise = False with baseline {self.baseline!r}, which scales by itself")
        if self.baseline == "moving-average" and self.n_turns is None:
            raise ValueError("expected n_turns with baseline 'moving-average', got None; pass n_turns=")
        gap = self.max_log_prob_gap
        if (gap is not None and not gap > 0) or self.max_staleness < 0:
            raise ValueError(
                f"expected max_log_prob_gap > 0 and max_staleness >= 0, got {gap} and {self.max_staleness}"
            )
        if self.steps_per_batch < 1:
            raise ValueError(f"expected steps_per_batch >= 1, got {self.steps_per_batch}")
        for name in ("kl_coefficient", "entropy_coefficient"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"expected {name} >= 0, got {getattr(self, name)}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"expected two betas in [0, 1), got {self.betas}")
        if self.optimizer not in get_args(Optimizer):
            raise ValueError(f"expected an optimizer in {get_args(Optimizer)}, got {self.optimizer!r}")
        if self.optimizer == "sgd" and self.betas != type(self).betas:
            raise ValueError(f"expected betas with the optimizer 'adamw' alone, got {self.betas} with 'sgd'")
        if self.max_grad_norm < 0:
            raise ValueError(f"expected max_grad_norm >= 0 (0 for no clipping), got {self.max_grad_norm}")
        if self.reference_kl_every < 0:
            raise ValueError(f"expected reference_kl_every >= 0, got {self.reference_kl_every}")

    def rate(self, steps: int) -> float:
        """Return the learning rate after so many steps."""
        return self.learning_rate(steps) if callable(self.learning_rate) else self.learning_rate
