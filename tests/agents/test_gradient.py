"""The expected gradient of the real code path, against enumeration on a small tabular MDP, in float64.

Every trajectory of the MDP is one conversation of a batch, its credit weighted by its probability, so that
the gradient of the batch is the expectation. The reference side enumerates again, with sets R_t written out
and the softmax score in closed form; it shares no code with the package.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from ppg_agents import baselines
from ppg_agents import credit as c
from ppg_agents.losses import batch_units, partial_policy_gradient
from ppg_agents.missing import Baseline, Credits

Array = NDArray[np.float64]
TOLERANCE = 1e-10


@dataclass(frozen=True)
class MDP:
    """A random MDP; with ``ends``, entering the last state ends the conversation."""

    start: Array  # [S]
    transition: Array  # [S, A, S]
    reward: Array  # [n, S, A], in [0, 1]
    theta: Array  # logits [n, S, A], or [1, S, A] for a policy that does not see the turn
    ends: bool

    @property
    def policy(self) -> Array:
        unnormalised = np.exp(self.theta)
        probabilities = unnormalised / unnormalised.sum(-1, keepdims=True)
        return np.broadcast_to(probabilities, self.reward.shape)


def make_mdp(
    seed: int = 0, n: int = 4, states: int = 3, actions: int = 2, ends: bool = False, by_turn: bool = True
) -> MDP:
    rng = np.random.default_rng(seed)
    start = rng.dirichlet(np.ones(states - ends))
    return MDP(
        np.append(start, 0.0) if ends else start,
        rng.dirichlet(np.ones(states), (states, actions)),
        rng.random((n, states, actions)),
        rng.normal(size=(n if by_turn else 1, states, actions)),
        ends,
    )


@dataclass(frozen=True)
class Rollouts:
    """All trajectories [B, n]; what stands after the end is rubbish that ``valid`` masks."""

    states: NDArray[np.int64]
    actions: NDArray[np.int64]
    rewards: Array
    valid: c.Mask
    probability: Array  # [B]


def all_rollouts(mdp: MDP) -> Rollouts:
    n, states, actions = mdp.reward.shape
    found: list[tuple[list[tuple[int, int]], float]] = []

    def walk(path: list[tuple[int, int]], probability: float, following: Array) -> None:
        if len(path) == n:
            found.append((path, probability))
            return
        for s in range(states):
            if mdp.ends and s == states - 1:
                if path and following[s]:
                    found.append((path, probability * following[s]))
                continue
            for a in range(actions):
                p = following[s] * mdp.policy[len(path), s, a]
                walk([*path, (s, a)], probability * p, mdp.transition[s, a])

    walk([], 1.0, mdp.start)
    size = len(found)
    s, a = np.zeros((size, n), np.int64), np.zeros((size, n), np.int64)
    rewards, valid = np.full((size, n), np.nan), np.zeros((size, n), bool)
    for b, (path, _) in enumerate(found):
        for t, (state, action) in enumerate(path):
            s[b, t], a[b, t], valid[b, t] = state, action, True
            rewards[b, t] = mdp.reward[t, state, action]
    return Rollouts(s, a, rewards, valid, np.array([probability for _, probability in found]))


def batch_gradient(mdp: MDP, rollouts: Rollouts, credit: Array, micro_batches: int = 1, pad_tokens: int = 0) -> Array:
    """Return the gradient on a batch with this credit: token 2t is the partner's, 2t+1 the policy's."""
    theta = torch.tensor(mdp.theta, requires_grad=True)
    table = torch.log_softmax(theta, -1).expand(mdp.reward.shape)
    size, n = rollouts.valid.shape
    turn = torch.arange(n).expand(size, n)
    length = 2 * n + pad_tokens
    log_probs = torch.full((size, length), torch.nan, dtype=torch.float64)
    played = np.minimum(np.arange(n), len(mdp.reward) - 1)
    log_probs[:, 1 : 2 * n : 2] = table[played, rollouts.states, rollouts.actions]
    token_mask = torch.zeros(size, length, dtype=torch.bool)
    token_mask[:, 1 : 2 * n : 2] = torch.from_numpy(rollouts.valid)
    turn_index = torch.full((size, length), -1)
    turn_index[:, 1 : 2 * n : 2] = turn
    whole = batch_units(token_mask, turn_index, "sum")
    loss = torch.zeros((), dtype=torch.float64)
    for rows in torch.arange(size).tensor_split(micro_batches):
        loss = loss + partial_policy_gradient(
            log_probs[rows],
            token_mask[rows],
            turn_index[rows],
            torch.from_numpy(credit)[rows],
            batch_size=whole,
        )
    (gradient,) = torch.autograd.grad(-loss, theta)
    return gradient.numpy()


def expected_gradient(mdp: MDP, mask: c.Mask, discount: float = 1.0, baseline: Array | float = 0.0) -> Array:
    rollouts = all_rollouts(mdp)
    credit = c.credit(rollouts.rewards, mask, rollouts.valid, discount)
    adv = np.where(rollouts.valid, credit - baseline, 0.0)
    return batch_gradient(mdp, rollouts, adv * rollouts.probability[:, None] * len(credit))


def enumerated_gradient(mdp: MDP, reward_sets: list[set[int]], discount: float = 1.0) -> Array:
    """Σ over paths of P(path) Σ_t ∇ log π(a_t | s_t) Σ_{ℓ ∈ R_t} γ^(ℓ−t) r_ℓ, by brute force."""
    n, states, actions = mdp.reward.shape
    gradient = np.zeros(mdp.theta.shape)
    for path in itertools.product(itertools.product(range(states), range(actions)), repeat=n):
        probability, length = 1.0, n
        for t, (s, a) in enumerate(path):
            arrive = mdp.start if t == 0 else mdp.transition[path[t - 1]]
            if length < n:  # after the end there is one continuation only
                probability *= (s, a) == (0, 0)
            elif mdp.ends and s == states - 1:
                probability *= arrive[s] * (a == 0)
                length = t
            else:
                probability *= arrive[s] * mdp.policy[t, s, a]
        if probability == 0:
            continue
        for t, (s, a) in enumerate(path[:length]):
            score = np.eye(actions)[a] - mdp.policy[t, s]
            ret = sum(discount ** (ell - t) * mdp.reward[ell][path[ell]] for ell in reward_sets[t] if ell < length)
            gradient[t if len(gradient) > 1 else 0, s] += probability * ret * score
    return gradient


CUSTOM = [[True, False, True, False], [False, False, True, True], [False] * 4, [False, False, False, True]]
CLASSES: dict[str, tuple[c.Mask, list[set[int]]]] = {
    "full": (c.full(4), [{0, 1, 2, 3}, {1, 2, 3}, {2, 3}, {3}]),
    "greedy": (c.greedy(4), [{0}, {1}, {2}, {3}]),
    "2-step": (c.k_step(4, 2), [{0, 1}, {1, 2}, {2, 3}, {3}]),
    "3-step": (c.k_step(4, 3), [{0, 1, 2}, {1, 2, 3}, {2, 3}, {3}]),
    "segment": (c.segment(4, [1, 3]), [{0}, {1, 2, 3}, {2, 3}, {3}]),
    "custom": (c.PolicyClass.parse(CUSTOM).mask(4), [{0, 2}, {2, 3}, set(), {3}]),
}


@pytest.mark.parametrize("by_turn", [True, False], ids=["policy(turn,state)", "policy(state)"])
@pytest.mark.parametrize("ends", [False, True], ids=["fixed-length", "policy-ends"])
@pytest.mark.parametrize("discount", [1.0, 0.7])
@pytest.mark.parametrize("name", CLASSES)
def test_expected_gradient_equals_enumeration(name: str, discount: float, ends: bool, by_turn: bool) -> None:
    mdp = make_mdp(seed=len(name), ends=ends, by_turn=by_turn)
    mask, reward_sets = CLASSES[name]
    got = expected_gradient(mdp, mask, discount)
    assert np.abs(got).max() > 1e-3
    np.testing.assert_allclose(got, enumerated_gradient(mdp, reward_sets, discount), rtol=0, atol=TOLERANCE)


def exact_gradient(mdp: MDP, objective: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Array:
    """Differentiate Σ_t objective(occupancy of states, expected reward in each) by dynamic programming."""
    theta = torch.tensor(mdp.theta, requires_grad=True)
    policy = torch.softmax(theta, -1).expand(mdp.reward.shape)
    alive = torch.tensor([1.0] * (len(mdp.start) - mdp.ends) + [0.0] * mdp.ends, dtype=torch.float64)
    occupancy, value = torch.tensor(mdp.start), torch.zeros((), dtype=torch.float64)
    for t, reward in enumerate(torch.tensor(mdp.reward)):
        value = value + objective(occupancy, (policy[t] * reward).sum(-1))
        occupancy = alive * torch.einsum("s,sa,sap->p", occupancy, policy[t], torch.tensor(mdp.transition))
    (gradient,) = torch.autograd.grad(value, theta)
    return gradient.numpy()


@pytest.mark.parametrize("ends", [False, True], ids=["fixed-length", "policy-ends"])
def test_full_planning_is_the_gradient_of_the_value(ends: bool) -> None:
    mdp = make_mdp(seed=1, ends=ends)
    exact = exact_gradient(mdp, lambda occupancy, reward: (occupancy * reward).sum())
    np.testing.assert_allclose(expected_gradient(mdp, c.full(4)), exact, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("ends", [False, True], ids=["fixed-length", "policy-ends"])
def test_greedy_is_one_bandit_per_turn(ends: bool) -> None:
    mdp = make_mdp(seed=2, ends=ends)
    exact = exact_gradient(mdp, lambda occupancy, reward: (occupancy.detach() * reward).sum())
    np.testing.assert_allclose(expected_gradient(mdp, c.greedy(4)), exact, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (c.k_step(4, 4), c.full(4)),
        (c.k_step(4, 9), c.full(4)),
        (c.segment(4, [4]), c.full(4)),
        (c.k_step(4, 1), c.greedy(4)),
        (c.segment(4, [1] * 4), c.greedy(4)),
    ],
)
def test_equal_classes_have_equal_gradients(one: c.Mask, other: c.Mask) -> None:
    mdp = make_mdp(seed=3)
    np.testing.assert_array_equal(expected_gradient(mdp, one), expected_gradient(mdp, other))


SMALL = make_mdp(seed=4, n=3, states=2)
SMALL_ROLLOUTS = all_rollouts(SMALL)


@given(
    judged=hnp.arrays(bool, (64, 3)),
    rubbish=hnp.arrays(float, (64, 3), elements=st.floats(allow_nan=True, allow_infinity=True)),
    k=st.integers(1, 3),
)
def test_a_masked_turn_leaves_the_gradient_unchanged_whatever_its_reward(
    judged: c.Mask, rubbish: Array, k: int
) -> None:
    rollouts, mask = SMALL_ROLLOUTS, c.k_step(3, k)
    zero = c.credit(np.where(judged, rollouts.rewards, 0.0), mask, judged)
    any_reward = c.credit(np.where(judged, rollouts.rewards, rubbish), mask, judged)
    gradient = batch_gradient(SMALL, rollouts, any_reward)
    np.testing.assert_array_equal(gradient, batch_gradient(SMALL, rollouts, zero))
    tokens_too = Rollouts(
        rollouts.states, rollouts.actions, rollouts.rewards, judged & rollouts.valid, rollouts.probability
    )
    np.testing.assert_allclose(batch_gradient(SMALL, tokens_too, zero), gradient, rtol=0, atol=1e-14)


def test_padding_and_micro_batches_change_nothing() -> None:
    mdp = make_mdp(seed=5, ends=True)
    rollouts = all_rollouts(mdp)
    credit = c.credit(rollouts.rewards, c.k_step(4, 3), rollouts.valid)
    gradient = batch_gradient(mdp, rollouts, credit)
    for micro_batches, pad_tokens in [(7, 0), (1, 5), (len(credit), 3)]:
        again = batch_gradient(mdp, rollouts, credit, micro_batches, pad_tokens)
        np.testing.assert_allclose(again, gradient, rtol=0, atol=1e-13)
    columns = ((0, 0), (0, 2))
    padded = Rollouts(
        np.pad(rollouts.states, columns),
        np.pad(rollouts.actions, columns),
        np.pad(rollouts.rewards, columns, constant_values=np.nan),
        np.pad(rollouts.valid, columns),
        rollouts.probability,
    )
    longer = c.credit(padded.rewards, c.k_step(6, 3), padded.valid)
    np.testing.assert_allclose(batch_gradient(mdp, padded, longer), gradient, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", CLASSES)
def test_a_baseline_that_ignores_the_action_keeps_the_expected_gradient(name: str) -> None:
    mdp = make_mdp(seed=6, ends=True)
    mask, _ = CLASSES[name]
    expected = expected_gradient(mdp, mask)
    of_turn = np.array([0.3, -2.0, 5.0, 1.0])  # what a moving average is, seen from one batch
    of_state = np.random.default_rng(0).normal(size=3)[all_rollouts(mdp).states]
    for baseline in (of_turn, of_state):
        np.testing.assert_allclose(expected_gradient(mdp, mask, baseline=baseline), expected, rtol=0, atol=TOLERANCE)


def pair_gradient(mdp: MDP, mask: c.Mask, baseline: Baseline) -> Array:
    """Expected gradient of a batch of two, over all pairs; rows 2p and 2p+1 are pair p."""
    one = all_rollouts(mdp)
    size = len(one.probability)
    rows = np.array(list(itertools.product(range(size), repeat=2))).reshape(-1)
    pairs = Rollouts(one.states[rows], one.actions[rows], one.rewards[rows], one.valid[rows], one.probability[rows])
    probability = pairs.probability.reshape(-1, 2).prod(1).repeat(2)
    batches = zip(*(np.split(part, len(rows) // 2) for part in (pairs.rewards, pairs.valid)), strict=True)
    adv = [Credits(reward, valid, np.zeros_like(valid), mask).against(baseline) for reward, valid in batches]
    return batch_gradient(mdp, pairs, np.concatenate(adv) * probability[:, None] * len(rows) / 2)


@pytest.mark.parametrize("ends", [False, True], ids=["fixed-length", "policy-ends"])
def test_leave_one_out_is_unbiased(ends: bool) -> None:
    mdp = make_mdp(seed=7, n=2, states=2 + ends, ends=ends)
    got = pair_gradient(mdp, c.full(2), partial(baselines.leave_one_out, groups=["one", "one"]))
    np.testing.assert_allclose(got, expected_gradient(mdp, c.full(2)), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("ends", [False, True], ids=["fixed-length", "policy-ends"])
def test_batch_mean_shrinks_each_turn_by_its_own_factor(ends: bool) -> None:
    mdp = make_mdp(seed=8, n=2, states=2 + ends, ends=ends)
    rollouts = all_rollouts(mdp)
    reaches_turn_1 = float(rollouts.probability @ rollouts.valid[:, 1])
    assert (reaches_turn_1 < 0.9) == ends
    shrunk = pair_gradient(mdp, c.full(2), baselines.batch_mean)
    # 1 − 1/N is ½ with both conversations there, and 0 for the one that is there alone.
    factor = np.array([0.5, 0.5 * reaches_turn_1])[:, None, None]
    np.testing.assert_allclose(shrunk, factor * expected_gradient(mdp, c.full(2)), rtol=0, atol=TOLERANCE)
