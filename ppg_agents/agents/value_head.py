"""A value head and its advantages: PPO's GAE, bi-level GAE, and credit minus value per turn.

A value is the turn's mean return in the batch plus a linear function of how the last hidden state before a token
differs from the turn's mean state (ours). Returns fall with every turn and rise as the policy learns: a head that has
to follow both with its weights is worse than a constant per turn; like this it starts from that constant, and learns
what the state says beyond it. The batch's own mean scales advantages by 1 − 1/B per turn, as the baseline
``batch-mean`` does. The head learns from the states of the policy before the batch's first step. Its loss never changes
the policy's weights (ours; others share them), so the policy gradient is that of the method's loss alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
    """V = b_t + w · x for features x of turn t (see `Anchored`), in float32; w is zero at first, with its own AdamW.

    Attributes:
        weight: w [hidden].
        intercepts: b [n], each turn's mean return when it was last known, float64; 0 before.
        optimizer: AdamW over w.
    """

    def __init__(self, size: int, learning_rate: float, device: torch.device) -> None:
        """Make a head whose values are the turns' means.

        Raises:
            ValueError: The learning rate is not above 0.
        """
        if not 0 < learning_rate < float("inf"):
            raise ValueError(f"expected value_learning_rate > 0, got {learning_rate}")
        self.weight = torch.nn.Parameter(torch.zeros(size, device=device))
        self.intercepts = torch.zeros(0, dtype=torch.float64)
        self.optimizer = torch.optim.AdamW([self.weight], lr=learning_rate, weight_decay=0.0)

    def __call__(self, features: Tensor) -> Tensor:
        """Return w · x [N] of features [N, hidden]."""
        return features.to(self.weight) @ self.weight

    def fit(self, regression: Regression, clip: float | None, epochs: int, workers: Workers) -> float:
        """Take a step per epoch towards the targets; return the loss before the last, over all workers.

        Raises:
            FloatingPointError: The gradient is not finite.
        """
        total = workers.sum_number(float(len(regression.targets)))
        mask = torch.ones((1, len(regression.targets)), dtype=torch.bool, device=self.weight.device)
        old = regression.values[None].to(self.weight) if clip is not None else None
        before = 0.0
        for _ in range(epochs):
            arrays = (self(regression.features)[None], regression.targets[None].to(self.weight), mask)
            loss = alt.value_loss(*arrays, old_values=old, clip=clip).sum() / max(total, 1.0)
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            workers.sum_gradients([self.weight])
            if self.weight.grad is not None and not bool(self.weight.grad.isfinite().all()):
                raise FloatingPointError("expected a finite gradient of the value head; lower value_learning_rate")
            self.optimizer.step()
            before = workers.sum_number(float(loss.detach()))
        return before

    def save(self, path: Path) -> None:
        """Write weights, moments and intercepts."""
        from safetensors.torch import save_file

        moments = self.optimizer.state.get(self.weight, {})
        tensors = {"weight": self.weight.detach(), "intercepts": self.intercepts}
        save_file(tensors | {f"weight.{key}": tensor.contiguous() for key, tensor in moments.items()}, path)

    def load(self, path: Path) -> None:
        """Load what `save` wrote.

        Raises:
            ValueError: The saved head has another size, or no intercepts.
        """
        from safetensors.torch import load_file

        tensors = load_file(path)
        if tensors["weight"].shape != self.weight.shape or "intercepts" not in tensors:
            raise ValueError(
                f"expected a value head of {len(self.weight)} weights and its intercepts in {path}, got "
                f"{', '.join(f'{name} {list(tensor.shape)}' for name, tensor in tensors.items())}; begin a new run"
            )
        self.optimizer.state.clear()
        moments = {k.partition(".")[2]: v for k, v in tensors.items() if k.startswith("weight.")}
        with torch.no_grad():
            self.weight.copy_(tensors["weight"])
        self.intercepts = tensors["intercepts"]
        if moments:
            on_device = {k: v if k == "step" else v.to(self.weight.device) for k, v in moments.items()}
            self.optimizer.state[self.weight] = on_device


@dataclass(frozen=True)
class Regression:
    """What a value head learns from a batch: N features, targets G − b_t, and its values V° − b_t before the step."""

    features: Tensor
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
    """The advantage of this process's conversations, per turn [B, n] or per token [B, L].

    With a head also its regression, and ``metrics`` that say how good it is.
    """

    advantage: Tensor
    per_token: bool
    regression: Regression | None = None
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Anchored:
    """A batch's values, around the means of its turns; N entries of this process, each a token or a turn.

    Attributes:
        features: x [N, hidden]: the states less their turn's mean over all processes, divided by hidden times the root
            mean square of an entry, so that one step of AdamW changes a value by about the learning rate at most,
            whatever the model.
        intercept: b_t [N]; the last known one for a turn that a single conversation reached.
        values: V [N].
        metrics: ``explained_variance`` of the values, 1 − Σ(G − V)²/Σ(G − mean G)², and of the turns' means as
            ``explained_variance_constant``; over all processes, of the returns G that were seen. NaN if they are equal.
    """

    features: Tensor
    intercept: Tensor
    values: Tensor
    metrics: dict[str, float]


def gae(given: Estimation, options: Options) -> Critique:
    """Return PPO's advantage: GAE per token or, with ``credit = "class"``, the class's credit minus V per turn.

    A truncated conversation is bootstrapped with its last value.
    """
    if options["credit"] == "class":
        return per_turn(given, options)
    trained = trained_tokens(given.batch)
    # The head is fitted at trained tokens only, so its value at the last of them stands in for what was cut off.
    last = (torch.tensor(last_trained(trained)) - 1).clamp(min=0)

    def estimate(rewards: Tensor, values: Tensor, lam: float) -> Tensor:
        at_ends = alt.at_turn_ends(rewards, trained, given.batch.turn_index)
        bootstrap = torch.where(torch.tensor(given.cut), values[torch.arange(len(last)), last], 0.0)
        factors = {"discount": options["token_discount"], "lam": lam}
        return alt.gae(at_ends, values, trained, bootstrap=bootstrap, **factors).advantage

    return _token_critique(given, options, trained, estimate)


def bi_level_gae(given: Estimation, options: Options) -> Critique:
    """Return bi-level GAE's advantage; with ``credit = "class"`` the class's credits are the turns' targets."""
    batch, trained = given.batch, trained_tokens(given.batch)
    targets = torch.from_numpy(given.whole.credit[given.whole.own]) if options["credit"] == "class" else None
    valid = torch.from_numpy(batch.valid)

    def estimate(rewards: Tensor, values: Tensor, lam: float) -> Tensor:
        return alt.bi_level_gae(
            rewards,
            values,
            batch.token_mask,
            batch.turn_index,
            valid,
            turn_discount=given.discount,
            turn_targets=targets,
            discount=options["token_discount"],
            lam=lam,
        ).advantage

    return _token_critique(given, options, trained, estimate)


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
    targets = torch.from_numpy(whole.credit[whole.own])[rows, columns]
    around = _anchor(given, given.head, mask, targets)
    spread = torch.zeros(batch.valid.shape, dtype=torch.float64)
    spread[rows, columns] = _whitened(given, options, targets - around.values)
    regression = Regression(around.features, targets - around.intercept, around.values - around.intercept)
    return Critique(spread, per_token=False, regression=regression, metrics=around.metrics)


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


def _token_critique(
    given: Estimation, options: Options, trained: Tensor, estimate: Callable[[Tensor, Tensor, float], Tensor]
) -> Critique:
    """Return the critique of an advantage per token.

    Args:
        given: What it is computed from.
        options: The method's.
        trained: [B, L], N tokens.
        estimate: ``(rewards [B, n], values [B, L], lam) -> advantage [B, L]``.
    """
    if given.head is None:
        raise ValueError("expected a value head for an advantage per token, got none")
    nothing = torch.zeros(trained.shape, dtype=torch.float64)
    returns = _of_what_was_seen(given, lambda rewards: estimate(rewards, nothing, 1.0))[trained]
    around = _anchor(given, given.head, trained, returns)
    values = nothing.masked_scatter(trained, around.values)
    found = _of_what_was_seen(given, lambda rewards: estimate(rewards, values, options["lam"]))[trained]
    advantage = nothing.masked_scatter(trained, _whitened(given, options, found))
    targets = found + around.values - around.intercept
    regression = Regression(around.features, targets, around.values - around.intercept)
    return Critique(advantage, per_token=True, regression=regression, metrics=around.metrics)


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


def _anchor(given: Estimation, head: ValueHead, mask: Tensor, returns: Tensor) -> Anchored:
    """Return the values of the N tokens of a mask, given the returns G [N] that were seen after them."""
    turn_index, n = given.batch.turn_index, given.batch.valid.shape[1]
    hidden, turn = given.states(mask), turn_index[mask]
    place = turn.to(hidden.device)
    members = torch.nn.functional.one_hot(place, n).T.double()  # [n, N]; a product with it adds up by turn
    reached = torch.stack([(mask & (turn_index == t)).any(1).sum() for t in range(n)]).double()
    wide = hidden.double()
    own = (members.sum(1), members.cpu() @ returns, members @ wide, wide.square().sum())
    parts = given.workers.gather([(reached, *(part.cpu() for part in own))])
    conversations, entries, sums, states, square = (torch.stack(part).sum(0) for part in zip(*parts, strict=True))
    count = entries.clamp(min=1.0)
    mean_return, mean_state = sums / count, states / count[:, None]

    # A lone conversation's own mean is its return, which would leave it nothing to learn from: keep the last known one.
    known = torch.cat([head.intercepts, torch.zeros(max(0, n - len(head.intercepts)), dtype=torch.float64)])
    known[:n] = torch.where(conversations > 1, mean_return, known[:n])
    head.intercepts = known
    variance = float(square - (count * mean_state.square().sum(1)).sum()) / (float(count.sum()) * hidden.shape[1])
    scale = variance**-0.5 / hidden.shape[1] if variance > 0 else 0.0
    features = (hidden - mean_state.to(hidden)[place]) * scale
    values = known[turn] + head(features).detach().cpu().double()

    errors = ((returns - values).square().sum(), (returns - mean_return[turn]).square().sum())
    seen = (returns.sum(), returns.square().sum(), torch.tensor(len(returns)))
    parts = given.workers.gather([torch.stack([part.double() for part in (*errors, *seen)])])
    missed, unexplained, total, squares, number = torch.stack(parts).sum(0).tolist()
    spread = squares - total**2 / max(number, 1.0)
    compared = {"explained_variance": missed, "explained_variance_constant": unexplained}
    metrics = {name: 1 - error / spread if spread > 1e-12 * squares else math.nan for name, error in compared.items()}
    return Anchored(features, known[turn], values, metrics)


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
