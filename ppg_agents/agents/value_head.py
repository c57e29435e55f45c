"""Alternatives with a value head: PPO, bi-level GAE, and A-LoL, which may do without.

The head is linear on the last hidden state before a token, and learns from states that the policy had before the
batch's first step: its loss never changes the policy's weights (ours; others share them), so that the policy gradient
is that of the method's loss alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppg_agents import alternatives as alt
from ppg_agents import baselines
from ppg_agents.agents.alternative import AlternativeAgent
from ppg_agents.agents.gradient import Array, Loss, Whole, last_trained, trained_tokens
from ppg_agents.agents.measure import states
from ppg_agents.agents.methods import Method
from ppg_agents.alternatives.tokens import turn_bounds
from ppg_agents.credit import Mask
from ppg_agents.distributed import Workers
from ppg_agents.policy.policy import Policy
from ppg_agents.trajectory import Batch, Trajectory

FILE = "value_head.safetensors"


class ValueHead:
    """V = w · h + b of a hidden state h, in float32, zero at first; with an AdamW of its own.

    Attributes:
        weight: w [hidden].
        bias: b.
        optimizer: Over both.
    """

    def __init__(self, size: int, learning_rate: float, device: torch.device) -> None:
        """Make a head that says 0.

        Raises:
            ValueError: A learning rate that is not above 0.
        """
        if not 0 < learning_rate < float("inf"):
            raise ValueError(f"expected value_learning_rate > 0, got {learning_rate}")
        self.weight = torch.nn.Parameter(torch.zeros(size, device=device))
        self.bias = torch.nn.Parameter(torch.zeros(1, device=device))
        self.optimizer = torch.optim.AdamW([self.weight, self.bias], lr=learning_rate, weight_decay=0.0)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return values [N] of states [N, hidden]."""
        return hidden.to(self.weight) @ self.weight + self.bias

    def fit(self, regression: Regression, clip: float | None, workers: Workers) -> float:
        """Take one step towards the targets; return the loss before it, over all workers."""
        total = workers.sum_number(float(len(regression.targets)))
        every = torch.ones((1, len(regression.targets)), dtype=torch.bool, device=self.weight.device)
        arrays = (self(regression.hidden)[None], regression.targets[None].to(self.weight), every)
        old = regression.values[None].to(self.weight) if clip is not None else None
        loss = alt.value_loss(*arrays, old_values=old, clip=clip).sum() / max(total, 1.0)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        workers.sum_gradients([self.weight, self.bias])
        if not all(bool(p.grad.isfinite().all()) for p in (self.weight, self.bias) if p.grad is not None):
            raise FloatingPointError("expected a finite gradient of the value head; lower value_learning_rate")
        self.optimizer.step()
        return workers.sum_number(float(loss.detach()))

    def save(self, path: Path) -> None:
        """Write weights and moments."""
        from safetensors.torch import save_file

        found = {"weight": self.weight.detach(), "bias": self.bias.detach()}
        for name, parameter in (("weight", self.weight), ("bias", self.bias)):
            moments = self.optimizer.state.get(parameter, {})
            found |= {f"{name}.{key}": tensor.contiguous() for key, tensor in moments.items()}
        save_file(found, path)

    def load(self, path: Path) -> None:
        """Read back what `save` wrote.

        Raises:
            ValueError: A head of another size.
        """
        from safetensors.torch import load_file

        found = load_file(path)
        if found["weight"].shape != self.weight.shape:
            raise ValueError(f"expected a value head of {len(self.weight)} in {path}, got {len(found['weight'])}")
        self.optimizer.state.clear()
        with torch.no_grad():
            for name, parameter in (("weight", self.weight), ("bias", self.bias)):
                parameter.copy_(found[name])
                moments = {k.partition(".")[2]: v for k, v in found.items() if k.startswith(f"{name}.")}
                if moments:
                    self.optimizer.state[parameter] = {
                        k: v if k == "step" else v.to(parameter.device) for k, v in moments.items()
                    }


@dataclass(frozen=True)
class Regression:
    """What a value head learns from a batch: N hidden states, the targets G, and the values V° that it gave before."""

    hidden: Tensor
    targets: Tensor
    values: Tensor


class ValueHeadAgent(AlternativeAgent):
    """Learns a policy against a learned value.

    Attributes:
        head: The value head; None where the options do without.
    """

    def __init__(self, name: str, method: Method, policy: Policy, mask: Callable[[int], Mask], **given: Any) -> None:
        """Make an agent; see `AlternativeAgent`.

        Raises:
            ValueError: As `AlternativeAgent`; or a discount per turn where credit is formed token by token.
        """
        super().__init__(name, method, policy, mask, **given)
        self.head: ValueHead | None = None
        self._regression: Regression | None = None
        self._cut: list[bool] = []
        if self.options.get("value") != "mean":
            rate = self.options["value_learning_rate"]
            self.head = ValueHead(int(policy.config.hidden_size), rate, policy.device)
        if name == "ppo" and self.options["credit"] == "gae" and self._discount != 1.0:
            raise ValueError(
                f"'ppo': expected discount = 1 with credit 'gae', got {self._discount}; "
                "set agent_options.token_discount, or agent_options.credit=class"
            )

    def save(self, folder: str | Path) -> None:
        """Write what `PPGAgent.save` writes, and the head."""
        super().save(folder)
        if self.head is not None and self._workers.main:
            self.head.save(Path(folder) / FILE)

    def load(self, folder: str | Path) -> None:
        """Read back what `save` wrote; see `PPGAgent.load`."""
        super().load(folder)
        if self.head is not None:
            self.head.load(Path(folder) / FILE)

    def _learn(
        self, trajectories: Sequence[Trajectory], data: Batch, temperature: float, fresh: NDArray[np.bool_] | None
    ) -> dict[str, float]:
        self._cut = [trajectory.truncated for trajectory in trajectories]
        return super()._learn(trajectories, data, temperature, fresh)

    def _descend(
        self,
        trajectories: Sequence[Trajectory],
        data: Batch,
        whole: Whole,
        loss: Loss,
        temperature: float,
        fresh: NDArray[np.bool_] | None,
    ) -> dict[str, float]:
        metrics = super()._descend(trajectories, data, whole, loss, temperature, fresh)
        if self._regression is None or self.head is None or not whole.valid.any():
            return metrics
        for _ in range(self._steps_per_batch):
            metrics["value_loss"] = self.head.fit(self._regression, self._value_clip(), self._workers)
        return metrics

    def _loss(self, data: Batch, whole: Whole, temperature: float) -> Loss:
        if self.head is None:  # A-LoL against the others' mean
            others = baselines.leave_one_out(whole.credit, whole.valid, [0] * len(whole.credit))
            return self._token_loss(data, baselines.advantage(whole.credit, others, whole.valid)[whole.own])
        if self.name == "bi-level-gae" or self.options.get("credit") == "gae":
            return self._token_loss(data, self._per_token(data, whole, self.head), per_token=True)
        return self._token_loss(data, self._per_turn(data, whole, self.head))

    def _per_turn(self, data: Batch, whole: Whole, head: ValueHead) -> Array:
        """Return c_t − V_t [B, n] with V_t at the reply's first token; V_t is to regress c_t."""
        trained, n = trained_tokens(data), data.valid.shape[1]
        first = turn_bounds(trained, data.turn_index, n)[0]
        rows, turns = (first >= 0).nonzero(as_tuple=True)
        mask = torch.zeros_like(trained)
        mask[rows, first[rows, turns]] = True  # in the order of turns, which is that of tokens
        hidden = self._measure(data, states(self.policy), mask)
        values = head(hidden).detach().cpu().double()
        targets = torch.from_numpy(whole.credit[whole.own])[rows, turns]
        self._regression = Regression(hidden, targets, values)
        advantage = torch.zeros(data.valid.shape, dtype=torch.float64)
        advantage[rows, turns] = self._whitened(targets - values)
        return np.asarray(advantage)

    def _per_token(self, data: Batch, whole: Whole, head: ValueHead) -> Array:
        """Return GAE's advantages [B, L]; for PPO, a conversation that was cut goes on with its last value."""
        trained, o = trained_tokens(data), self.options
        hidden = self._measure(data, states(self.policy), trained)
        values = head(hidden).detach().cpu().double()
        spread = torch.zeros(trained.shape, dtype=torch.float64).masked_scatter(trained, values)
        rewards, factors = torch.from_numpy(data.rewards), {"discount": o["token_discount"], "lam": o["lam"]}
        if self.name == "bi-level-gae":
            targets = torch.from_numpy(whole.credit[whole.own]) if o["credit"] == "class" else None
            arrays = (rewards, spread, data.token_mask, data.turn_index, torch.from_numpy(data.valid))
            found = alt.bi_level_gae(*arrays, turn_discount=self._discount, turn_targets=targets, **factors)
        else:
            last = (torch.tensor(last_trained(trained)) - 1).clamp(min=0)  # the head is fitted there; after it, nowhere
            coming = torch.where(torch.tensor(self._cut), spread[torch.arange(len(last)), last], 0.0)
            at_ends = alt.at_turn_ends(rewards, trained, data.turn_index)
            found = alt.gae(at_ends, spread, trained, bootstrap=coming, **factors)
        self._regression = Regression(hidden, found.target[trained], values)
        advantage = torch.zeros(trained.shape, dtype=torch.float64)
        return np.asarray(advantage.masked_scatter(trained, self._whitened(found.advantage[trained])))

    def _whitened(self, own: Tensor) -> Tensor:
        """Return this process's advantages [N], whitened over those of all where the options say so."""
        if not self.options.get("whiten"):
            return own
        parts = self._workers.gather([own])
        before = sum(len(part) for part in parts[: self._workers.rank])
        everything = torch.cat(parts)[None]
        return alt.whiten(everything, torch.ones_like(everything, dtype=torch.bool))[0, before : before + len(own)]

    def _try_options(self) -> None:
        super()._try_options()
        for name in ("lam", "token_discount"):
            if not 0 <= self.options.get(name, 1.0) <= 1:
                raise ValueError(f"{self.name!r}: expected {name} in [0, 1], got {self.options[name]}")
        if self.options.get("value_clip", 0.0) < 0:
            raise ValueError(f"{self.name!r}: expected value_clip >= 0 (0 for none), got {self.options['value_clip']}")

    def _value_clip(self) -> float | None:
        clip = self.options["value_clip"]
        return float(clip) if clip else None

    def _refers(self) -> bool:
        return super()._refers() or self.options.get("variant", "reference_free") != "reference_free"
