"""One optimiser step: pack a batch into micro-batches, score them, add up their gradients, step.

The loss is a function of a micro-batch (`Loss`); nothing here knows a baseline, a policy class or a method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppg_agents import ledger, losses
from ppg_agents.agents.importance import Importance, importance_weights
from ppg_agents.agents.masters import Masters
from ppg_agents.agents.settings import LearnerSettings
from ppg_agents.agents.sums import Ratios, Sums, WeightSums
from ppg_agents.agents.watch import watch
from ppg_agents.batch import Batch
from ppg_agents.distributed import Workers, clip, groups, passes
from ppg_agents.ledger import LedgerError
from ppg_agents.missing import Credits
from ppg_agents.policy.policy import Policy
from ppg_agents.trajectory import Trajectory

Array = NDArray[np.float64]
Reduction = dict[str, Any]


@dataclass(frozen=True)
class Whole:
    """The batch of all processes, and which of its rows belong to this one.

    Attributes:
        credits: The credit of the conversations of all ranks in rank order, for any baseline.
        credit: [B, n], without a baseline; what a fault took away is made up for.
        valid: [B, n], the turns that are learned from.
        groups: B labels (instruction, topic), equal for conversations that are compared.
        own: This rank's rows.
        units: What the aggregation divides by (see `losses.batch_units`).
    """

    credits: Credits
    credit: Array
    valid: NDArray[np.bool_]
    groups: list[tuple[str, str]]
    own: slice
    units: int

    def described(self) -> dict[str, float]:
        """Return the mean and spread of the credit over judged turns, as metrics; 0 without any."""
        judged = self.credit[self.valid] if self.valid.any() else np.zeros(1)
        return {"credit_mean": float(judged.mean()), "credit_std": float(judged.std())}


@dataclass(frozen=True)
class Objective:
    """What is minimised, apart from the loss itself.

    Attributes:
        aggregation: How token losses become one number (see `losses`).
        constant: For the aggregation ``constant``.
        importance: Level of the importance weights (see `importance`).
        importance_cap: Largest weight.
        kl_coefficient: Weight of the divergence from the reference model in the loss.
        reference: Whether the loss reads the reference model's log-probs.
        together: How many consecutive conversations the loss compares; no micro-batch separates them.
        entropy_coefficient: Weight of the entropy bonus: the loss falls by this times the entropy of every trained
            token's distribution, reduced over tokens as the loss is.
    """

    aggregation: losses.Aggregation = "sum"
    constant: float | None = None
    importance: Importance = "none"
    importance_cap: float = 2.0
    kl_coefficient: float = 0.0
    reference: bool = False
    together: int = 1
    entropy_coefficient: float = 0.0

    def __post_init__(self) -> None:
        """Raise a ValueError for an unknown level, or for a cap or coefficient out of range."""
        if self.importance not in ("none", "turn", "token") or not self.importance_cap >= 1:
            raise ValueError(
                "expected importance 'none', 'turn' or 'token' and importance_cap >= 1, got "
                f"{self.importance!r} and {self.importance_cap}"
            )
        for name in ("kl_coefficient", "entropy_coefficient"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"expected {name} >= 0, got {getattr(self, name)}")

    def reduction(self, units: int) -> Reduction:
        """Return the arguments of `losses.aggregate` for a micro-batch of a batch of ``units``."""
        return {"aggregation": self.aggregation, "constant": self.constant, "batch_size": units}


@dataclass(frozen=True)
class Scored:
    """One micro-batch of R conversations; all tensors are [R, L'].

    Attributes:
        rows: Their row numbers in the batch.
        ids: Tokens.
        attention: True on real tokens.
        log_probs: The learner's, of trained tokens, with gradient.
        sampling: The sampler's; NaN where unknown.
        token_mask: True on trained tokens.
        turn_index: The turn of every token.
        weights: Importance weights, if any.
        reference: The reference model's log-probs, if asked for.
        entropies: Of the learner's distributions, nats, if asked for; 0 outside of ``token_mask``.
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
    entropies: Tensor | None = None


Loss = Callable[[Scored, Reduction], tuple[Tensor, Ratios]]
"""Takes a micro-batch and its reduction; returns its part of the loss (a scalar) and counts of its ratios."""


class Descent:
    """The optimiser over the policy's trainable weights, one step per batch, the same on all workers.

    Attributes:
        optimizer: AdamW, or plain stochastic gradient descent.
        masters: What it steps on: the weights, or float32 copies of those in fewer bits.
        steps: Steps taken.
    """

    def __init__(self, policy: Policy, settings: LearnerSettings, workers: Workers) -> None:
        """Create the optimiser."""
        self.steps = 0
        self._policy, self._settings, self._workers = policy, settings, workers
        limit = settings.max_log_prob_gap
        self._gap_limit = ledger.default_gap_limit(policy.model.dtype) if limit is None else limit
        self.masters = Masters(policy.parameters())
        self._parameters = self.masters.tensors
        common: dict[str, Any] = {"lr": settings.rate(0), "weight_decay": settings.weight_decay, "foreach": True}
        self.optimizer: torch.optim.Optimizer
        if settings.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(groups(self._parameters), **common)
        else:
            self.optimizer = torch.optim.AdamW(groups(self._parameters), betas=settings.betas, **common)

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
            loss: The loss of a micro-batch.
            objective: What is minimised with it, and how it is reduced.
            temperature: The batch's sampling temperature.
            fresh: [B, n], turns where sampler and learner must agree; None compares nothing.

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
            observe_reference=fresh is not None and self._observes_reference(),
            workers=self._workers,
        )
        reports = self._workers.gather([(sums, ledger.gap_fault(sums.gap, self._gap_limit, trajectories))])
        agree([fault for _, fault in reports])
        total = sum((part for part, _ in reports), Sums())
        rate, divergence = self._settings.rate(self.steps), bool(objective.kl_coefficient or objective.reference)
        metrics = {
            "grad_norm": 0.0,
            "grad_clipped": 0.0,
            "learning_rate": rate,
            "policy_version": self._policy.version,
            **total.metrics(divergence=divergence, weighted=objective.importance != "none"),
        }
        if not whole.valid.any():
            return metrics
        self.masters.gather()
        self._workers.sum_gradients(self._parameters)
        limit = self._settings.max_grad_norm or float("inf")
        norm = clip(self._parameters, limit)
        if not np.isfinite(norm):
            raise FloatingPointError(f"expected a finite gradient, got norm {norm}; lower the learning rate")
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.masters.write()
        self.steps += 1
        self._policy.version += 1
        clipped = float(norm > limit)
        return {**metrics, "grad_norm": norm, "grad_clipped": clipped, "policy_version": self._policy.version}

    def _observes_reference(self) -> bool:
        """Return whether the next step measures the divergence from the reference model."""
        # Counted in steps, which a checkpoint keeps: a resumed run measures in the same iterations.
        every = self._settings.reference_kl_every * self._settings.steps_per_batch
        return bool(every) and self.steps % every == 0 and self._policy.has_reference


def agree(faults: Sequence[str | None]) -> None:
    """Raise the first fault of any worker on every worker; otherwise the others would wait for its gradient forever."""
    for fault in faults:
        if fault is not None:
            raise LedgerError(fault)


def trained_tokens(data: Batch) -> Tensor:
    """Return the mask [B, L] of sampled tokens in judged turns."""
    return losses.turn_token_mask(data.token_mask, data.turn_index, torch.from_numpy(data.valid))


def score(
    policy: Policy,
    data: Batch,
    budget: int,
    temperature: float = 1.0,
    together: int = 1,
    entropies: Literal["none", "measured", "learned"] = "none",
) -> Iterator[Scored]:
    """Yield micro-batches of at most ``budget`` tokens, padding included; at least ``together`` conversations each.

    Conversations of similar length go together. Those without a trained token are left out, and so are tokens after
    the last trained one. ``learned`` entropies carry a gradient.
    """
    trained = trained_tokens(data)
    for rows, length in packs(trained, budget, together):
        ids, attention = data.ids[rows, :length], data.attention[rows, :length]
        token_mask, turn_index = trained[rows, :length], data.turn_index[rows, :length]
        arrays, entropy = (ids, attention, token_mask), None
        if entropies == "none":
            log_probs = policy.log_probs(*arrays, temperature=temperature)
        else:
            learn = entropies == "learned"
            log_probs, entropy = policy.log_probs_and_entropies(*arrays, temperature=temperature, learn=learn)
        device = log_probs.device
        sampling = data.sampling_log_probs[rows, :length].to(device)
        masks = (token_mask.to(device), turn_index.to(device))
        yield Scored(rows, ids, attention, log_probs, sampling, *masks, entropies=entropy)


def packs(trained: Tensor, budget: int, together: int = 1) -> list[tuple[list[int], int]]:
    """Return every micro-batch's rows and how many tokens of each row are read; see `score`."""
    ends, micro_batches = last_trained(trained), []
    bundles = {b: max(ends[b : b + together]) for b in range(0, len(ends), together)}
    order = sorted((b for b, end in bundles.items() if end), key=lambda b: -bundles[b])
    while order:
        length = bundles[order[0]]
        size = max(1, budget // (length * together))
        micro_batches.append(([row for b in order[:size] for row in range(b, min(b + together, len(ends)))], length))
        order = order[size:]
    return micro_batches


def last_trained(trained: Tensor) -> list[int]:
    """Return each row's length up to its last trained token; 0 if it has none."""
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
    observe_reference: bool = False,
    workers: Workers,
) -> Sums:
    """Add the gradient of the batch's loss to the policy's weights, one micro-batch at a time.

    The sampler has no dropout. If LoRA has, the policy is scored again without it for the comparison with the sampler.

    Args:
        policy: The policy that learns.
        data: B conversations.
        loss: The loss of a micro-batch.
        objective: What is minimised with it, and how it is reduced.
        units: What the aggregation divides by, for the whole optimiser batch (see `losses.batch_units`).
        budget: Tokens per micro-batch.
        temperature: The batch's sampling temperature.
        fresh: [B, n], turns where sampler and learner must agree; None measures no gap.
        observe_reference: Whether to measure the divergence from the reference model where the loss does not read it.
        workers: The other processes, which run forward passes too if weights are split.
    """
    trained = trained_tokens(data)
    sums = Sums(tokens=int(data.attention.sum()), needed=sum(last_trained(trained)))
    needed_passes = len(packs(trained, budget, objective.together))
    spare = passes(workers, needed_passes) - needed_passes
    rescore = _drops_out(policy) and (fresh is not None or objective.importance != "none")
    # Every micro-batch divides by `units` of the whole batch, over all ranks, never by its own: so backward can run per
    # micro-batch (one graph in memory at a time) and the gradients still add up to that of the whole batch's loss.
    entropies: Literal["measured", "learned"] = "learned" if objective.entropy_coefficient else "measured"
    refers = bool(objective.kl_coefficient or objective.reference)
    for part in score(policy, data, budget, temperature, objective.together, entropies):
        comparable = part.log_probs.detach()
        if rescore:
            with torch.no_grad():
                comparable = policy.log_probs(part.ids, part.attention, part.token_mask, temperature=temperature)
        if fresh is not None:
            compared = losses.turn_token_mask(part.token_mask, part.turn_index, torch.from_numpy(fresh[part.rows]))
            sums.gap += ledger.gap(comparable, part.sampling, compared, part.rows)
        if objective.importance != "none":
            part = replace(part, weights=_weigh(part, comparable, objective, sums))
        observed = None
        if refers or observe_reference:
            with torch.no_grad():
                arrays = (part.ids, part.attention, part.token_mask)
                observed = policy.reference_log_probs(*arrays, temperature=temperature)
        if refers and observed is not None:
            part = replace(part, reference=observed)
            _add_divergence(part, observed, sums)
        value, ratios = loss(part, objective.reduction(units))
        if objective.kl_coefficient and part.reference is not None:
            pull = losses.kl_loss(part.log_probs, part.reference, part.token_mask, part.weights)
            reduced = losses.aggregate(pull, part.token_mask, part.turn_index, **objective.reduction(units))
            value = value + objective.kl_coefficient * reduced
        if objective.entropy_coefficient and part.entropies is not None:
            spread = losses.aggregate(part.entropies, part.token_mask, part.turn_index, **objective.reduction(units))
            value = value - objective.entropy_coefficient * spread
        value.backward()  # type: ignore[no-untyped-call]
        sums.loss += float(value.detach())
        sums.ratios += ratios
        sums.watched += watch(comparable, part.sampling, part.token_mask, part.entropies, observed)
        sums.read += part.token_mask.numel()
    for _ in range(spare):
        _ride_along(policy, rescore, refers or observe_reference)
    return sums


def _ride_along(policy: Policy, rescore: bool, reference: bool) -> None:
    """Take part in a micro-batch of the other processes, which need this one's share of the weights; adds nothing."""
    # With FSDP every layer gathers its weights from all ranks, forward and backward: a rank that has run out of
    # micro-batches must make the same calls in the same order as `accumulate`, or the others hang. Two tokens are the
    # shortest row with a scored one; the loss is multiplied by 0, so backward runs and no gradient changes.
    ids = torch.zeros((1, 2), dtype=torch.long)
    mask = torch.ones_like(ids, dtype=torch.bool)
    log_probs = policy.log_probs(ids, mask)
    with torch.no_grad():
        if rescore:
            policy.log_probs(ids, mask)
        if reference:
            policy.reference_log_probs(ids, mask)
    (0.0 * log_probs.sum()).backward()  # type: ignore[no-untyped-call]


def _drops_out(policy: Policy) -> bool:
    return any("lora_dropout" in name and getattr(m, "p", 0) > 0 for name, m in policy.model.named_modules())


def _weigh(part: Scored, comparable: Tensor, objective: Objective, sums: Sums) -> Tensor:
    """Return a micro-batch's importance weights [R, L'], and count them."""
    cap = objective.importance_cap
    weights, raw = importance_weights(
        comparable, part.sampling, part.token_mask, part.turn_index, level=objective.importance, cap=cap
    )
    w = raw.clamp(max=cap).double()
    sums.weights += WeightSums(float(w.sum()), float(w.square().sum()), len(w), int((raw > cap).sum()))
    return weights


def _add_divergence(part: Scored, reference: Tensor, sums: Sums) -> None:
    """Add a micro-batch's divergence from the reference model to the sums."""
    estimate = losses.kl_estimate(part.log_probs, reference, part.token_mask)
    sums.kl += float((estimate if part.weights is None else estimate * part.weights).sum())
    sums.turns += losses.batch_units(part.token_mask, part.turn_index, "turn_mean")
