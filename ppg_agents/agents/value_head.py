"""A value head and its advantages: PPO's GAE, bi-level GAE, and credit minus value per turn.

The head is linear on the last hidden state before a token, and learns from the states of the policy before the batch's
first step. Its loss never changes the policy's weights (ours; others share them), so the policy gradient is that of
the method's loss alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ppg_agents import alternatives as alt
from ppg_agents import baselines, losses
from ppg_agents.agents.gradient import Whole, last_trained, trained_tokens
from ppg_agents.agents.methods import Options
from ppg_agents.alternatives.tokens import turn_bounds
from ppg_agents.batch import Batch
from ppg_agents.distributed import Workers

FILE = "value_head.safetensors"


class ValueHead:
    """V = w · h + b of a hidden state h, in float32, initially zero; with its own AdamW.

    Attributes:
        weight: w [hidden].
        bias: b.
        optimizer: AdamW over both.
    """

    def __init__(self, size: int, learning_rate: float, device: torch.device) -> None:
        """Make a head whose values are 0.

        Raises:
            ValueError: The learning rate is not above 0.
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
        """Take one step towards the targets; return the loss before it, over all workers.

        Raises:
            FloatingPointError: The gradient is not finite.
        """
        total = workers.sum_number(float(len(regression.targets)))
        mask = torch.ones((1, len(regression.targets)), dtype=torch.bool, device=self.weight.device)
        arrays = (self(regression.hidden)[None], regression.targets[None].to(self.weight), mask)
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

        tensors = {"weight": self.weight.detach(), "bias": self.bias.detach()}
        for name, parameter in (("weight", self.weight), ("bias", self.bias)):
            moments = self.optimizer.state.get(parameter, {})
            tensors |= {f"{name}.{key}": tensor.contiguous() for key, tensor in moments.items()}
        save_file(tensors, path)

    def load(self, path: Path) -> None:
        """Load what `save` wrote.

        Raises:
            ValueError: The saved head has another size.
        """
        from safetensors.torch import load_file

        tensors = load_file(path)
        if tensors["weight"].shape != self.weight.shape:
            raise ValueError(
                f"expected a value head of {len(self.weight)} weights in {path}, got {len(tensors['weight'])}"
            )
        self.optimizer.state.clear()
        with torch.no_grad():
            for name, parameter in (("weight", self.weight), ("bias", self.bias)):
                parameter.copy_(tensors[name])
                moments = {k.partition(".")[2]: v for k, v in tensors.items() if k.startswith(f"{name}.")}
                if moments:
                    self.optimizer.state[parameter] = {
                        k: v if k == "step" else v.to(parameter.device) for k, v in moments.items()
                    }


@dataclass(frozen=True)
class Regression:
    """What a value head learns from a batch: N hidden states, targets G, and its values V° before the step."""

    hidden: Tensor
    targets: Tensor
    values: Tensor


@dataclass(frozen=True)
class Estimation:
    """What an advantage with a value is computed from.

    Attributes:
        batch: This process's conversations.
        whole: The batch of all processes.
        head: The value head; None if the options need none.
        states: ``mask [B, L] -> [N, hidden]``, the states that predict the tokens of the mask.
        discount: Discount per turn.
        cut: Which conversations were truncated.
        workers: The processes that learn together.
    """

    batch: Batch
    whole: Whole
    head: ValueHead | None
    states: Callable[[Tensor], Tensor]
    discount: float
    cut: Sequence[bool]
    workers: Workers


@dataclass(frozen=True)
class Critique:
    """The advantage of this process's conversations, per turn [B, n] or per token [B, L], and the head's regression."""

    advantage: Tensor
    per_token: bool
    regression: Regression | None = None


def gae(given: Estimation, options: Options) -> Critique:
    """Return PPO's advantage: GAE per token or, with ``credit = "class"``, the class's credit minus V per turn.

    A truncated conversation is bootstrapped with its last value.
    """
    if options["credit"] == "class":
        return per_turn(given, options)
    trained = trained_tokens(given.batch)
    hidden, values, spread = _token_values(given, trained)
    # The head is fitted at trained tokens only, so its value at the last of them stands in for what was cut off.
    last = (torch.tensor(last_trained(trained)) - 1).clamp(min=0)
    bootstrap = torch.where(torch.tensor(given.cut), spread[torch.arange(len(last)), last], 0.0)
    factors = {"discount": options["token_discount"], "lam": options["lam"]}

    def estimate(rewards: Tensor) -> Tensor:
        at_ends = alt.at_turn_ends(rewards, trained, given.batch.turn_index)
        return alt.gae(at_ends, spread, trained, bootstrap=bootstrap, **factors).advantage

    return _token_critique(given, options, trained, hidden, values, _of_what_was_seen(given, estimate))


def bi_level_gae(given: Estimation, options: Options) -> Critique:
    """Return bi-level GAE's advantage; with ``credit = "class"`` the class's credits are the turns' targets."""
    batch, trained = given.batch, trained_tokens(given.batch)
    hidden, values, spread = _token_values(given, trained)
    targets = torch.from_numpy(given.whole.credit[given.whole.own]) if options["credit"] == "class" else None
    valid = torch.from_numpy(batch.valid)

    def estimate(rewards: Tensor) -> Tensor:
        return alt.bi_level_gae(
            rewards,
            spread,
            batch.token_mask,
            batch.turn_index,
            valid,
            turn_discount=given.discount,
            turn_targets=targets,
            discount=options["token_discount"],
            lam=options["lam"],
        ).advantage

    return _token_critique(given, options, trained, hidden, values, _of_what_was_seen(given, estimate))


def per_turn(given: Estimation, options: Options) -> Critique:
    """Return c_t − V_t [B, n] with V_t at the reply's first token; V_t is fitted to c_t.

    Without a head, V_t is the mean credit of all other conversations at that turn.
    """
    batch, whole = given.batch, given.whole
    if given.head is None:
        others = partial(baselines.leave_one_out, groups=[0] * len(whole.valid))
        return Critique(torch.from_numpy(whole.credits.against(others)[whole.own]), per_token=False)
    trained, turns = trained_tokens(batch), batch.valid.shape[1]
    first = turn_bounds(trained, batch.turn_index, turns)[0]
    rows, columns = (first >= 0).nonzero(as_tuple=True)
    mask = torch.zeros_like(trained)
    mask[rows, first[rows, columns]] = True  # the order of turns is that of tokens
    hidden = given.states(mask)
    values = given.head(hidden).detach().cpu().double()
    targets = torch.from_numpy(whole.credit[whole.own])[rows, columns]
    spread = torch.zeros(batch.valid.shape, dtype=torch.float64)
    spread[rows, columns] = _whitened(given, options, targets - values)
    return Critique(spread, per_token=False, regression=Regression(hidden, targets, values))


def check_gae(options: Options, settings: Options) -> None:
    """Refuse a discount per turn together with credit per token.

    Raises:
        ValueError: Both are set.
    """
    if options["credit"] == "gae" and settings.get("discount", 1.0) != 1.0:
        raise ValueError(
            f"'ppo': expected discount = 1 with credit 'gae', got {settings['discount']}; "
            "set agent_options.token_discount, or agent_options.credit=class"
        )


def _token_values(given: Estimation, trained: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the trained tokens' states [N, hidden], their values [N], and the values laid out as [B, L]."""
    if given.head is None:
        raise ValueError("expected a value head for an advantage per token, got none")
    hidden = given.states(trained)
    values = given.head(hidden).detach().cpu().double()
    return hidden, values, torch.zeros(trained.shape, dtype=torch.float64).masked_scatter(trained, values)


def _token_critique(
    given: Estimation, options: Options, trained: Tensor, hidden: Tensor, values: Tensor, estimate: Tensor
) -> Critique:
    advantage = torch.zeros(trained.shape, dtype=torch.float64)
    advantage = advantage.masked_scatter(trained, _whitened(given, options, estimate[trained]))
    return Critique(advantage, per_token=True, regression=Regression(hidden, estimate[trained] + values, values))


def _of_what_was_seen(given: Estimation, estimate: Callable[[Tensor], Tensor]) -> Tensor:
    """Return an advantage [B, L] in which rewards that a fault took away are made up for, see `missing`.

    What a later reward counts differs from reply to reply then, and ``estimate`` takes one reward per turn. But it is
    linear in them: so each turn's reward is passed alone, as 1, and what it adds to a token is multiplied by what it
    counts for that token's reply.

    Args:
        given: The conversations.
        estimate: ``rewards [B, n] -> advantage [B, L]``.
    """
    valid, missing = given.batch.valid, given.whole.credits.missing
    if not missing.any():
        return estimate(torch.from_numpy(given.batch.rewards))
    counts = torch.from_numpy(given.whole.credits.pairs()[given.whole.own])  # [B, n of the reply, n of the reward]
    nothing = torch.zeros(valid.shape, dtype=torch.float64)
    without = total = estimate(nothing)
    n = valid.shape[1]
    latest = np.maximum.accumulate(np.where(valid, np.arange(n), -1), axis=1)  # a missing reward has no turn to end
    for reward in range(n):
        rows = np.flatnonzero(latest[:, reward] >= 0)
        alone = nothing.clone()
        alone[rows, latest[rows, reward]] = 1.0
        per_token = losses.broadcast_credit(counts[:, :, reward], trained_tokens(given.batch), given.batch.turn_index)
        total = total + (estimate(alone) - without) * per_token
    return total


def _whitened(given: Estimation, options: Options, advantages: Tensor) -> Tensor:
    """Return this process's advantages [N], whitened over those of all processes if the options say so."""
    if not options.get("whiten"):
        return advantages
    # Gather first: mean and deviation must be those of the whole batch, or every rank would whiten differently.
    parts = given.workers.gather([advantages])
    before = sum(len(part) for part in parts[: given.workers.rank])
    all_ranks = torch.cat(parts)[None]
    whitened = alt.whiten(all_ranks, torch.ones_like(all_ranks, dtype=torch.bool))
    return whitened[0, before : before + len(advantages)]
