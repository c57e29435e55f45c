"""The learner for every method: judged conversations in, one or more optimiser steps out.

`Learner._learn` is the whole path from a reward to the gradient, top to bottom:

    lay out -> check -> shape -> credit -> keep -> advantage -> loss -> descend

Where a method differs at one of these steps, its row of `methods.METHODS` says so. Formulas are in `credit`,
`baselines`, `losses`, `importance` and `alternatives`, micro-batches in `gradient`, files in `state`. Nothing here
knows an environment. LoRA dropout adds noise to the ratios to the sampling policy.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppg_agents import baselines, ledger, losses
from ppg_agents.agents.advantages import turns_of
from ppg_agents.agents.gradient import Array, Descent, Loss, Objective, Whole, agree, score, trained_tokens
from ppg_agents.agents.measure import Measurement, advantage_spread, entropies, measure, references, states
from ppg_agents.agents.methods import METHODS, Method, resolve
from ppg_agents.agents.pairs import compared_turns, pair_loss
from ppg_agents.agents.protocol import Needs, OfflineAgent
from ppg_agents.agents.settings import LearnerSettings
from ppg_agents.agents.shaping import less_divergence, less_overlong
from ppg_agents.agents.state import load_state, save_state
from ppg_agents.agents.surrogates import token_loss
from ppg_agents.agents.trial import try_out
from ppg_agents.agents.value_head import FILE, Critique, Estimation, ValueHead
from ppg_agents.agents.watch import of_batch
from ppg_agents.batch import Batch, batch
from ppg_agents.credit import full
from ppg_agents.distributed import Alone, Workers
from ppg_agents.generation import Sampler
from ppg_agents.group_advantage import PER_TURN, GroupAdvantage
from ppg_agents.ledger import LedgerError
from ppg_agents.missing import Credits
from ppg_agents.policy.policy import Policy
from ppg_agents.trajectory import Trajectory, group_labels

log = logging.getLogger(__name__)

_PART = 512
"""Conversations per part of `Learner.prepare`; more would need n² numbers for each at once."""


class Learner(OfflineAgent):
    """Learns a policy by the partial policy gradient (arXiv 2603.06138), or another method of the table.

    Attributes:
        name: The method's name; ``method`` is its row, ``options`` all its options, ``settings`` the rest.
        policy: The policy that learns; its version counts optimiser steps.
        optimizer: AdamW, or plain gradient descent, over the policy's trainable weights.
        head: The value head; None for a method without one.
    """

    def __init__(
        self,
        policy: Policy,
        mask: Callable[[int], NDArray[Any]],
        *,
        method: str | Method = "ppg",
        sampler: Sampler | None = None,
        workers: Workers | None = None,
        **given: Any,
    ) -> None:
        """Make a learner.

        Args:
            policy: The policy that learns.
            mask: The policy class: n -> [n, n], boolean or weights (see `ppg_agents.credit`).
            method: A name in `methods.METHODS`, or your own row.
            sampler: Gives the longest reply to methods that divide by it.
            workers: The processes that learn together, each from its share of the conversations; None for one.
            **given: Fields of `LearnerSettings`, and the method's options; ``aggregation_of_source`` (true or false)
                aggregates token losses as the method's source does.

        Raises:
            ValueError: A setting that the method would ignore, an unknown option, or a value out of range.
        """
        names = {field.name for field in fields(LearnerSettings)}
        self.name = method if isinstance(method, str) else "custom"
        self.method = METHODS[method] if isinstance(method, str) else method
        self.options = self.method.fill(self.name, {key: value for key, value in given.items() if key not in names})
        settings = LearnerSettings(**{key: value for key, value in given.items() if key in names})
        settings = replace(settings, baseline=settings.baseline or self.method.baseline)
        self.method.check_settings(self.name, vars(settings))
        if self.method.check:
            resolve(self.method.check)(self.options, vars(settings))
        self.policy, self.sampler, self.settings = policy, sampler, settings
        if self.options.pop("aggregation_of_source", False):
            self.settings = settings = self._aggregated_as_the_source(settings)
        self._objective = Objective(
            settings.aggregation,
            settings.constant,
            settings.importance,
            settings.importance_cap,
            settings.kl_coefficient if self.method.kl == "loss" else 0.0,
            reference=self.method.reads_reference(self.options, settings.kl_coefficient),
            together=2 if self.method.pair_loss else 1,
            entropy_coefficient=settings.entropy_coefficient,
        )
        self._mask, self._workers = mask, workers or Alone()
        self._prepared: GroupAdvantage | None = None
        self._average = baselines.MovingAverage((settings.n_turns or 1) ** 2)  # of every reward, for every reply
        self._descent = Descent(policy, settings, self._workers)
        self.optimizer = self._descent.optimizer
        self.head: ValueHead | None = None
        if self.method.critic and self.options.get("value") != "mean":
            self.head = ValueHead(int(policy.config.hidden_size), self.options["value_learning_rate"], policy.device)
        if settings.n_turns:
            self._check_class(settings.n_turns)
        try_out(self.method, self.options, self._longest_reply() if self.options.get("overlong_buffer") else 0)
        if self._objective.reference or (settings.kl_coefficient and self.method.kl != "none"):
            two_tokens = torch.ones((1, 2), dtype=torch.bool)
            policy.reference_log_probs(two_tokens.long(), two_tokens)  # refuses a policy without a reference

    @property
    def needs(self) -> Needs:
        """What the learner needs from the loop."""
        return Needs(
            group=max(self._group(), 2 if self._scales_in_groups else 1),
            together=2 if self.method.pair_loss else 1,
            branch=self.method.branch,
            full_only=self.method.full_only(self.options),
            one_class=self.head is not None,
            best_of=int(self.options.get("n", 1)),
        )

    @property
    def masters(self) -> list[torch.nn.Parameter]:
        """What the optimiser steps on: the trained weights, or float32 copies of those in fewer bits."""
        return self._descent.masters.tensors

    @property
    def steps(self) -> int:
        """Optimiser steps taken."""
        return self._descent.steps

    @property
    def learns_offline(self) -> bool:
        """Whether it also learns from logged dialogues."""
        return self.method.offline

    @property
    def loss_is_likelihood(self) -> bool:
        """Whether the loss of `learn_offline` is minus the credit-weighted log-likelihood."""
        plain = self.settings.aggregation == "sum" and not (self.settings.standardise or self._scales_in_groups)
        return plain and self.method.offline and "baseline" in self.method.takes

    def learn(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """Take ``steps_per_batch`` optimiser steps on conversations of the current policy.

        Args:
            trajectories: B conversations; with several workers, this one's share.

        Returns:
            Metrics of the batch over all workers, named as in docs/metrics.md; after several steps, those of the last.
            No step is taken without a judged turn.

        Raises:
            LedgerError: The batch is not what was sampled, or was not sampled by this version of this policy.
            ValueError: A persona with too few conversations, or a policy class other than full planning where the
                method takes no other.
            FloatingPointError: The gradient is not finite.
        """
        return self._learn(trajectories, sampled=True)

    def learn_offline(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """Take one step on logged conversations, of any policy version.

        For ``ppg`` it ascends the credit-weighted log-likelihood: no importance weights, no KL term, and no baseline
        other than ``group`` and ``group-turn``, whose statistics `prepare` takes. Returns and raises as `learn` does.

        Raises:
            ValueError: The method needs samples of the policy itself, or a baseline that was not prepared.
        """
        if not self.method.offline:
            offline = ", ".join(name for name, method in METHODS.items() if method.offline)
            raise ValueError(f"{self.name!r} learns from its own samples only; agents that learn offline: {offline}")
        return self._learn(trajectories, sampled=False)

    def prepare(self, trajectories: Sequence[Trajectory]) -> None:
        """Take the statistics of the baselines ``group`` and ``group-turn`` over a whole training set [P: eq. (9)].

        Deterministic, so that all processes and a resumed run take the same. Without faults the partial sums are those
        of training to the last bit; with some, what is missing is made up for by parts of `_PART` conversations.
        """
        if not self._scales_in_groups:
            return
        turns = self.settings.n_turns or max((len(t.turns) for t in trajectories), default=1)
        sums, valid = [np.zeros((0, turns))], [np.zeros((0, turns), dtype=np.bool_)]
        for first in range(0, len(trajectories), _PART):
            data = batch(trajectories[first : first + _PART], self.policy.pad_id, turns)
            sums.append(self._credits(data.rewards, data.valid, data.missing).filled())
            valid.append(data.valid)
        groups, per_turn = group_labels(trajectories), PER_TURN[str(self.settings.baseline)]
        self._prepared = GroupAdvantage(np.concatenate(sums), np.concatenate(valid), groups, per_turn=per_turn)

    def _learn(self, trajectories: Sequence[Trajectory], *, sampled: bool) -> dict[str, float]:
        """Learn from a batch: the path from a reward to the gradient."""
        data = self._lay_out(trajectories)
        temperature, staleness = self._check(trajectories, data, sampled=sampled)
        data, shaping = self._shape(data, temperature)
        whole = self._credit(trajectories, data)
        described = {**whole.described(), **shaping}
        if not self.method.learns:
            return {**self._without_a_step(data), **described, **staleness}
        data, whole, kept = self._keep(trajectories, data, whole)
        critique = self._advantage(trajectories, data, whole, temperature, sampled=sampled)
        kinds = {"per_token": critique.per_token, "pairs": bool(self.method.pair_loss)}
        described |= {**advantage_spread(critique.advantage, data, whole, self._workers, **kinds), **critique.metrics}
        loss = self._loss(data, whole, critique)
        metrics = self._descend(trajectories, data, whole, loss, critique, temperature, sampled=sampled)
        return {**metrics, **described, **kept, **staleness}

    def _lay_out(self, trajectories: Sequence[Trajectory]) -> Batch:
        """Return the conversations as arrays, with the same number of turns on every worker."""
        longest = max((len(t.turns) for t in trajectories), default=1)
        turns = self.settings.n_turns or max(self._workers.gather([longest, 1]))
        self._check_class(turns)
        return batch(trajectories, self.policy.pad_id, turns)

    def _check(
        self, trajectories: Sequence[Trajectory], data: Batch, *, sampled: bool
    ) -> tuple[float, dict[str, float]]:
        """Check the conversations against the ledger; return their temperature and largest staleness."""
        temperature, stale, fault = 1.0, 0, None
        try:
            ledger.check_batch(trajectories, data, trained_tokens(data))
            temperature = ledger.temperature(trajectories)
            if sampled:
                stale = ledger.staleness(trajectories, self.policy.version, self.settings.max_staleness)
            if sampled and (self.method.ratio or self._objective.importance != "none"):
                ledger.check_known(trajectories)
        except LedgerError as error:
            fault = str(error)
        reports = self._workers.gather([(fault, stale)])
        agree([fault for fault, _ in reports])
        return temperature, {"staleness_max": max(stale for _, stale in reports)} if sampled else {}

    def _shape(self, data: Batch, temperature: float) -> tuple[Batch, dict[str, float]]:
        """Subtract from the rewards what the method subtracts before credit is formed."""
        metrics: dict[str, float] = {}
        beta, buffer = self.settings.kl_coefficient, int(self.options.get("overlong_buffer", 0))
        if self.method.kl == "reward" and beta:
            measured = self._measure(data, references(self.policy, temperature), trained_tokens(data))
            data, metrics = less_divergence(data, measured, beta, self._workers)
        if buffer:
            data = less_overlong(data, self._longest_reply(), buffer)
        return data, metrics

    def _credit(self, trajectories: Sequence[Trajectory], data: Batch) -> Whole:
        """Return the credit of all workers' conversations: statistics cover the whole batch, never one share."""
        units = losses.batch_units(trained_tokens(data), data.turn_index, self._objective.aggregation)
        labels = group_labels(trajectories)
        parts = self._workers.gather([(data.rewards, data.valid, data.missing, labels, units)])
        rewards, valid, missing, personas, counts = zip(*parts, strict=True)
        before = sum(len(part) for part in personas[: self._workers.rank])
        credits = self._credits(*(np.concatenate(part) for part in (rewards, valid, missing)))
        pairs = [b // 2 for b in range(len(credits.valid))] if self.method.pair_loss else None
        return Whole(
            credits=credits,
            credit=credits.filled(pairs),
            valid=credits.valid,
            groups=[label for part in personas for label in part],
            own=slice(before, before + len(labels)),
            units=sum(counts),
        )

    def _keep(
        self, trajectories: Sequence[Trajectory], data: Batch, whole: Whole
    ) -> tuple[Batch, Whole, dict[str, float]]:
        """Drop the conversations, or turns, that the method does not learn from."""
        self._check_groups(whole, self._group())
        if self.method.pair_loss:
            compared = compared_turns(self.name, trajectories, data.valid, branch=self.method.branch)
            kept = np.concatenate(self._workers.gather([compared]))
            metrics: dict[str, float] = {"pairs_dropped": int((~kept.any(1)).sum()) // 2}
        elif self.method.keep:
            conversations = resolve(self.method.keep)(whole, self.options)
            kept, metrics = conversations[:, None], {"conversations_kept": int(conversations.sum())}
        else:
            return data, whole, {}
        data = replace(data, valid=data.valid & kept[whole.own])
        units = losses.batch_units(trained_tokens(data), data.turn_index, self._objective.aggregation)
        return data, replace(whole, valid=whole.valid & kept, units=sum(self._workers.gather([units]))), metrics

    def _advantage(
        self, trajectories: Sequence[Trajectory], data: Batch, whole: Whole, temperature: float, *, sampled: bool
    ) -> Critique:
        """Return the advantage of this worker's turns or tokens."""
        if self.method.critic:
            cut = [trajectory.truncated and not trajectory.lost for trajectory in trajectories]

            def hidden(mask: Tensor) -> Tensor:
                return self._measure(data, states(self.policy), mask)

            given = Estimation(data, whole, self.head, hidden, self.settings.discount, cut, self._workers)
            critique: Critique = resolve(self.method.critic)(given, self.options)
            return critique
        advantage = whole.credit
        if self._scales_in_groups:
            advantage = self._group_advantage(whole, sampled=sampled)
        elif "baseline" in self.method.takes:
            # Logged replies are imitated in proportion to their credit; with a baseline the likelihood is unbounded.
            baseline = baselines.named(self.settings.baseline, whole.groups, self._average) if sampled else None
            advantage = whole.credits.against(baseline) if baseline else advantage
            advantage = baselines.standardise(advantage, whole.valid) if self.settings.standardise else advantage
        if self.method.advantage:
            entropy = None
            if self.method.entropy:
                entropy = self._measure(data, entropies(self.policy, temperature), trained_tokens(data))
            turns = turns_of(data, whole, advantage, entropy, self._workers)
            advantage = resolve(self.method.advantage)(turns, self.options).numpy()
        return Critique(torch.from_numpy(advantage[whole.own]), per_token=False)

    def _loss(self, data: Batch, whole: Whole, critique: Critique) -> Loss:
        """Return the loss as a function of a micro-batch."""
        if self.method.pair_loss:
            return pair_loss(self.method, self.options, whole.credit[whole.own], data.valid)
        advantage, trained = critique.advantage, trained_tokens(data)
        if not critique.per_token:
            advantage = losses.broadcast_credit(advantage, trained, data.turn_index)
        if self._objective.aggregation in ("sum", "constant"):  # the means divide by what is there
            seen = torch.from_numpy(whole.credits.replies[whole.own])
            advantage = advantage * losses.broadcast_credit(seen, trained, data.turn_index)
        return token_loss(self.method, self.options, advantage, self.settings.kl_coefficient)

    def _descend(
        self,
        trajectories: Sequence[Trajectory],
        data: Batch,
        whole: Whole,
        loss: Loss,
        critique: Critique,
        temperature: float,
        *,
        sampled: bool,
    ) -> dict[str, float]:
        """Take the policy's and the value head's steps; compare sampler and learner before the first."""
        objective = self._objective
        if not sampled:  # log-probs of logged words under their sampler are unknown
            objective = replace(objective, importance="none", kl_coefficient=0.0, entropy_coefficient=0.0)
        fresh = ledger.of_version(trajectories, self.policy.version, data.valid.shape[1]) if sampled else None
        step = partial(self._descent.step, trajectories, data, whole, loss, objective, temperature)
        metrics = of_batch([step(fresh), *(step() for _ in range(1, self.settings.steps_per_batch))])
        if self.head is not None and critique.regression is not None and whole.valid.any():
            clipped, epochs = float(self.options["value_clip"]) or None, int(self.options["value_epochs"])
            metrics["value_loss"] = self.head.fit(critique.regression, clipped, epochs, self._workers)
        return metrics

    @torch.no_grad()
    def evaluate_offline(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """Return the credit-weighted log-likelihood of conversations, without learning, on this worker alone.

        Returns:
            ``objective``: Σ_t A_t · log π(y_t | …) with A the credit, made up for what faults took away, mean per
            conversation; ``objective_per_turn``: the
            same per judged turn; ``log_likelihood``: log π(y_t | …), mean per judged turn, unweighted;
            ``turns``: judged turns.
        """
        data = batch(trajectories, self.policy.pad_id, self.settings.n_turns)
        credits = self._credits(data.rewards, data.valid, data.missing)
        value = credits.filled() * credits.replies
        weighted = likelihood = 0.0
        for part in score(self.policy, data, self.settings.micro_batch_tokens, ledger.temperature(trajectories)):
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
        """Write adapter, tokenizer, optimiser, value head and state, as safetensors and JSON, on the main worker.

        With split layers, all workers must call it.
        """
        average = self._average.state_dict()
        state = {"steps": self.steps, "policy_version": self.policy.version, "moving_average": average}
        save_state(Path(folder), self.policy, self.optimizer, self._descent.masters, state, self._workers)
        if self.head is not None and self._workers.main:
            self.head.save(Path(folder) / FILE)

    def load(self, folder: str | Path) -> None:
        """Read what `save` wrote, into a learner made with the same settings.

        Raises:
            ValueError: Another schema, another model, or an optimiser state that does not fit.
        """
        state = load_state(Path(folder), self.policy, self.optimizer, self._descent.masters)
        average = state["moving_average"]
        if len(average["mean"]) == len(self._average.mean):
            self._average.load_state_dict(average)
        elif self.settings.baseline == "moving-average":
            log.warning("%s: its moving average is of an earlier version, per turn; a new one is begun", folder)
        self._descent.steps = int(state["steps"])
        self.policy.version = int(state["policy_version"])
        if self.head is not None:
            self.head.load(Path(folder) / FILE)

    def _credits(self, rewards: Array, valid: NDArray[np.bool_], missing: NDArray[np.bool_]) -> Credits:
        """Return the credit of conversations by the policy class."""
        return Credits(rewards, valid, missing, self._mask(valid.shape[1]), self.settings.discount)

    def _measure(self, data: Batch, of: Measurement, mask: Tensor) -> Tensor:
        return measure(data, mask, of, budget=self.settings.micro_batch_tokens, workers=self._workers)

    def _without_a_step(self, data: Batch) -> dict[str, float]:
        """Return the metrics of a method that does not learn."""
        tokens = int(self._workers.sum_number(float(data.attention.sum())))
        still = {"loss": 0.0, "grad_norm": 0.0, "learning_rate": 0.0, "padding": 0.0}
        return {**still, "policy_version": self.policy.version, "tokens": tokens}

    def _check_class(self, n: int) -> None:
        if self.method.full_only(self.options) and not np.array_equal(self._mask(n), full(n)):
            todo = "leave out --policy-class: the method uses no credit"
            if self.method.credit:
                todo = "set agent_options.credit=class, which takes any policy class"
            raise ValueError(f"{self.name!r}: expected the policy class 'full', got another; {todo}")

    def _group(self) -> int:
        """Return the least number of conversations with one persona."""
        return 2 if self.options.get("group_mean") else self.method.group

    def _check_groups(self, whole: Whole, least: int) -> None:
        alone = [label for label, size in Counter(whole.groups).items() if size < least]
        if alone:
            raise ValueError(
                f"{self.name!r} compares conversations with one persona: expected at least {least} with each, "
                f"got 1 with {alone[0][0][:60]!r}; add --set group=4"
            )

    @property
    def _scales_in_groups(self) -> bool:
        """Whether the advantage is that of `GroupAdvantage`."""
        return self.settings.baseline in PER_TURN and "baseline" in self.method.takes

    def _group_advantage(self, whole: Whole, *, sampled: bool) -> Array:
        """Return the credit standardised over its group: of the batch, or of the training set if it is logged."""
        if sampled:
            self._check_groups(whole, 2)
            per_turn = PER_TURN[str(self.settings.baseline)]
            scale = GroupAdvantage(whole.credit, whole.valid, whole.groups, per_turn=per_turn)
        elif self._prepared is None:
            raise ValueError(
                f"baseline {self.settings.baseline!r}: expected the statistics of the training set, got none; call "
                "prepare(trajectories) before learn_offline"
            )
        else:
            scale = self._prepared
        return scale(whole.credit, whole.valid, whole.groups)

    def _aggregated_as_the_source(self, settings: LearnerSettings) -> LearnerSettings:
        """Return the settings with the aggregation of the method's source."""
        source, constant = self.method.source_aggregation, settings.constant
        if settings.aggregation != "sum" or source is None:
            raise ValueError(f"expected one of aggregation and aggregation_of_source, got both for {self.name!r}")
        if source == "constant" and constant is None:
            constant = float(self._longest_reply())
        return replace(settings, aggregation=source, constant=constant)

    def _longest_reply(self) -> int:
        """Return the most tokens that a reply can have."""
        if self.sampler is None:
            raise ValueError(
                f"{self.name!r}: expected a sampler, which gives the longest reply, got none; pass sampler="
            )
        return self.sampler.max_new_tokens
