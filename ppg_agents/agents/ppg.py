"""The partial-policy-gradient agent: trajectories in, an optimiser step (or several) out.

ledger checks -> credit -> baseline -> gradient -> clip -> AdamW. Formulas live in `credit`, `baselines`, `losses` and
`importance`, micro-batches in `step`, files in `state`; nothing here knows an environment, or which policy class its
mask stands for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from ppg_agents import baselines, ledger, losses
from ppg_agents.agents.gradient import (
    Array,
    Loss,
    Objective,
    Sums,
    Whole,
    accumulate,
    log_likelihood,
    policy_gradient,
    score,
    trained_tokens,
)
from ppg_agents.agents.state import load_state, save_state
from ppg_agents.credit import Mask, credit
from ppg_agents.distributed import Alone, Workers, clip, groups
from ppg_agents.generation import Sampler
from ppg_agents.importance import Importance
from ppg_agents.ledger import LedgerError
from ppg_agents.policy.policy import Policy
from ppg_agents.rollout.lockstep import Speaker
from ppg_agents.trajectory import Batch, Trajectory, batch

Baseline = Literal["none", "leave-one-out", "batch-mean", "moving-average"]


class PPGAgent:
    """Learns a policy with the partial policy gradient (arXiv 2603.06138).

    Attributes:
        policy: Who learns; its version counts optimiser steps.
        optimizer: AdamW over the policy's trainable weights.
        steps: Optimiser steps taken.
        own_ratios: Whether the loss itself reads the sampler's log-probs.
        repeatable: Whether several steps on a batch need no importance weights.
        loss_is_likelihood: Whether the loss of `learn_offline` is minus the reward-weighted log-likelihood.
    """

    own_ratios = False
    repeatable = False
    loss_is_likelihood = True

    def __init__(
        self,
        policy: Policy,
        mask: Callable[[int], Mask],
        *,
        n_turns: int | None = None,
        discount: float = 1.0,
        baseline: Baseline = "leave-one-out",
        standardise: bool = False,
        aggregation: losses.Aggregation = "sum",
        constant: float | None = None,
        learning_rate: float | Callable[[int], float] = 1e-3,
        max_grad_norm: float = 1.0,
        weight_decay: float = 0.0,
        micro_batch_tokens: int = 8192,
        importance: Importance = "none",
        importance_cap: float = 2.0,
        kl_coefficient: float = 0.0,
        max_log_prob_gap: float | None = None,
        max_staleness: int = 0,
        steps_per_batch: int = 1,
        sampler: Sampler | None = None,
        workers: Workers | None = None,
    ) -> None:
        """Make an agent.

        Args:
            policy: Who learns.
            mask: The policy class: n -> [n, n], boolean or weights (see `ppg_agents.credit`).
            n_turns: n; default the longest conversation of each batch.
            discount: Per turn.
            baseline: Subtracted from the credit when learning online. ``leave-one-out`` compares
                conversations with the same instruction.
            standardise: Divide advantages by their standard deviation.
            aggregation: How token losses become one number (see `losses`); ``sum`` is the gradient itself.
            constant: For the aggregation ``constant``.
            learning_rate: Of AdamW: a number, or a function of the steps taken.
            max_grad_norm: The gradient is scaled down to this 2-norm.
            weight_decay: Of AdamW.
            micro_batch_tokens: Tokens, padding included, per forward pass; at least one conversation.
            importance: Level of the weights for replies that another version or engine sampled, see `importance`.
            importance_cap: Largest weight.
            kl_coefficient: Weight of the divergence from the model without its adapter, per reply in nats.
            max_log_prob_gap: Learning stops where the sampler's log-prob of a token and the learner's differ by more
                nats; default by the learner's precision (`ledger.default_gap_limit`). Not asked of stale turns.
            max_staleness: Most optimiser steps that a turn's policy version may be behind; 0 is on-policy.
            steps_per_batch: Optimiser steps on every batch that is learned from online; from the second on, the
                replies are those of an older policy, so that more than 1 needs importance weights.
            sampler: For `act`; None for an agent that only learns.
            workers: The processes that learn together, each from its own share of the conversations; None for one.

        Raises:
            ValueError: An unknown baseline, a moving average without `n_turns`, or a setting out of range.
        """
        if baseline not in get_args(Baseline):
            raise ValueError(f"expected a baseline out of {get_args(Baseline)}, got {baseline!r}")
        if baseline == "moving-average" and n_turns is None:
            raise ValueError("expected n_turns with baseline 'moving-average', got None; pass n_turns=")
        limit = ledger.default_gap_limit(policy.model.dtype) if max_log_prob_gap is None else max_log_prob_gap
        if not limit > 0 or max_staleness < 0:
            raise ValueError(f"expected max_log_prob_gap > 0 and max_staleness >= 0, got {limit} and {max_staleness}")
        if steps_per_batch < 1 or (steps_per_batch > 1 and importance == "none" and not self.repeatable):
            raise ValueError(
                f"expected steps_per_batch = 1 with importance 'none', got {steps_per_batch}: a later step learns from "
                "replies of an older policy; set importance to 'turn' or 'token'"
            )
        self.policy = policy
        self.steps = 0
        self.sampler = sampler
        self._mask = mask
        self._n_turns = n_turns
        self._discount = discount
        self._baseline = baseline
        self._standardise = standardise
        self._objective = Objective(aggregation, constant, importance, importance_cap, kl_coefficient)
        self._max_gap = limit
        self._max_staleness = max_staleness
        self._steps_per_batch = steps_per_batch
        self._workers = workers or Alone()
        self._rate = learning_rate if callable(learning_rate) else lambda step: learning_rate
        self._max_grad_norm = max_grad_norm
        self._budget = micro_batch_tokens
        self._average = baselines.MovingAverage(n_turns or 1)
        self._speaker: Speaker | None = None
        self._generator: torch.Generator | None = None
        self._parameters = policy.parameters()
        self.optimizer = torch.optim.AdamW(
            groups(self._parameters), lr=self._rate(0), weight_decay=weight_decay, foreach=True
        )

    def start(self, n: int, seed: int = 0) -> None:
        """Begin n conversations for `act`.

        Raises:
            ValueError: The agent has no sampler.
        """
        if self.sampler is None:
            raise ValueError("expected an agent with a sampler, got none; pass sampler= to the agent")
        self._speaker = Speaker(self.policy, self.sampler, n)
        self._generator = torch.Generator(self.policy.device).manual_seed(seed)

    def act(self, observations: Mapping[str, Sequence[str]]) -> list[str]:
        """Answer in every conversation that `start` began.

        Args:
            observations: ``{"instruction": [n], "message": [n]}``, the newest message of each.

        Returns:
            n replies; empty where the context is full.

        Raises:
            ValueError: `start` was not called.
        """
        messages = list(observations["message"])
        if self._speaker is None:
            raise ValueError("expected conversations to have begun; call start(n) first")
        active = [True] * len(messages)
        replies = self._speaker.reply(list(observations["instruction"]), messages, active, self._generator)
        return ["" if r is None else self.policy.decode(r[1].token_ids) for r in replies]

    def learn(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """Take ``steps_per_batch`` gradient steps on conversations of the current policy.

        Args:
            trajectories: B conversations; with several workers, this one's share.

        Returns:
            ``loss``, ``grad_norm`` (before clipping), ``credit_mean`` and ``credit_std`` over judged turns,
            ``learning_rate``, ``tokens`` (real tokens in the batch), ``padding`` (share of the tokens read that no
            conversation needs), ``policy_version`` (after the step), ``staleness_max`` (of the oldest turn, in
            steps); ``log_prob_gap_mean`` and ``log_prob_gap_max`` (learner against sampler before the first step,
            nats) when sampling log-probs are known; ``kl`` (from the reference, nats per judged turn) with a KL term;
            ``importance_ess`` (effective sample size as a share) and ``importance_truncated`` (share) with importance
            weights. All of them over all workers; of several steps, the last one's. Without a judged turn there is no
            step.

        Raises:
            LedgerError: The batch is not what was sampled, or not by this version of this policy.
            FloatingPointError: The gradient is not finite.
        """
        data = self._lay_out(trajectories)
        temperature, stale = self._check(trajectories, data, sampled=True)
        whole = self._whole(trajectories, data)
        loss = policy_gradient(self._advantage(whole)[whole.own])
        fresh = ledger.of_version(trajectories, self.policy.version, data.valid.shape[1])
        metrics = self._descend(trajectories, data, whole, loss, temperature, fresh)
        return {**metrics, "staleness_max": stale}

    def learn_offline(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """Take one step on the reward-weighted log-likelihood of logged conversations.

        No baseline, no importance weights, no KL term, and any policy version. Returns and raises as `learn` does.
        """
        data = self._lay_out(trajectories)
        temperature, _ = self._check(trajectories, data, sampled=False)
        whole = self._whole(trajectories, data)
        weight = baselines.standardise(whole.credit, whole.valid) if self._standardise else whole.credit
        objective = replace(self._objective, importance="none", kl_coefficient=0.0)
        return self._step(trajectories, data, whole, log_likelihood(weight[whole.own]), objective, temperature)

    @torch.no_grad()
    def evaluate_offline(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """Return the objective of `learn_offline` on conversations, without learning; on this worker alone.

        Returns:
            ``objective``: Σ_t credit_t · log π(y_t | …), mean per conversation; ``objective_per_turn``: the
            same per judged turn; ``log_likelihood``: log π(y_t | …), mean per judged turn, unweighted;
            ``turns``: judged turns.
        """
        data = batch(trajectories, self.policy.pad_id, self._n_turns)
        value = self._credit(data)
        weighted = likelihood = 0.0
        for part in score(self.policy, data, self._budget, ledger.temperature(trajectories)):
            per_token = losses.broadcast_credit(torch.from_numpy(value[part.rows]), part.token_mask, part.turn_index)
            weighted += float((per_token * part.log_probs).sum())
            likelihood += float(part.log_probs.sum())
        turns = max(1, int(data.valid.sum()))
        return {
            "objective": weighted / len(trajectories),
            "objective_per_turn": weighted / turns,
            "log_likelihood": likelihood / turns,
            "turns": int(data.valid.sum()),
        }

    def save(self, folder: str | Path) -> None:
        """Write adapter, tokenizer, optimiser and own state, as safetensors and JSON; only the main worker writes.

        All workers call it when the model's layers are split over them.
        """
        own = {
            "steps": self.steps,
            "policy_version": self.policy.version,
            "moving_average": self._average.state_dict(),
        }
        save_state(Path(folder), self.policy, self.optimizer, own, self._workers)

    def load(self, folder: str | Path) -> None:
        """Read back what `save` wrote, into an agent made with the same settings.

        Raises:
            ValueError: Another schema, another model, or an optimiser state that does not fit.
        """
        state = load_state(Path(folder), self.policy, self.optimizer)
        self._average.load_state_dict(state["moving_average"])
        self.steps = int(state["steps"])
        self.policy.version = int(state["policy_version"])

    def _lay_out(self, trajectories: Sequence[Trajectory]) -> Batch:
        """Return the conversations as arrays, with as many turns on every worker."""
        longest = max((len(t.turns) for t in trajectories), default=1)
        return batch(trajectories, self.policy.pad_id, self._n_turns or max(self._workers.gather([longest, 1])))

    def _check(self, trajectories: Sequence[Trajectory], data: Batch, *, sampled: bool) -> tuple[float, int]:
        """Return the temperature and the largest staleness of conversations that the ledger vouches for."""
        temperature, stale, fault = 1.0, 0, None
        try:
            ledger.check_batch(trajectories, data, trained_tokens(data))
            temperature = ledger.temperature(trajectories)
            if sampled:
                stale = ledger.staleness(trajectories, self.policy.version, self._max_staleness)
            if sampled and (self.own_ratios or self._objective.importance != "none"):
                ledger.check_known(trajectories)
        except LedgerError as error:
            fault = str(error)
        found = self._workers.gather([(fault, stale)])
        _agree([fault for fault, _ in found])
        return temperature, max(stale for _, stale in found)

    def _credit(self, data: Batch) -> Array:
        """Return the credit [B, n] of every turn."""
        return credit(data.rewards, self._mask(data.rewards.shape[1]), data.valid, self._discount)

    def _whole(self, trajectories: Sequence[Trajectory], data: Batch) -> Whole:
        """Return the credit of all workers' conversations, for baselines over the whole batch."""
        units = losses.batch_units(trained_tokens(data), data.turn_index, self._objective.aggregation)
        labels = [t.instruction for t in trajectories]
        parts = self._workers.gather([(self._credit(data), data.rewards, data.valid, labels, units)])
        credits, rewards, valid, personas, counts = zip(*parts, strict=True)
        before = sum(len(own) for own in personas[: self._workers.rank])
        return Whole(
            credit=np.concatenate(credits),
            rewards=np.concatenate(rewards),
            valid=np.concatenate(valid),
            groups=[label for own in personas for label in own],
            own=slice(before, before + len(labels)),
            units=sum(counts),
        )

    def _advantage(self, whole: Whole) -> Array:
        """Return the credit [B, n] less the baseline."""
        advantage = baselines.advantage(whole.credit, self._subtract(whole), whole.valid)
        return baselines.standardise(advantage, whole.valid) if self._standardise else advantage

    def _subtract(self, whole: Whole) -> Array:
        """Return the baseline [B, n]; asking takes the batch into a moving average."""
        if self._baseline == "leave-one-out":
            return baselines.leave_one_out(whole.credit, whole.valid, whole.groups)
        if self._baseline == "batch-mean":
            return baselines.batch_mean(whole.credit, whole.valid)
        if self._baseline == "moving-average":
            return self._average(whole.credit, whole.valid)
        return baselines.none(whole.credit, whole.valid)

    def _descend(
        self,
        trajectories: Sequence[Trajectory],
        data: Batch,
        whole: Whole,
        loss: Loss,
        temperature: float,
        fresh: NDArray[np.bool_] | None,
    ) -> dict[str, float]:
        """Take the batch's steps; what is compared with the sampler is compared before the first."""
        metrics = self._step(trajectories, data, whole, loss, self._objective, temperature, fresh)
        for _ in range(1, self._steps_per_batch):
            metrics |= self._step(trajectories, data, whole, loss, self._objective, temperature)
        return metrics

    def _step(
        self,
        trajectories: Sequence[Trajectory],
        data: Batch,
        whole: Whole,
        loss: Loss,
        objective: Objective,
        temperature: float,
        fresh: NDArray[np.bool_] | None = None,
    ) -> dict[str, float]:
        """Accumulate the gradient over micro-batches and workers, clip it and step."""
        self.optimizer.zero_grad(set_to_none=True)
        own = accumulate(
            self.policy,
            data,
            loss,
            objective,
            units=whole.units,
            budget=self._budget,
            temperature=temperature,
            fresh=fresh,
            workers=self._workers,
        )
        found = self._workers.gather([(own, ledger.gap_fault(own.gap, self._max_gap, trajectories))])
        _agree([fault for _, fault in found])
        judged, rate = whole.credit[whole.valid], self._rate(self.steps)
        metrics = {
            "grad_norm": 0.0,
            "credit_mean": float(judged.mean()) if judged.size else 0.0,
            "credit_std": float(judged.std()) if judged.size else 0.0,
            "learning_rate": rate,
            "policy_version": self.policy.version,
            **sum((part for part, _ in found), Sums()).metrics(objective),
        }
        if not judged.size:
            return metrics
        self._workers.sum_gradients(self._parameters)
        norm = clip(self._parameters, self._max_grad_norm)
        if not np.isfinite(norm):
            raise FloatingPointError(f"expected a finite gradient, got norm {norm}; lower the learning rate")
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.steps += 1
        self.policy.version += 1
        return {**metrics, "grad_norm": norm, "policy_version": self.policy.version}


def _agree(faults: Sequence[str | None]) -> None:
    """Raise the first worker's fault, on every worker."""
    for fault in faults:
        if fault is not None:
            raise LedgerError(fault)
