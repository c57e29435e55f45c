"""The partial-policy-gradient agent: trajectories in, one optimiser step out.

credit -> baseline -> loss -> clip -> AdamW. Formulas live in `credit`, `baselines` and `losses`; nothing here
knows an environment, or which policy class its mask stands for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppg_agents import baselines, losses
from ppg_agents.credit import credit
from ppg_agents.generation import Sampler
from ppg_agents.policy import Policy
from ppg_agents.rollout import Speaker
from ppg_agents.trajectory import Batch, Trajectory, batch

Baseline = Literal["none", "leave-one-out", "batch-mean", "moving-average"]
Array = NDArray[np.float64]

SCHEMA = "ppg-agent/1"


class PPGAgent:
    """Learns a policy with the partial policy gradient (arXiv 2603.06138).

    Attributes:
        policy: Who learns; its version counts optimiser steps.
        optimizer: AdamW over the policy's trainable weights.
        steps: Optimiser steps taken.
    """

    def __init__(
        self,
        policy: Policy,
        mask: Callable[[int], NDArray[np.bool_]],
        *,
        n_turns: int | None = None,
        discount: float = 1.0,
        baseline: Baseline = "leave-one-out",
        standardise: bool = False,
        aggregation: losses.Aggregation = "sum",
        constant: float | None = None,
        learning_rate: float | Callable[[int], float] = 1e-3,
        total_steps: int | None = None,
        max_grad_norm: float = 1.0,
        weight_decay: float = 0.0,
        micro_batch_tokens: int = 8192,
        sampler: Sampler | None = None,
    ) -> None:
        """Make an agent.

        Args:
            policy: Who learns.
            mask: The policy class: n -> boolean [n, n] (see `ppg_agents.credit`).
            n_turns: n; default the longest conversation of each batch.
            discount: Per turn.
            baseline: Subtracted from the credit when learning online. ``leave-one-out`` compares
                conversations with the same instruction.
            standardise: Divide advantages by their standard deviation.
            aggregation: How token losses become one number (see `losses`); ``sum`` is the gradient itself.
            constant: For the aggregation ``constant``.
            learning_rate: Of AdamW: a number, or a function of the steps taken.
            total_steps: With a number as learning rate, it falls linearly to 0 over so many steps.
            max_grad_norm: The gradient is scaled down to this 2-norm.
            weight_decay: Of AdamW.
            micro_batch_tokens: Tokens, padding included, per forward pass; at least one conversation.
            sampler: For `act`; None for an agent that only learns.

        Raises:
            ValueError: An unknown baseline, or a moving average without `n_turns`.
        """
        if baseline not in get_args(Baseline):
            raise ValueError(f"expected a baseline out of {get_args(Baseline)}, got {baseline!r}")
        if baseline == "moving-average" and n_turns is None:
            raise ValueError("expected n_turns with baseline 'moving-average', got None; pass n_turns=")
        self.policy = policy
        self.steps = 0
        self.sampler = sampler
        self._mask = mask
        self._n_turns = n_turns
        self._discount = discount
        self._baseline = baseline
        self._standardise = standardise
        self._aggregation = aggregation
        self._constant = constant
        self._rate = _schedule(learning_rate, total_steps)
        self._max_grad_norm = max_grad_norm
        self._budget = micro_batch_tokens
        self._average = baselines.MovingAverage(n_turns or 1)
        self._speaker: Speaker | None = None
        self._generator: torch.Generator | None = None
        self._parameters = policy.parameters()
        self.optimizer = torch.optim.AdamW(self._parameters, lr=self._rate(0), weight_decay=weight_decay, foreach=True)

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
        """Take one gradient step on conversations of the current policy.

        Args:
            trajectories: B conversations.

        Returns:
            ``loss``, ``grad_norm`` (before clipping), ``credit_mean`` and ``credit_std`` over judged turns,
            ``learning_rate``, ``tokens`` (real tokens read), ``policy_version`` (after the step). Without
            a judged turn there is no step.

        Raises:
            FloatingPointError: The gradient is not finite.
        """
        data, value = self._credit(trajectories)
        base = self._subtract(value, data, [t.instruction for t in trajectories])
        advantage = baselines.advantage(value, base, data.valid)
        if self._standardise:
            advantage = baselines.standardise(advantage, data.valid)
        return self._step(data, advantage, value, losses.partial_policy_gradient)

    def learn_offline(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """Take one step on the reward-weighted log-likelihood of logged conversations.

        No baseline and no importance weights. Returns and raises as `learn` does.
        """
        data, value = self._credit(trajectories)
        weight = baselines.standardise(value, data.valid) if self._standardise else value
        return self._step(data, weight, value, losses.reward_weighted_log_likelihood)

    @torch.no_grad()
    def evaluate_offline(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """Return the objective of `learn_offline` on conversations, without learning.

        Returns:
            ``objective``: Σ_t credit_t · log π(y_t | …), mean per conversation; ``objective_per_turn``: the
            same per judged turn; ``log_likelihood``: log π(y_t | …), mean per judged turn, unweighted;
            ``turns``: judged turns.
        """
        data, value = self._credit(trajectories)
        weighted = likelihood = 0.0
        for rows, log_probs, token_mask, turn_index in self._scored(data):
            per_token = losses.broadcast_credit(torch.from_numpy(value[rows]), token_mask, turn_index)
            weighted += float((per_token * log_probs).sum())
            likelihood += float(log_probs.sum())
        turns = max(1, int(data.valid.sum()))
        return {
            "objective": weighted / len(trajectories),
            "objective_per_turn": weighted / turns,
            "log_likelihood": likelihood / turns,
            "turns": int(data.valid.sum()),
        }

    def save(self, folder: str | Path) -> None:
        """Write adapter, tokenizer, optimiser and own state, as safetensors and JSON."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.policy.save(folder)
        moments = {
            f"{name}.{key}": tensor.contiguous()
            for name, parameter in self._named()
            for key, tensor in self.optimizer.state.get(parameter, {}).items()
        }
        save_file(moments, folder / "optimizer.safetensors")
        state = {
            "schema": SCHEMA,
            "steps": self.steps,
            "policy_version": self.policy.version,
            "moving_average": self._average.state_dict(),
        }
        (folder / "agent.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")

    def load(self, folder: str | Path) -> None:
        """Read back what `save` wrote, into an agent made with the same settings.

        Raises:
            ValueError: Another schema, another model, or an optimiser state that does not fit.
        """
        from safetensors.torch import load_file

        folder = Path(folder)
        state = json.loads((folder / "agent.json").read_text(encoding="utf-8"))
        if state.get("schema") != SCHEMA:
            raise ValueError(f"expected schema {SCHEMA!r} in {folder}, got {state.get('schema')!r}")
        moments: dict[Tensor, dict[str, Tensor]] = {}
        named = dict(self._named())
        for key, tensor in load_file(folder / "optimizer.safetensors").items():
            name, _, kind = key.rpartition(".")
            if name not in named:
                raise ValueError(f"expected this policy's optimiser state in {folder}, got weight {name!r}")
            where = "cpu" if kind == "step" else self.policy.device
            moments.setdefault(named[name], {})[kind] = tensor.to(where)
        self.policy.load_weights(folder)
        self.optimizer.state.clear()
        self.optimizer.state.update(moments)
        self._average.load_state_dict(state["moving_average"])
        self.steps = int(state["steps"])
        self.policy.version = int(state["policy_version"])

    def _named(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(k, p) for k, p in self.policy.model.named_parameters() if p.requires_grad]

    def _credit(self, trajectories: Sequence[Trajectory]) -> tuple[Batch, Array]:
        """Return the conversations as arrays and the credit [B, n] of every turn."""
        data = batch(trajectories, self.policy.pad_id, self._n_turns)
        mask = self._mask(data.rewards.shape[1])
        return data, credit(data.rewards, mask, data.valid, self._discount)

    def _subtract(self, value: Array, data: Batch, groups: Sequence[str]) -> Array:
        if self._baseline == "leave-one-out":
            return baselines.leave_one_out(value, data.valid, groups)
        if self._baseline == "batch-mean":
            return baselines.batch_mean(value, data.valid)
        if self._baseline == "moving-average":
            return self._average(value, data.valid)
        return baselines.none(value, data.valid)

    def _step(self, data: Batch, weight: Array, value: Array, loss_function: Callable[..., Tensor]) -> dict[str, float]:
        """Accumulate the gradient over micro-batches, clip it and step."""
        rate = self._rate(self.steps)
        judged = value[data.valid]
        metrics = {
            "loss": 0.0,
            "grad_norm": 0.0,
            "credit_mean": float(judged.mean()) if judged.size else 0.0,
            "credit_std": float(judged.std()) if judged.size else 0.0,
            "learning_rate": rate,
            "tokens": int(data.attention.sum()),
            "policy_version": self.policy.version,
        }
        if not judged.size:
            return metrics
        units = losses.batch_units(self._trained(data), data.turn_index, self._aggregation)
        self.optimizer.zero_grad(set_to_none=True)
        for rows, log_probs, token_mask, turn_index in self._scored(data):
            loss = loss_function(
                log_probs,
                token_mask,
                turn_index,
                torch.from_numpy(weight[rows]),
                aggregation=self._aggregation,
                constant=self._constant,
                batch_size=units,
            )
            loss.backward()  # type: ignore[no-untyped-call]
            metrics["loss"] += float(loss.detach())
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, self._max_grad_norm))
        if not np.isfinite(norm):
            raise FloatingPointError(f"expected a finite gradient, got norm {norm}; lower the learning rate")
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.steps += 1
        self.policy.version += 1
        return {**metrics, "grad_norm": norm, "policy_version": self.policy.version}

    def _trained(self, data: Batch) -> Tensor:
        """Return the mask [B, L] of sampled tokens in judged turns."""
        return losses.turn_token_mask(data.token_mask, data.turn_index, torch.from_numpy(data.valid))

    def _scored(self, data: Batch) -> Iterator[tuple[list[int], Tensor, Tensor, Tensor]]:
        """Yield rows, and their log-probs, mask of trained tokens and turn indices, per micro-batch.

        Conversations of similar length go together; those without a trained token are left out, and so are
        the tokens after the last trained one.
        """
        trained = self._trained(data)
        ends = (trained * torch.arange(1, trained.shape[1] + 1)).amax(1).tolist()
        order = sorted((b for b, end in enumerate(ends) if end), key=lambda b: -ends[b])
        while order:
            length = ends[order[0]]
            size = max(1, self._budget // length)
            rows, order = order[:size], order[size:]
            token_mask, turn_index = trained[rows, :length], data.turn_index[rows, :length]
            log_probs = self.policy.log_probs(data.ids[rows, :length], data.attention[rows, :length], token_mask)
            yield rows, log_probs, token_mask.to(log_probs.device), turn_index.to(log_probs.device)


def linear_decay(learning_rate: float, total_steps: int) -> Callable[[int], float]:
    """Return the rate that falls from `learning_rate` at step 0 to 0 at `total_steps`."""
    return lambda step: learning_rate * max(0.0, 1.0 - step / total_steps)


def _schedule(rate: float | Callable[[int], float], total_steps: int | None) -> Callable[[int], float]:
    if callable(rate):
        if total_steps is not None:
            raise ValueError("expected total_steps only with a number as learning rate, got a function")
        return rate
    return linear_decay(rate, total_steps) if total_steps else lambda step: rate
