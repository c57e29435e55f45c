"""The gradient of one batch: conversations packed into micro-batches, scored, their losses added up.

What is measured on the way is a sum over conversations, so that the sums of several processes add up too. The loss is
a function of a micro-batch (`Loss`); nothing here knows a baseline, a policy class or an optimiser.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppg_agents import ledger, losses
from ppg_agents.distributed import Alone, Workers, passes
from ppg_agents.importance import Importance, effective_share, importance_weights
from ppg_agents.ledger import Gap
from ppg_agents.policy.policy import Policy
from ppg_agents.trajectory import Batch

Array = NDArray[np.float64]
Reduction = dict[str, Any]


@dataclass(frozen=True)
class Whole:
    """The batch of all processes, and which rows of it are this one's.

    Attributes:
        credit: [B, n] over the conversations of all ranks, in rank order.
        rewards: [B, n], NaN where ``valid`` is false.
        valid: [B, n].
        groups: B labels; conversations that share a persona have equal ones.
        own: This rank's rows.
        units: What the aggregation divides by.
    """

    credit: Array
    rewards: Array
    valid: NDArray[np.bool_]
    groups: list[Hashable]
    own: slice
    units: int


@dataclass(frozen=True)
class Objective:
    """What is minimised, besides the loss itself.

    Attributes:
        aggregation: How token losses become one number (see `losses`).
        constant: For the aggregation ``constant``.
        importance: Level of the importance weights (see `importance`).
        importance_cap: Largest weight.
        kl_coefficient: Weight of the divergence from the reference model, added to the loss.
        reference: The loss reads the reference model's log-probs.
        together: Conversations in a row that the loss compares, and that no micro-batch separates.
    """

    aggregation: losses.Aggregation = "sum"
    constant: float | None = None
    importance: Importance = "none"
    importance_cap: float = 2.0
    kl_coefficient: float = 0.0
    reference: bool = False
    together: int = 1

    def __post_init__(self) -> None:
        """Check what one type cannot say."""
        if self.importance not in ("none", "turn", "token") or not self.importance_cap >= 1:
            raise ValueError(
                "expected importance 'none', 'turn' or 'token' and importance_cap >= 1, got "
                f"{self.importance!r} and {self.importance_cap}"
            )
        if not 0 <= self.kl_coefficient < float("inf"):
            raise ValueError(f"expected kl_coefficient >= 0, got {self.kl_coefficient}")

    def reduction(self, units: int) -> Reduction:
        """Return how a micro-batch of a batch of ``units`` is reduced."""
        return {"aggregation": self.aggregation, "constant": self.constant, "batch_size": units}


@dataclass(frozen=True)
class Scored:
    """One micro-batch of R conversations, all [R, L'].

    Attributes:
        rows: Their numbers in the batch.
        ids: Tokens.
        attention: Real tokens.
        log_probs: Of the trained tokens, with their gradient.
        sampling: What the sampler gave for them; NaN where nobody knows.
        token_mask: The trained tokens.
        turn_index: The turn of every token.
        weights: Importance weights, where there are any.
        reference: Log-probs of the reference model, where they are asked for.
    """

    rows: list[int]
    ids: Tensor
    attention: Tensor
    log_probs: Tensor
    sampling: Tensor
    token_mask: Tensor
    turn_index: Tensor
    weights: Tensor | None = None
    reference: Tensor | None = None


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


Loss = Callable[[Scored, Reduction], tuple[Tensor, Ratios]]
"""A micro-batch and how it is reduced in; its part of the loss out (a scalar), and what is said of its ratios."""


def policy_gradient(advantage: Array) -> Loss:
    """Return the partial policy gradient with the advantage [B, n] of every turn."""

    def loss(part: Scored, reduction: Reduction) -> tuple[Tensor, Ratios]:
        arrays = (part.log_probs, part.token_mask, part.turn_index, torch.from_numpy(advantage[part.rows]))
        return losses.partial_policy_gradient(*arrays, **reduction, weights=part.weights), Ratios()

    return loss


def log_likelihood(weight: Array) -> Loss:
    """Return the likelihood of logged words with the weight [B, n] of every turn."""

    def loss(part: Scored, reduction: Reduction) -> tuple[Tensor, Ratios]:
        arrays = (part.log_probs, part.token_mask, part.turn_index, torch.from_numpy(weight[part.rows]))
        return losses.reward_weighted_log_likelihood(*arrays, **reduction), Ratios()

    return loss


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

    def metrics(self, objective: Objective) -> dict[str, float]:
        """Return ``loss``, ``tokens`` and ``padding``; and what was measured of gap, divergence, weights and ratios."""
        found: dict[str, float] = {
            "loss": self.loss,
            "tokens": self.tokens,
            "padding": 1 - self.needed / self.read if self.read else 0.0,
        }
        if self.gap.count:
            found |= {"log_prob_gap_mean": self.gap.mean, "log_prob_gap_max": self.gap.largest}
        if objective.kl_coefficient or objective.reference:
            found["kl"] = self.kl / max(1, self.turns)
        if objective.importance != "none":
            given = self.weights
            found["importance_ess"] = effective_share(given.total, given.squares, given.count)
            found["importance_truncated"] = given.truncated / max(1, given.count)
        if self.ratios.count:
            found["ratio_max"] = self.ratios.largest
        if self.ratios.bounded:
            found["clip_fraction"] = self.ratios.outside / self.ratios.bounded
        return found


def trained_tokens(data: Batch) -> Tensor:
    """Return the mask [B, L] of sampled tokens in judged turns."""
    return losses.turn_token_mask(data.token_mask, data.turn_index, torch.from_numpy(data.valid))


def score(
    policy: Policy, data: Batch, budget: int, temperature: float = 1.0, together: int = 1
) -> Iterator[Scored]:
    """Yield micro-batches of at most ``budget`` tokens, padding included; at least ``together`` conversations each.

    Conversations of similar length go together; those without a trained token are left out, and so are the
    tokens after the last trained one.
    """
    trained = trained_tokens(data)
    for rows, length in packs(trained, budget, together):
        ids, attention = data.ids[rows, :length], data.attention[rows, :length]
        token_mask, turn_index = trained[rows, :length], data.turn_index[rows, :length]
        log_probs = policy.log_probs(ids, attention, token_mask, temperature=temperature)
        where = log_probs.device
        sampling = data.sampling_log_probs[rows, :length].to(where)
        yield Scored(rows, ids, attention, log_probs, sampling, token_mask.to(where), turn_index.to(where))


def packs(trained: Tensor, budget: int, together: int = 1) -> list[tuple[list[int], int]]:
    """Return the rows of every micro-batch and how many tokens of them are read; see `score`."""
    ends, found = last_trained(trained), []
    bundles = {b: max(ends[b : b + together]) for b in range(0, len(ends), together)}
    order = sorted((b for b, end in bundles.items() if end), key=lambda b: -bundles[b])
    while order:
        length = bundles[order[0]]
        size = max(1, budget // (length * together))
        found.append(([row for b in order[:size] for row in range(b, min(b + together, len(ends)))], length))
        order = order[size:]
    return found


def last_trained(trained: Tensor) -> list[int]:
    """Return the length of each row up to its last trained token, 0 without one."""
    lengths: list[int] = (trained * torch.arange(1, trained.shape[1] + 1)).amax(1).tolist()
    return lengths


def accumulate(
    policy: Policy,
    data: Batch,
    loss: Loss,
    objective: Objective,
    *,
    units: int,
    budget: int,
    temperature: float,
    fresh: NDArray[np.bool_] | None = None,
    workers: Workers | None = None,
) -> Sums:
    """Add the gradient of the batch's loss to the policy's weights, one micro-batch at a time.

    What is compared with the sampler is the policy that sampled, without LoRA's dropout: where there is some, it is
    scored once more.

    Args:
        policy: Who is scored.
        data: B conversations.
        loss: What is minimised.
        objective: What else is, and how it is reduced.
        units: What the aggregation divides by, over the whole optimiser batch (see `losses.batch_units`).
        budget: Tokens per micro-batch.
        temperature: That the batch was sampled at.
        fresh: [B, n], turns whose sampler ought to agree with the learner; None measures no gap.
        workers: Who else runs forward passes, when weights are split over processes.
    """
    trained = trained_tokens(data)
    sums = Sums(tokens=int(data.attention.sum()), needed=sum(last_trained(trained)))
    own_passes = len(packs(trained, budget, objective.together))
    spare = passes(workers or Alone(), own_passes) - own_passes
    again = _drops_out(policy) and (fresh is not None or objective.importance != "none")
    for part in score(policy, data, budget, temperature, objective.together):
        settled = part.log_probs.detach()
        if again:
            with torch.no_grad():
                settled = policy.log_probs(part.ids, part.attention, part.token_mask, temperature=temperature)
        if fresh is not None:
            own = losses.turn_token_mask(part.token_mask, part.turn_index, torch.from_numpy(fresh[part.rows]))
            sums.gap += ledger.gap(settled, part.sampling, own, part.rows)
        if objective.importance != "none":
            part = replace(part, weights=_weigh(part, settled, objective, sums))
        if objective.kl_coefficient or objective.reference:
            part = replace(part, reference=_refer(policy, part, temperature, sums))
        value, ratios = loss(part, objective.reduction(units))
        if objective.kl_coefficient and part.reference is not None:
            pull = losses.kl_loss(part.log_probs, part.reference, part.token_mask, part.weights)
            reduced = losses.aggregate(pull, part.token_mask, part.turn_index, **objective.reduction(units))
            value = value + objective.kl_coefficient * reduced
        value.backward()  # type: ignore[no-untyped-call]
        sums.loss += float(value.detach())
        sums.ratios += ratios
        sums.read += part.token_mask.numel()
    for _ in range(spare):
        _ride_along(policy, again, bool(objective.kl_coefficient or objective.reference))
    return sums


def _ride_along(policy: Policy, again: bool, reference: bool) -> None:
    """Take part in a micro-batch of the other processes, which need this one's share of the weights; adds nothing."""
    ids = torch.zeros((1, 2), dtype=torch.long)
    every = torch.ones_like(ids, dtype=torch.bool)
    log_probs = policy.log_probs(ids, every)
    with torch.no_grad():
        if again:
            policy.log_probs(ids, every)
        if reference:
            policy.reference_log_probs(ids, every)
    (0.0 * log_probs.sum()).backward()  # type: ignore[no-untyped-call]


def _drops_out(policy: Policy) -> bool:
    return any("lora_dropout" in name and getattr(m, "p", 0) > 0 for name, m in policy.model.named_modules())


def _weigh(part: Scored, settled: Tensor, objective: Objective, sums: Sums) -> Tensor:
    """Return the importance weights [R, L'] of a micro-batch, and count them."""
    cap = objective.importance_cap
    weights, raw = importance_weights(
        settled, part.sampling, part.token_mask, part.turn_index, level=objective.importance, cap=cap
    )
    w = raw.clamp(max=cap).double()
    sums.weights += WeightSums(float(w.sum()), float(w.square().sum()), len(w), int((raw > cap).sum()))
    return weights


def _refer(policy: Policy, part: Scored, temperature: float, sums: Sums) -> Tensor:
    """Return the reference model's log-probs [R, L'] of a micro-batch, and add up the divergence from it."""
    with torch.no_grad():
        reference = policy.reference_log_probs(part.ids, part.attention, part.token_mask, temperature=temperature)
    estimate = losses.kl_estimate(part.log_probs, reference, part.token_mask)
    sums.kl += float((estimate if part.weights is None else estimate * part.weights).sum())
    sums.turns += losses.batch_units(part.token_mask, part.turn_index, "turn_mean")
    return reference
