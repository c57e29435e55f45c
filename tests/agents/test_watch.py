"""What training writes down about the policy, and the settings of the step: entropy, divergences, clipping, spread."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ppg_agents import credit
from ppg_agents.agents.gradient import trained_tokens
from ppg_agents.agents.learner import Learner
from ppg_agents.agents.methods import METHODS
from ppg_agents.agents.watch import watch
from ppg_agents.batch import batch
from ppg_agents.building import learning_rate
from ppg_agents.config import settings as configs
from ppg_agents.policy import Policy
from ppg_agents.rollout.metrics import reply_lengths
from ppg_agents.runs.curve import watched_points
from ppg_agents.terminal.progress import status
from ppg_agents.trajectory import Trajectory
from tests.agents.test_alternative_agents import FULL, sampled
from tests.agents.test_alternative_agents import played as random_words

Make = Callable[..., Policy]
TURNS = [3, 2, 2, 3]


def learner(policy: Policy, **options: Any) -> Learner:
    return Learner(policy, credit.full, **{"learning_rate": 0.0, "max_grad_norm": 1e9, "baseline": "none", **options})


def flat_gradient(policy: Policy) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


def all_log_probs(policy: Policy, trajectory: Trajectory) -> torch.Tensor:
    """Return the whole next-token distributions [tokens, vocab] of a conversation's trained tokens, by the model."""
    ids = trajectory.token_ids()
    logits = policy.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    places = [
        i
        for turn, s in zip(trajectory.turns, trajectory.spans(), strict=True)
        for i in range(s.start, s.end)
        if math.isfinite(turn.reward)
    ]
    return logits[[i - 1 for i in places]]


def test_entropy_and_divergence_from_the_reference_are_those_of_the_enumerated_distributions(make_policy: Make) -> None:
    policy = make_policy(dtype=torch.float64)
    trajectories = random_words(policy, TURNS)
    unjudged = replace(trajectories[0].turns[1], reward=math.nan)
    trajectories[0] = replace(trajectories[0], turns=(trajectories[0].turns[0], unjudged, *trajectories[0].turns[2:]))
    metrics = learner(policy, micro_batch_tokens=40).learn(trajectories)

    distributions = torch.cat([all_log_probs(policy, t) for t in trajectories])
    exact = float(-(distributions.exp() * distributions).sum(-1).mean().detach())
    assert metrics["entropy"] == pytest.approx(exact, abs=1e-5)
    assert metrics["kl_sampler"] == pytest.approx(0.0, abs=1e-9)
    data = batch(trajectories, policy.pad_id)
    mask = trained_tokens(data)
    arrays = (data.ids, data.attention, mask)
    with torch.no_grad():
        log_ratio = (policy.reference_log_probs(*arrays) - policy.log_probs(*arrays))[mask]
    assert metrics["kl_reference"] == pytest.approx(float((log_ratio.exp() - 1 - log_ratio).mean()), rel=1e-6)
    assert metrics["kl_reference"] > 0.01


def test_the_divergence_from_the_sampler_averages_to_the_exact_one() -> None:
    """Over tokens drawn from q, the mean of w − 1 − log w is KL(q ‖ p); outcomes appear as often as q says."""
    q, p = torch.tensor([0.5, 0.25, 0.25]).double(), torch.tensor([0.2, 0.2, 0.6]).double()
    tokens = torch.tensor([[0, 0, 1, 2]])  # half zeros, a quarter each of the others
    mask = torch.ones((1, 4), dtype=torch.bool)
    watched = watch(p.log()[tokens], q.log()[tokens], mask, None, None)
    assert watched.metrics() == {"kl_sampler": pytest.approx(float((q * (q / p).log()).sum()))}


@pytest.mark.parametrize("aggregation", ["sum", "token_mean", "turn_mean"])
def test_the_bonus_s_gradient_is_that_of_the_enumerated_entropy(make_policy: Make, aggregation: str) -> None:
    policy, coefficient = make_policy(dtype=torch.float64), 0.3
    trajectories = random_words(policy, TURNS)
    parts = {}
    for value in (0.0, coefficient):
        policy.version = 0
        options = {"aggregation": aggregation, "micro_batch_tokens": 40, "entropy_coefficient": value}
        learner(policy, **options).learn(trajectories)
        parts[value] = flat_gradient(policy)

    total = torch.zeros((), dtype=torch.float64)
    for trajectory in trajectories:
        distributions = all_log_probs(policy, trajectory)
        entropy = -(distributions.exp() * distributions).sum(-1)
        lengths = [len(turn.token_ids) for turn in trajectory.turns]
        if aggregation == "turn_mean":
            total = total + sum(turn.mean() for turn in entropy.split(lengths)) / sum(TURNS)
        else:
            tokens = sum(len(t.token_ids) for one in trajectories for t in one.turns)
            total = total + entropy.sum() / (len(TURNS) if aggregation == "sum" else tokens)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(-coefficient * total, policy.parameters())])
    assert float((parts[coefficient] - parts[0.0] - expected).abs().max()) <= 1e-6  # the model normalises in float32
    assert float(expected.norm()) > 1e-3


def test_the_bonus_s_gradient_is_the_slope_of_the_entropy(make_policy: Make) -> None:
    """Finite differences along a random direction, on the metric itself."""
    policy = make_policy(dtype=torch.float64)
    trajectories = random_words(policy, TURNS)
    learner(policy, aggregation="token_mean").learn(trajectories)
    plain = flat_gradient(policy)
    policy.version = 0
    learner(policy, aggregation="token_mean", entropy_coefficient=1.0).learn(trajectories)
    slope_of_loss = flat_gradient(policy) - plain

    random, step = np.random.default_rng(0), 1e-3
    direction = [torch.from_numpy(random.normal(size=tuple(p.shape))).to(p) for p in policy.parameters()]
    entropies = []
    for sign in (1, -1):
        for p, d in zip(policy.parameters(), direction, strict=True):
            p.data += sign * step * d
        policy.version = 0
        entropies.append(learner(policy, max_log_prob_gap=1e9).learn(trajectories)["entropy"])
        for p, d in zip(policy.parameters(), direction, strict=True):
            p.data -= sign * step * d
    slope = (entropies[0] - entropies[1]) / (2 * step)
    assert slope == pytest.approx(-float(slope_of_loss @ torch.cat([d.flatten() for d in direction])), rel=1e-3)


def test_watching_changes_no_gradient(make_policy: Make) -> None:
    policy = make_policy()
    data = batch(random_words(policy, TURNS), policy.pad_id)
    arrays = (data.ids, data.attention, data.token_mask)
    policy.log_probs(*arrays).sum().backward()
    plain = flat_gradient(policy).clone()
    for p in policy.parameters():
        p.grad = None
    log_probs, entropies = policy.log_probs_and_entropies(*arrays)
    (log_probs.sum() + entropies.sum()).backward()  # entropies that are only measured carry no gradient
    assert torch.equal(flat_gradient(policy), plain)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.learns])
def test_every_agent_says_what_it_does(name: str, make_policy: Make) -> None:
    policy = make_policy()
    mask = FULL.get(name, credit.greedy)
    metrics = Learner(policy, mask, method=name).learn(random_words(policy, TURNS))
    for key in ("entropy", "kl_sampler", "kl_reference", "grad_clipped", "advantage_std"):
        assert math.isfinite(metrics[key]), key
    assert metrics["entropy"] > 0


def test_the_spread_of_advantages_is_over_turns_of_all_workers(
    make_policy: Make, on_ranks: Callable[..., list[Any]]
) -> None:
    policy = make_policy()
    trajectories = random_words(policy, TURNS)
    rewards = np.array([turn.reward for trajectory in trajectories for turn in trajectory.turns])
    spread = Learner(policy, credit.greedy, baseline="none", learning_rate=0.0).learn(trajectories)["advantage_std"]
    assert spread == pytest.approx(rewards.std())
    policies = [make_policy(), make_policy()]
    shares = [trajectories[:1], trajectories[1:]]
    both = on_ranks(
        2,
        lambda own: Learner(policies[own.rank], credit.greedy, baseline="none", workers=own).learn(shares[own.rank]),
    )
    assert [metrics["advantage_std"] for metrics in both] == pytest.approx([spread] * 2)


def test_later_steps_on_a_batch_move_away_from_the_sampler(make_policy: Make) -> None:
    policy = make_policy()
    options = {"importance": "token", "steps_per_batch": 3, "learning_rate": 1e-2, "max_grad_norm": 1e-4}
    metrics = learner(policy, **options).learn(random_words(policy, TURNS))
    assert metrics["kl_sampler"] > 1e-4
    assert metrics["grad_clipped"] == 1.0
    assert metrics["kl_reference"] > 0  # of the first step


def test_a_clipped_step_is_one_whose_gradient_is_too_long(make_policy: Make) -> None:
    for limit, clipped in ((1e9, 0.0), (1e-6, 1.0)):
        policy = make_policy()
        assert learner(policy, max_grad_norm=limit).learn(random_words(policy, TURNS))["grad_clipped"] == clipped


def test_the_reference_is_asked_now_and_then_and_never_without_lora(make_policy: Make) -> None:
    def measured(policy: Policy, **options: Any) -> list[bool]:
        agent = learner(policy, **options)
        words = random_words(policy, TURNS)
        return ["kl_reference" in agent.learn(sampled(policy, words)) for _ in range(4)]

    assert measured(make_policy(), reference_kl_every=2) == [True, False, True, False]
    steps = {"reference_kl_every": 2, "steps_per_batch": 2, "importance": "token"}
    assert measured(make_policy(), **steps) == [True, False, True, False]
    assert measured(make_policy(), reference_kl_every=0) == [False] * 4
    assert measured(make_policy(lora=False), reference_kl_every=1) == [False] * 4


def test_reply_lengths_and_cuts(policy: Policy) -> None:
    one, two, *_ = random_words(policy, [2, 1])
    cut = replace(two.turns[0], token_ids=(1, 2, 3, 4, 5, 6, 7, 8, 9), log_probs=(0.0,) * 9)
    metrics = reply_lengths([one, replace(two, turns=(cut,))], policy.end_of_turn_id)
    lengths = [len(turn.token_ids) for turn in one.turns] + [9]
    assert metrics["reply_tokens_mean"] == pytest.approx(sum(lengths) / 3)
    assert metrics["reply_tokens_max"] == 9
    assert metrics["reply_cut"] == pytest.approx(1 / 3)
    silent = replace(one, turns=())
    assert reply_lengths([silent], policy.end_of_turn_id)["reply_cut"] is None


def test_the_learning_rate_warms_up_and_falls() -> None:
    def rates(**settings: Any) -> list[float]:
        config = configs.from_dict({"learning_rate": 1.0, **settings})
        return [learning_rate(config, step, 10) for step in range(10)]

    assert rates(schedule="constant", warmup=4) == pytest.approx([0.25, 0.5, 0.75, *[1.0] * 7])
    assert rates(schedule="linear", warmup=0.2) == pytest.approx([0.5, 1.0, *[1 - k / 8 for k in range(8)]])
    cosine = [0.5 + 0.5 * math.cos(math.pi * k / 9) for k in range(9)]
    assert rates(schedule="cosine", warmup=0.03) == pytest.approx([1.0, *cosine])  # 3% of 10 steps is one step
    assert rates(schedule="linear") == pytest.approx([1 - k / 10 for k in range(10)])
    assert rates(schedule="linear", warmup=20)[-1] == pytest.approx(0.5)


def test_adamw_gets_its_settings(policy: Policy) -> None:
    agent = learner(policy, betas=(0.8, 0.95), weight_decay=0.01)
    assert {(g["betas"], g["weight_decay"]) for g in agent.optimizer.param_groups} == {((0.8, 0.95), 0.01)}


def test_the_few_that_matter_are_shown() -> None:
    lines = [{"iteration": i, "entropy": 0.5 / i, "reply_cut": 0.1, "reply_tokens_mean": None} for i in (1, 2)]
    lines[0]["kl_reference"] = 0.0  # once is no curve
    assert watched_points(lines) == {"entropy": [(1, 0.5), (2, 0.25)]}
    assert "entropy 0.50  10% of replies cut" in status(lines[0])
    assert "cut" not in status({**lines[0], "reply_cut": 0.0})
    assert "entropy" not in status({"consistency": 0.5})
