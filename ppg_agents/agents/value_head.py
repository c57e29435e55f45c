"""A value head, and the advantages against it: PPO's GAE, bi-level GAE, and the credit less the value, turn by turn.

The head is linear on the last hidden state before a token, and learns from states that the policy had before the
batch's first step: its loss never changes the policy's weights (ours; others share them), so that the policy gradient
is that of the method's loss alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ppg_agents import alternatives as alt
from ppg_agents import baselines
from ppg_agents.agents.gradient import Whole, last_trained, trained_tokens
from ppg_agents.agents.methods import Options
from ppg_agents.alternatives.tokens import turn_bounds
from ppg_agents.batch import Batch
from ppg_agents.distributed import Workers

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


@dataclass(frozen=True)
class Estimation:
    """What an advantage against a value is made from.

    Attributes:
        batch: This process's conversations.
        whole: The batch of all processes.
        head: The value head; None where the options do without.
        states: ``mask [B, L] -> [N, hidden]``, the states that the selected tokens are predicted from.
        discount: Per turn.
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
    """An advantage of this process's conversations, per turn [B, n] or per token [B, L], and what the head learns."""

    advantage: Tensor
    per_token: bool
    regression: Regression | None = None


def gae(given: Estimation, options: Options) -> Critique:
    """Return PPO's advantage: GAE token by token or, with ``credit = "class"``, the class's credit less V per turn.

    A conversation that was cut goes on with its last value.
    """
    if options["credit"] == "class":
        return per_turn(given, options)
    trained = trained_tokens(given.batch)
    hidden, values, spread = _token_values(given, trained)
    rewards = torch.from_numpy(given.batch.rewards)
    # The head is fitted at the last trained token and nowhere after it, so its value there stands for what was cut off.
    last = (torch.tensor(last_trained(trained)) - 1).clamp(min=0)
    coming = torch.where(torch.tensor(given.cut), spread[torch.arange(len(last)), last], 0.0)
    at_ends = alt.at_turn_ends(rewards, trained, given.batch.turn_index)
    factors = {"discount": options["token_discount"], "lam": options["lam"]}
    estimate = alt.gae(at_ends, spread, trained, bootstrap=coming, **factors)
    return _token_critique(given, options, trained, hidden, values, estimate)


def bi_level_gae(given: Estimation, options: Options) -> Critique:
    """Return bi-level GAE's advantage; with ``credit = "class"`` the turns' targets are the class's credit."""
    batch, trained = given.batch, trained_tokens(given.batch)
    hidden, values, spread = _token_values(given, trained)
    targets = torch.from_numpy(given.whole.credit[given.whole.own]) if options["credit"] == "class" else None
    rewards, valid = torch.from_numpy(batch.rewards), torch.from_numpy(batch.valid)
    estimate = alt.bi_level_gae(
        rewards,
        spread,
        batch.token_mask,
        batch.turn_index,
        valid,
        turn_discount=given.discount,
        turn_targets=targets,
        discount=options["token_discount"],
        lam=options["lam"],
    )
    return _token_critique(given, options, trained, hidden, values, estimate)


def per_turn(given: Estimation, options: Options) -> Critique:
    """Return c_t − V_t [B, n] with V_t at the reply's first token; V_t is to regress c_t.

    Without a head, V_t is the mean credit of all other conversations at that turn.
    """
    batch, whole = given.batch, given.whole
    if given.head is None:
        others = baselines.leave_one_out(whole.credit, whole.valid, [0] * len(whole.credit))
        advantage = baselines.advantage(whole.credit, others, whole.valid)[whole.own]
        return Critique(torch.from_numpy(advantage), per_token=False)
    trained, turns = trained_tokens(batch), batch.valid.shape[1]
    first = turn_bounds(trained, batch.turn_index, turns)[0]
    rows, columns = (first >= 0).nonzero(as_tuple=True)
    mask = torch.zeros_like(trained)
    mask[rows, first[rows, columns]] = True  # in the order of turns, which is that of tokens
    hidden = given.states(mask)
    values = given.head(hidden).detach().cpu().double()
    targets = torch.from_numpy(whole.credit[whole.own])[rows, columns]
    spread = torch.zeros(batch.valid.shape, dtype=torch.float64)
    spread[rows, columns] = _whitened(given, options, targets - values)
    return Critique(spread, per_token=False, regression=Regression(hidden, targets, values))


def check_gae(options: Options, settings: Options) -> None:
    """Refuse a discount per turn where credit is formed token by token.

    Raises:
        ValueError: Both are asked for.
    """
    if options["credit"] == "gae" and settings.get("discount", 1.0) != 1.0:
        raise ValueError(
            f"'ppo': expected discount = 1 with credit 'gae', got {settings['discount']}; "
            "set agent_options.token_discount, or agent_options.credit=class"
        )


def _token_values(given: Estimation, trained: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the states of the trained tokens [N, hidden], their values [N], and those laid out [B, L]."""
    if given.head is None:
        raise ValueError("expected a value head for an advantage per token, got none")
    hidden = given.states(trained)
    values = given.head(hidden).detach().cpu().double()
    return hidden, values, torch.zeros(trained.shape, dtype=torch.float64).masked_scatter(trained, values)


def _token_critique(
    given: Estimation, options: Options, trained: Tensor, hidden: Tensor, values: Tensor, estimate: alt.GAE
) -> Critique:
    advantage = torch.zeros(trained.shape, dtype=torch.float64)
    advantage = advantage.masked_scatter(trained, _whitened(given, options, estimate.advantage[trained]))
    return Critique(advantage, per_token=True, regression=Regression(hidden, estimate.target[trained], values))


def _whitened(given: Estimation, options: Options, advantages: Tensor) -> Tensor:
    """Return this process's advantages [N], whitened over those of all processes where the options say so."""
    if not options.get("whiten"):
        return advantages
    parts = given.workers.gather([advantages])
    before = sum(len(part) for part in parts[: given.workers.rank])
    everything = torch.cat(parts)[None]
    whitened = alt.whiten(everything, torch.ones_like(everything, dtype=torch.bool))
    return whitened[0, before : before + len(advantages)]
