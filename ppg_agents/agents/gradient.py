"""The gradient of one batch, and the step along it: micro-batches packed, scored, their losses added up, AdamW.

The loss is a function of a micro-batch (`Loss`); nothing here knows a baseline, a policy class or a method.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppg_agents import ledger, losses
from ppg_agents.agents.settings import LearnerSettings
from ppg_agents.agents.sums import Ratios, Sums, WeightSums
from ppg_agents.batch import Batch
from ppg_agents.distributed import Workers, clip, groups, passes
from ppg_agents.importance import Importance, importance_weights
from ppg_agents.ledger import LedgerError
from ppg_agents.policy.policy import Policy
from ppg_agents.trajectory import Trajectory

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


Loss = Callable[[Scored, Reduction], tuple[Tensor, Ratios]]
"""A micro-batch and how it is reduced in; its part of the loss out (a scalar), and what is said of its ratios."""


class Descent:
    """AdamW over the policy's trainable weights, one step per batch, the same on all workers.

    Attributes:
        optimizer: The AdamW.
        steps: Steps taken.
    """

    def __init__(self, policy: Policy, settings: LearnerSettings, workers: Workers) -> None:
        """Take no step yet."""
        self.steps = 0
        self._policy, self._settings, self._workers = policy, settings, workers
        limit = settings.max_log_prob_gap
        self._gap_limit = ledger.default_gap_limit(policy.model.dtype) if limit is None else limit
        self._parameters = policy.parameters()
        self.optimizer = torch.optim.AdamW(
            groups(self._parameters), lr=settings.rate(0), weight_decay=settings.weight_decay, foreach=True
        )

    def step(
        self,
        trajectories: Sequence[Trajectory],
        data: Batch,
        whole: Whole,
        loss: Loss,
        objective: Objective,
        temperature: float,
        fresh: NDArray[np.bool_] | None = None,
    ) -> dict[str, float]:
        """Accumulate the gradient over micro-batches and workers, clip it and step; return metrics.

        Args:
            trajectories: This process's conversations, for messages.
            data: The same as arrays.
            whole: The batch of all processes; without a judged turn there is no step.
            loss: What is minimised.
            objective: What else is, and how it is reduced.
            temperature: That the batch was sampled at.
            fresh: [B, n], turns whose sampler ought to agree with the learner; None compares nothing.

        Raises:
            LedgerError: Sampler and learner disagree.
            FloatingPointError: The gradient is not finite.
        """
        self.optimizer.zero_grad(set_to_none=True)
        sums = accumulate(
            self._policy,
            data,
            loss,
            objective,
            units=whole.units,
            budget=self._settings.micro_batch_tokens,
            temperature=temperature,
            fresh=fresh,
            workers=self._workers,
        )
        reports = self._workers.gather([(sums, ledger.gap_fault(sums.gap, self._gap_limit, trajectories))])
        agree([fault for _, fault in reports])
        total = sum((part for part, _ in reports), Sums())
        rate, divergence = self._settings.rate(self.steps), bool(objective.kl_coefficient or objective.reference)
        metrics = {
            "grad_norm": 0.0,
            "learning_rate": rate,
            "policy_version": self._policy.version,
            **total.metrics(divergence=divergence, weighted=objective.importance != "none"),
        }
        if not whole.valid.any():
            return metrics
        self._workers.sum_gradients(self._parameters)
        norm = clip(self._parameters, self._settings.max_grad_norm)
        if not np.isfinite(norm):
            raise FloatingPointError(f"expected a finite gradient, got norm {norm}; lower the learning rate")
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.steps += 1
        self._policy.version += 1
        return {**metrics, "grad_norm": norm, "policy_version": self._policy.version}


def agree(faults: Sequence[str | None]) -> None:
    """Raise the first worker's fault, on every worker: the others would wait for its gradient for ever."""
    for fault in faults:
        if fault is not None:
            raise LedgerError(fault)


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
    workers: Workers,
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
    spare = passes(workers, own_passes) - own_passes
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
