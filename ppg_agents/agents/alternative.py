"""Other learners on the same environment, policy, ledger and budget: a policy class's credit, another way to learn.

credit -> advantage (statistics of the whole batch of all processes) -> loss per token -> aggregation -> optimiser
steps. What a method is stands in `methods`; value heads are in `value_head`, pairs of conversations in `pairs`. With
LoRA's dropout, ratios to the sampling policy have its noise in them.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppg_agents import alternatives as alt
from ppg_agents import ledger, losses
from ppg_agents.agents.gradient import Array, Loss, Ratios, Reduction, Scored, Whole, trained_tokens
from ppg_agents.agents.measure import Measurement, entropies, measure, references
from ppg_agents.agents.methods import TAKEN, Method, Turns, log
from ppg_agents.agents.ppg import PPGAgent
from ppg_agents.credit import Mask, full
from ppg_agents.losses import batch_units, tokens_per_turn
from ppg_agents.policy.policy import Policy
from ppg_agents.trajectory import Batch, Trajectory

_SETTINGS = frozenset(inspect.signature(PPGAgent).parameters)


class AlternativeAgent(PPGAgent):
    """Learns a policy by another method than the partial policy gradient.

    Attributes:
        name: The method's.
        method: What it is.
        options: Its options, all of them.
        group: Least number of conversations with one persona.
        together: Conversations in a row that one process has to have.
        branch: Whether a batch is made of pairs that share a history (see `ppg_agents.rollout.pairs`).
        full_only: Whether it takes no other policy class than full planning.
        best_of: Times that every conversation is played in an evaluation; the best one counts.
        learns_offline: Whether it learns from logged dialogues.
    """

    loss_is_likelihood = False
    together = 1
    branch = False

    def __init__(self, name: str, method: Method, policy: Policy, mask: Callable[[int], Mask], **given: Any) -> None:
        """Make an agent.

        Args:
            name: Of the method, for messages.
            method: What is learned by.
            policy: Who learns.
            mask: The policy class, as for `PPGAgent`.
            **given: Settings of `PPGAgent`, with ``baseline`` being ``batch-mean`` unless given, and options of the
                method; ``aggregation_of_source`` (true or false) aggregates as its source does, and not by ``sum``.

        Raises:
            ValueError: An option that the method does not have, a setting that it would ignore, or one out of range.
        """
        settings = {"baseline": "batch-mean", **{k: v for k, v in given.items() if k in _SETTINGS}}
        self.name, self.method = name, method
        self.options = method.fill(name, {k: v for k, v in given.items() if k not in _SETTINGS})
        self.own_ratios = method.ratio
        self.repeatable = "importance" not in method.takes
        self._check_settings(settings)
        if self.options.pop("aggregation_of_source", False):
            settings |= self._source_aggregation(settings)
        self._beta = settings.pop("kl_coefficient", 0.0) if method.kl != "loss" else 0.0
        if not 0 <= self._beta < float("inf"):
            raise ValueError(f"expected kl_coefficient >= 0, got {self._beta}")
        super().__init__(policy, mask, **settings)
        self.group = 2 if self.options.get("group_mean") else method.group
        self.full_only = not method.credit or self.options.get("credit") == "gae"
        self.best_of = int(self.options.get("n", 1))
        self.learns_offline = method.offline
        self._objective = replace(self._objective, reference=self._refers(), together=self.together)
        if self._n_turns:
            self._check_class(self._n_turns)
        if self._beta or self._objective.reference or self._objective.kl_coefficient:
            every = torch.ones((1, 2), dtype=torch.bool)
            policy.reference_log_probs(every.long(), every)  # refuses a policy without one
        self._try_options()

    def learn(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """Take ``steps_per_batch`` optimiser steps on conversations of the current policy; see `PPGAgent.learn`.

        Returns:
            What `PPGAgent.learn` returns, and where the method has them: ``ratio_max`` and ``clip_fraction`` (of
            the last step), ``kl``, ``value_loss``, ``conversations_kept``, ``pairs_dropped``.

        Raises:
            LedgerError: As `PPGAgent.learn`.
            ValueError: A persona with too few conversations, or another policy class than full planning where no
                other is taken.
            FloatingPointError: The gradient is not finite.
        """
        data = self._lay_out(trajectories)
        temperature, stale = self._check(trajectories, data, sampled=True)
        fresh = ledger.of_version(trajectories, self.policy.version, data.valid.shape[1])
        metrics = self._learn(trajectories, data, temperature, fresh)
        return {**metrics, "staleness_max": stale}

    def learn_offline(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """Take one step on logged conversations, of any policy version.

        Raises:
            ValueError: The method needs samples of the policy itself.
        """
        if not self.learns_offline:
            raise ValueError(f"{self.name!r} learns from its own samples only; offline learn ppg, a-lol and sft")
        data = self._lay_out(trajectories)
        temperature, _ = self._check(trajectories, data, sampled=False)
        return self._learn(trajectories, data, temperature, None)

    def _learn(
        self,
        trajectories: Sequence[Trajectory],
        data: Batch,
        temperature: float,
        fresh: NDArray[np.bool_] | None,
    ) -> dict[str, float]:
        self._check_class(data.valid.shape[1])
        data, found = self._shaped(data, temperature)
        whole = self._whole(trajectories, data)
        judged = whole.credit[whole.valid]
        spread = {"credit_mean": float(judged.mean()), "credit_std": float(judged.std())} if judged.size else {}
        if not self.method.learns:
            taken = {"loss": 0.0, "grad_norm": 0.0, "credit_mean": 0.0, "credit_std": 0.0, "learning_rate": 0.0}
            tokens = int(self._workers.sum_number(float(data.attention.sum())))
            return {**taken, **spread, "policy_version": self.policy.version, "tokens": tokens, "padding": 0.0}
        self._check_groups(whole)
        kept, more = self._keep(trajectories, data, whole)
        if kept is not None:
            data = replace(data, valid=data.valid & kept[whole.own])
            units = batch_units(trained_tokens(data), data.turn_index, self._objective.aggregation)
            whole = replace(whole, valid=whole.valid & kept, units=sum(self._workers.gather([units])))
        loss = self._loss(data, whole, temperature)
        return {**self._descend(trajectories, data, whole, loss, temperature, fresh), **spread, **found, **more}

    def _shaped(self, data: Batch, temperature: float) -> tuple[Batch, dict[str, float]]:
        """Take off the rewards what the method takes off them before the credit is formed."""
        mask, found = trained_tokens(data), {}
        if self.method.kl == "reward" and self._beta:
            reference = self._measure(data, references(self.policy, temperature))
            sampling = data.sampling_log_probs.double()
            penalty = torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, reference.cpu().double())
            arrays = (torch.from_numpy(data.rewards), sampling, penalty, mask, data.turn_index)
            shaped = alt.kl_shaped_reward(*arrays, beta=self._beta).numpy()
            taken = np.where(data.valid, data.rewards - shaped, 0.0).sum() / self._beta
            total, turns = (self._workers.sum_number(float(x)) for x in (taken, data.valid.sum()))
            found = {"kl": total / max(1.0, turns)}
            data = replace(data, rewards=shaped)
        if self.options.get("overlong_buffer"):
            limit = self._longest()
            lengths = torch.from_numpy((data.spans[..., 2] - data.spans[..., 1]).astype(np.float64))
            penalty = alt.overlong_penalty(lengths, max_length=limit, buffer=self.options["overlong_buffer"])
            data = replace(data, rewards=data.rewards + penalty.numpy())
        return data, found

    def _keep(
        self, trajectories: Sequence[Trajectory], data: Batch, whole: Whole
    ) -> tuple[NDArray[np.bool_] | None, dict[str, float]]:
        """Return which turns [B, n] of the whole batch are learned from, and what there is to say of it."""
        if self.method.keep is None:
            return None, {}
        kept = self.method.keep(whole, self.options)
        return kept[:, None], {"conversations_kept": int(kept.sum())}

    def _loss(self, data: Batch, whole: Whole, temperature: float) -> Loss:
        """Return the batch's loss: the method's, with the advantage of every token."""
        advantage = self._advantage(whole)
        if self.method.advantage is not None:
            advantage = self.method.advantage(self._turns(data, whole, advantage, temperature), self.options).numpy()
        return self._token_loss(data, advantage[whole.own])

    def _turns(self, data: Batch, whole: Whole, baselined: Array, temperature: float) -> Turns:
        mask, valid = trained_tokens(data), torch.from_numpy(whole.valid)
        lengths = alt.turn_sum(mask.double(), mask, data.turn_index, valid.shape[1])
        entropy = torch.zeros_like(lengths)
        if self.method.entropy:
            measured = self._measure(data, entropies(self.policy, temperature)).cpu().double()
            per_token = torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, measured)
            entropy = alt.turn_mean(per_token, mask, data.turn_index, valid.shape[1])
        parts = self._workers.gather([(lengths.numpy(), entropy.numpy())])
        everywhere = [torch.from_numpy(np.concatenate(part)) for part in zip(*parts, strict=True)]
        credit = torch.from_numpy(whole.credit)
        return Turns(credit, torch.from_numpy(baselined), valid, whole.groups, *everywhere)

    def _advantage(self, whole: Whole) -> Array:
        return super()._advantage(whole) if "baseline" in self.method.takes else whole.credit

    def _token_loss(self, data: Batch, advantage: Array, per_token: bool = False) -> Loss:
        """Return the method's loss with an advantage per turn [B, n] or per token [B, L]."""
        spread = torch.from_numpy(advantage)
        if not per_token:
            spread = losses.broadcast_credit(spread, trained_tokens(data), data.turn_index)

        def loss(part: Scored, reduction: Reduction) -> tuple[Tensor, Ratios]:
            own = spread[part.rows, : part.token_mask.shape[1]].to(part.log_probs)
            value = self.method.loss(part, own, self.options)
            if part.reference is not None and self.method.kl == "token":
                weighted = self.options["kl_weighted"]
                sampling = part.sampling if weighted else None
                arrays = (part.log_probs, part.reference, part.token_mask)
                value = value + self._beta * alt.kl_term(*arrays, sampling_log_probs=sampling, kl_weighted=weighted)
            return losses.aggregate(value, part.token_mask, part.turn_index, **reduction), self._ratios(part, own)

        return loss

    @torch.no_grad()
    def _ratios(self, part: Scored, advantage: Tensor) -> Ratios:
        """Return what is to be said of w, that of the reply where the loss weighs by it."""
        mask = part.token_mask
        if not self.own_ratios or not bool(mask.any()):
            return Ratios()
        log_ratios = alt.log_ratio(part.log_probs, part.sampling, mask)
        if self._by_reply():
            tokens, turn = tokens_per_turn(mask, part.turn_index)
            log_ratios = alt.turn_sum(log_ratios, mask, part.turn_index, tokens.shape[1]).gather(1, turn)
        w = log_ratios.exp()
        count, outside, bounded = int(mask.sum()), 0, 0
        if self.method.bounds is not None:
            low, high = self.method.bounds(advantage, self.options)
            outside, bounded = int((((w < low) | (w > high)) & mask).sum()), count
        return Ratios(float(w[mask].max()), count, bounded, outside)

    def _measure(self, data: Batch, of: Measurement, mask: Tensor | None = None) -> Tensor:
        mask = trained_tokens(data) if mask is None else mask
        return measure(data, mask, of, budget=self._budget, workers=self._workers)

    def _by_reply(self) -> bool:
        """Return whether w is that of the reply."""
        return bool(self.options.get("ratio") == "reply")

    def _refers(self) -> bool:
        """Return whether the loss reads the reference model's log-probs."""
        return self.method.kl == "token" and self._beta > 0

    def _check_settings(self, settings: dict[str, Any]) -> None:
        for key, (default, why) in TAKEN.items():
            value = settings.get(key, default)
            takes = self.method.kl != "none" if key == "kl_coefficient" else key in self.method.takes
            if value != default and not takes:
                raise ValueError(f"{self.name!r}: expected {key} = {default!r}, got {value!r}: {why}; leave it out")
        if self.name == "dispo" and settings["baseline"] == "none":
            log.warning("dispo: without a baseline no advantage is negative, and its bounds for those never act")

    def _check_class(self, n: int) -> None:
        if self.full_only and not np.array_equal(self._mask(n), full(n)):
            todo = "leave out --policy-class: it weighs by no credit"
            if self.method.credit:
                todo = "set agent_options.credit=class, which takes any policy class"
            raise ValueError(f"{self.name!r}: expected the policy class 'full', got another; {todo}")

    def _check_groups(self, whole: Whole) -> None:
        alone = [label for label, size in Counter(whole.groups).items() if size < self.group]
        if alone:
            raise ValueError(
                f"{self.name!r} compares conversations with one persona: expected at least {self.group} with each, got "
                f"1 with {str(alone[0])[:60]!r}; add --set group=4"
            )

    def _source_aggregation(self, settings: dict[str, Any]) -> dict[str, Any]:
        if settings.get("aggregation", "sum") != "sum":
            raise ValueError(f"expected one of aggregation and aggregation_of_source, got both for {self.name!r}")
        chosen: dict[str, Any] = {"aggregation": self.method.source_aggregation}
        if self.method.source_aggregation == "constant" and settings.get("constant") is None:
            self.sampler = settings.get("sampler")
            chosen["constant"] = float(self._longest())
        return chosen

    def _longest(self) -> int:
        """Return the longest reply's tokens."""
        if self.sampler is None:
            raise ValueError(f"{self.name!r}: expected a sampler, whose longest reply is asked for, got none")
        return self.sampler.max_new_tokens

    def _try_options(self) -> None:
        """Compute the loss of one made-up token, so that an option out of range is found before anything is sampled."""
        keep, n = self.options.get("keep", 1.0), self.options.get("n", 1)
        if not 0 < keep <= 1 or n < 1:
            raise ValueError(f"{self.name!r}: expected keep in (0, 1] and n >= 1, got {keep} and {n}")
        zeros, ones = torch.zeros((1, 2)), torch.ones((1, 2), dtype=torch.bool)
        part = Scored([0], zeros.long(), ones, zeros, zeros, ones, zeros.long())
        self.method.loss(part, zeros + 1, self.options)
        one, yes = torch.ones((2, 1), dtype=torch.float64), torch.ones((2, 1), dtype=torch.bool)
        if self.method.advantage is not None:
            self.method.advantage(Turns(one, one, yes, [0, 0], one, one), self.options)
        if self.options.get("overlong_buffer"):
            alt.overlong_penalty(one, max_length=self._longest(), buffer=self.options["overlong_buffer"])

