"""The gradient of one batch: conversations packed into micro-batches, scored, their losses added up.

What is measured on the way is a sum over conversations, so that the sums of several processes add up too. Nothing
here knows a baseline, a policy class or an optimiser.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppg_agents import ledger, losses
from ppg_agents.distributed import Alone, Workers, passes
from ppg_agents.importance import Importance, effective_share, importance_weights
from ppg_agents.ledger import Gap
from ppg_agents.policy import Policy
from ppg_agents.trajectory import Batch

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Whole:
    """The batch of all processes, and which rows of it are this one's.

    Attributes:
        credit: [B, n] over the conversations of all ranks, in rank order.
        valid: [B, n].
        groups: B labels; conversations that share a persona have equal ones.
        own: This rank's rows.
        units: What the aggregation divides by.
    """

    credit: Array
    valid: NDArray[np.bool_]
    groups: list[Hashable]
    own: slice
    units: int


@dataclass(frozen=True)
class Objective:
    """What is minimised.

    Attributes:
        aggregation: How token losses become one number (see `losses`).
        constant: For the aggregation ``constant``.
        importance: Level of the importance weights (see `importance`).
        importance_cap: Largest weight.
        kl_coefficient: Weight of the divergence from the reference model.
        logged: The words are logged ones: weighted by reward, without importance weights and divergence.
    """

    aggregation: losses.Aggregation = "sum"
    constant: float | None = None
    importance: Importance = "none"
    importance_cap: float = 2.0
    kl_coefficient: float = 0.0
    logged: bool = False

    def __post_init__(self) -> None:
        """Check what one type cannot say."""
        if self.importance not in ("none", "turn", "token") or not self.importance_cap >= 1:
            raise ValueError(
                "expected importance 'none', 'turn' or 'token' and importance_cap >= 1, got "
                f"{self.importance!r} and {self.importance_cap}"
            )
        if not 0 <= self.kl_coefficient < float("inf"):
            raise ValueError(f"expected kl_coefficient >= 0, got {self.kl_coefficient}")

    def reduction(self, units: int) -> dict[str, Any]:
        """Return how a micro-batch of a batch of ``units`` is reduced."""
        return {"aggregation": self.aggregation, "constant": self.constant, "batch_size": units}


@dataclass(frozen=True)
class Scored:
    """One micro-batch of R conversations: log-probs of the trained tokens, and where those are, all [R, L']."""

    rows: list[int]
    ids: Tensor
    attention: Tensor
    log_probs: Tensor
    token_mask: Tensor
    turn_index: Tensor


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
        weights: Importance weights: Σw, Σw², how many, how many truncated.
        gap: Of log-probs, over turns that the learner's own version sampled.
    """

    loss: float = 0.0
    tokens: int = 0
    needed: int = 0
    read: int = 0
    turns: int = 0
    kl: float = 0.0
    weights: tuple[float, float, int, int] = (0.0, 0.0, 0, 0)
    gap: Gap = field(default_factory=Gap)

    def __add__(self, other: Sums) -> Sums:
        weights = tuple(a + b for a, b in zip(self.weights, other.weights, strict=True))
        return Sums(
            self.loss + other.loss,
            self.tokens + other.tokens,
            self.needed + other.needed,
            self.read + other.read,
            self.turns + other.turns,
            self.kl + other.kl,
            weights,  # type: ignore[arg-type]
            self.gap + other.gap,
        )

    def metrics(self, objective: Objective) -> dict[str, float]:
        """Return ``loss``, ``tokens`` and ``padding``; and what was measured of gap, divergence and weights."""
        found: dict[str, float] = {
            "loss": self.loss,
            "tokens": self.tokens,
            "padding": 1 - self.needed / self.read if self.read else 0.0,
        }
        if self.gap.count:
            found |= {"log_prob_gap_mean": self.gap.mean, "log_prob_gap_max": self.gap.largest}
        if objective.kl_coefficient:
            found["kl"] = self.kl / max(1, self.turns)
        if objective.importance != "none":
            total, squares, count, truncated = self.weights
            found["importance_ess"] = effective_share(total, squares, count)
            found["importance_truncated"] = truncated / max(1, count)
        return found


def trained_tokens(data: Batch) -> Tensor:
    """Return the mask [B, L] of sampled tokens in judged turns."""
    return losses.turn_token_mask(data.token_mask, data.turn_index, torch.from_numpy(data.valid))


def score(policy: Policy, data: Batch, budget: int, temperature: float = 1.0) -> Iterator[Scored]:
    """Yield micro-batches of at most ``budget`` tokens, padding included; at least one conversation each.

    Conversations of similar length go together; those without a trained token are left out, and so are the
    tokens after the last trained one.
    """
    trained = trained_tokens(data)
    for rows, length in packs(trained, budget):
        ids, attention = data.ids[rows, :length], data.attention[rows, :length]
        token_mask, turn_index = trained[rows, :length], data.turn_index[rows, :length]
        log_probs = policy.log_probs(ids, attention, token_mask, temperature=temperature)
        where = log_probs.device
        yield Scored(rows, ids, attention, log_probs, token_mask.to(where), turn_index.to(where))


def packs(trained: Tensor, budget: int) -> list[tuple[list[int], int]]:
    """Return the rows of every micro-batch and how many tokens of them are read; see `score`."""
    ends, found = last_trained(trained), []
    order = sorted((b for b, end in enumerate(ends) if end), key=lambda b: -ends[b])
    while order:
        length = ends[order[0]]
        size = max(1, budget // length)
        found.append((order[:size], length))
        order = order[size:]
    return found


def last_trained(trained: Tensor) -> list[int]:
    """Return the length of each row up to its last trained token, 0 without one."""
    lengths: list[int] = (trained * torch.arange(1, trained.shape[1] + 1)).amax(1).tolist()
    return lengths


def accumulate(
    policy: Policy,
    data: Batch,
    weight: Array,
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
        weight: Advantage or credit [B, n] of every turn.
        objective: What is minimised.
        units: What the aggregation divides by, over the whole optimiser batch (see `losses.batch_units`).
        budget: Tokens per micro-batch.
        temperature: That the batch was sampled at.
        fresh: [B, n], turns whose sampler ought to agree with the learner; None measures no gap.
        workers: Who else runs forward passes, when weights are split over processes.
    """
    trained = trained_tokens(data)
    sums = Sums(tokens=int(data.attention.sum()), needed=sum(last_trained(trained)))
    own_passes = len(packs(trained, budget))
    spare = passes(workers or Alone(), own_passes) - own_passes
    again = _drops_out(policy) and (fresh is not None or objective.importance != "none")
    for part in score(policy, data, budget, temperature):
        settled = part.log_probs.detach()
        if again:
            with torch.no_grad():
                settled = policy.log_probs(part.ids, part.attention, part.token_mask, temperature=temperature)
        sampling = data.sampling_log_probs[part.rows, : part.token_mask.shape[1]].to(settled.device)
        if fresh is not None:
            own = losses.turn_token_mask(part.token_mask, part.turn_index, torch.from_numpy(fresh[part.rows]))
            sums.gap += ledger.gap(settled, sampling, own, part.rows)
        weights = _weigh(part, settled, sampling, objective, sums) if objective.importance != "none" else None
        arrays = (part.log_probs, part.token_mask, part.turn_index, torch.from_numpy(weight[part.rows]))
        if objective.logged:
            loss = losses.reward_weighted_log_likelihood(*arrays, **objective.reduction(units))
        else:
            loss = losses.partial_policy_gradient(*arrays, **objective.reduction(units), weights=weights)
        if objective.kl_coefficient:
            diverged = _diverge(policy, part, objective, units, temperature, weights, sums)
            loss = loss + objective.kl_coefficient * diverged
        loss.backward()  # type: ignore[no-untyped-call]
        sums.loss += float(loss.detach())
        sums.read += part.token_mask.numel()
    for _ in range(spare):
        _ride_along(policy, again, bool(objective.kl_coefficient))
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


def _weigh(part: Scored, settled: Tensor, sampling: Tensor, objective: Objective, sums: Sums) -> Tensor:
    """Return the importance weights [R, L'] of a micro-batch, and count them."""
    cap = objective.importance_cap
    weights, raw = importance_weights(
        settled, sampling, part.token_mask, part.turn_index, level=objective.importance, cap=cap
    )
    w = raw.clamp(max=cap).double()
    more = (float(w.sum()), float(w.square().sum()), len(w), int((raw > cap).sum()))
    sums.weights = tuple(a + b for a, b in zip(sums.weights, more, strict=True))  # type: ignore[assignment]
    return weights


def _diverge(
    policy: Policy,
    part: Scored,
    objective: Objective,
    units: int,
    temperature: float,
    weights: Tensor | None,
    sums: Sums,
) -> Tensor:
    """Return the loss whose gradient is the divergence's, and add up the estimate."""
    with torch.no_grad():
        reference = policy.reference_log_probs(part.ids, part.attention, part.token_mask, temperature=temperature)
    estimate = losses.kl_estimate(part.log_probs, reference, part.token_mask)
    sums.kl += float((estimate if weights is None else estimate * weights).sum())
    sums.turns += losses.batch_units(part.token_mask, part.turn_index, "turn_mean")
    per_token = losses.kl_loss(part.log_probs, reference, part.token_mask, weights)
    return losses.aggregate(per_token, part.token_mask, part.turn_index, **objective.reduction(units))
