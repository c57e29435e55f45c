"""The paper's advantage, eq. (9): values by hand, what follows from it, and the learner that uses it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ppg_agents import credit
from ppg_agents.agents.learner import Learner
from ppg_agents.config import ConfigError, from_dict
from ppg_agents.group_advantage import GroupAdvantage
from ppg_agents.policy import Policy
from ppg_agents.trajectory import Trajectory, Turn, group_labels

Make = Callable[..., Policy]

CREDIT = np.array([[3.0, 1.0], [1.0, 9.0], [2.0, 6.0], [0.1, 0.1]])
VALID = np.array([[True, True], [True, False], [True, True], [True, True]])
GROUPS = [("nurse", "maps"), ("nurse", "maps"), ("nurse", "war"), ("baker", "maps")]


def talks(policy: Policy, rewards: list[list[float]], labels: list[tuple[str, str]]) -> list[Trajectory]:
    """Return conversations with random words, these rewards and (instruction, topic)."""
    random = np.random.default_rng(0)

    def one(reward: float) -> Turn:
        ids = (*random.integers(0, 256, 3).tolist(), policy.end_of_turn_id)
        prompt = tuple(random.integers(0, 256, 4).tolist())
        return Turn("m", "r", prompt, ids, (math.nan,) * len(ids), reward, {}, policy.version)

    return [
        Trajectory(who, "p", "d", None, tuple(map(one, row)), True, False, topic=topic)
        for row, (who, topic) in zip(rewards, labels, strict=True)
    ]


def test_jointly_over_turns_and_conversations_by_hand() -> None:
    # nurse, maps: the sums 3, 1, 1 (one turn was not judged): mean 5/3, variance 8/9. nurse, war: 2, 6. baker: equal.
    found = GroupAdvantage(CREDIT, VALID, GROUPS, per_turn=False)(CREDIT, VALID, GROUPS)
    root = math.sqrt(2)
    np.testing.assert_allclose(found, [[root, -1 / root], [-1 / root, 0], [-1, 1], [0, 0]], atol=1e-15)


def test_per_turn_index_by_hand() -> None:
    found = GroupAdvantage(CREDIT, VALID, GROUPS, per_turn=True)(CREDIT, VALID, GROUPS)
    assert found.tolist() == [[1, 0], [-1, 0], [0, 0], [0, 0]]


@pytest.mark.parametrize("n", [2, 4, 8, 60])
def test_with_equal_rewards_early_turns_gain_and_late_ones_lose(n: int) -> None:
    """Nothing tells the replies apart, yet (9) raises the first half and lowers the second; per turn it does not."""
    rewards, valid, groups = np.ones((3, n)), np.ones((3, n), dtype=np.bool_), [("nurse", "")] * 3
    whole = credit.credit(rewards, credit.full(n), valid)
    turn = np.arange(1, n + 1)
    expected = ((n + 1) / 2 - turn) / math.sqrt((n**2 - 1) / 12)
    found = GroupAdvantage(whole, valid, groups, per_turn=False)(whole, valid, groups)
    np.testing.assert_allclose(found, np.tile(expected, (3, 1)), atol=1e-13)
    assert (found[:, : n // 2] > 0).all()
    assert (found[:, (n + 1) // 2 :] < 0).all()
    assert not GroupAdvantage(whole, valid, groups, per_turn=True)(whole, valid, groups).any()
    one = credit.credit(rewards, credit.greedy(n), valid)  # K = 1: every sum has one term
    assert not GroupAdvantage(one, valid, groups, per_turn=False)(one, valid, groups).any()


def test_the_last_turns_of_lookahead_lose_the_same_way() -> None:
    """K = 2, n = 4: sums 2, 2, 2, 1, mean 7/4, variance 3/16."""
    valid, groups = np.ones((1, 4), dtype=np.bool_), [("nurse", "")]
    sums = credit.credit(np.ones((1, 4)), credit.k_step(4, 2), valid)
    found = GroupAdvantage(sums, valid, groups, per_turn=False)(sums, valid, groups)
    np.testing.assert_allclose(found[0], np.array([1, 1, 1, -3]) / math.sqrt(3), atol=1e-15)


def test_other_data_than_that_of_the_statistics_is_refused() -> None:
    known = GroupAdvantage(CREDIT, VALID, GROUPS, per_turn=False)
    np.testing.assert_array_equal(known(CREDIT[:, :1], VALID[:, :1], GROUPS), known(CREDIT, VALID, GROUPS)[:, :1])
    with pytest.raises(ValueError, match=r"of the training set, got another group: .*'cook'"):
        known(CREDIT[:1], VALID[:1], [("cook", "")])
    with pytest.raises(ValueError, match="at most 2 turns, as in the training set, got 3"):
        known(np.ones((1, 3)), np.ones((1, 3), dtype=np.bool_), GROUPS[:1])
    with pytest.raises(ValueError, match=r"B labels, got \[4, 2\], \[4, 2\] and 1"):
        GroupAdvantage(CREDIT, VALID, GROUPS[:1], per_turn=False)


REWARDS = [[1.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0], [0.0, 0.5, 0.0], [1.0, 1.0, 1.0], [0.5, 0.0]]
LABELS = [("a", "x"), ("a", "x"), ("a", "y"), ("a", "y"), ("b", ""), ("b", "")]


def step(agent: Learner, share: list[Trajectory], learn: str = "learn_offline") -> tuple[torch.Tensor, Any]:
    """Return the gradient of one step, and its metrics."""
    metrics = getattr(agent, learn)(share)
    found = [p.grad.flatten() for p in agent.policy.parameters() if p.grad is not None]
    return torch.cat(found), metrics


def naive(policy: Policy, conversations: list[Trajectory], advantage: Any) -> torch.Tensor:
    """Return minus Σ_b Σ_t A_{b,t} ∇ log π(y_{b,t} | …) / B, turn by turn."""
    total: Any = 0.0
    for b, conversation in enumerate(conversations):
        prefix: list[int] = []
        for t, turn in enumerate(conversation.turns):
            start = len(prefix) + len(turn.prompt_ids)
            prefix += [*turn.prompt_ids, *turn.token_ids]
            scores = policy.model(input_ids=torch.tensor([prefix])).logits[0].log_softmax(-1)
            own = sum(scores[i - 1, prefix[i]] for i in range(start, len(prefix)))
            total = total - advantage[b][t] * own / len(conversations)
    return torch.cat([g.flatten() for g in torch.autograd.grad(total, policy.parameters())])


def options(name: str, **more: Any) -> dict[str, Any]:
    return {"baseline": name, "learning_rate": 0.0, "max_grad_norm": 1e9, **more}


def by_hand(name: str) -> list[list[float]]:
    """Return A of `REWARDS` under full planning, with plain loops."""
    sums = [[sum(row[t:]) for t in range(len(row))] for row in REWARDS]
    found = []
    for own, label in zip(sums, LABELS, strict=True):
        rows = [s for s, other in zip(sums, LABELS, strict=True) if other == label]
        row = []
        for t, value in enumerate(own):
            pool = [s[t] for s in rows if t < len(s)] if name == "group-turn" else [v for s in rows for v in s]
            std = float(np.std(pool))
            row.append((value - float(np.mean(pool))) / std if std else 0.0)
        found.append(row)
    return found


@pytest.mark.parametrize("name", ["group", "group-turn"])
def test_offline_the_whole_training_set_scales_every_batch(
    name: str, make_policy: Make, on_ranks: Callable[..., list[Any]]
) -> None:
    """The statistics come from `prepare`, not from the batch, and are the same on every process."""
    policy = make_policy(dtype=torch.float64)
    logged = talks(policy, REWARDS, LABELS)
    assert group_labels(logged) == LABELS
    agent = Learner(policy, credit.full, **options(name))
    agent.prepare(logged)
    small = [logged[3], logged[0]]
    expected = naive(policy, small, [by_hand(name)[3], by_hand(name)[0]])
    found, metrics = step(agent, small)
    assert float((found - expected).abs().max()) <= 1e-6 * float(expected.abs().max())
    assert not agent.loss_is_likelihood

    policies = [make_policy(dtype=torch.float64) for _ in range(2)]

    def share(own: Any) -> Any:
        learner = Learner(policies[own.rank], credit.full, workers=own, **options(name))
        learner.prepare(logged)
        return step(learner, small[own.rank : own.rank + 1])

    for got, told in on_ranks(2, share):
        torch.testing.assert_close(got, found, rtol=0, atol=1e-12)
        assert told["credit_mean"] == pytest.approx(metrics["credit_mean"])


@pytest.mark.parametrize("name", ["group", "group-turn"])
def test_online_the_group_of_the_batch_does(name: str, make_policy: Make) -> None:
    policy = make_policy(dtype=torch.float64)
    played = talks(policy, REWARDS, LABELS)
    expected = naive(policy, played, by_hand(name))
    found, _ = step(Learner(policy, credit.full, **options(name)), played, "learn")
    assert float((found - expected).abs().max()) <= 1e-6 * float(expected.abs().max())


def test_a_missing_score_costs_nobody_anything(policy: Policy) -> None:
    """All rewards are 1 and one is missing: its sum counts as 2 like the others', not as 1. Sums 2, 1, 2, 1, 2."""
    logged = talks(policy, [[1, 1], [1, 1], [1, math.nan]], [("a", "")] * 3)
    agent = Learner(policy, credit.full, **options("group"))
    agent.prepare(logged)
    assert agent._prepared is not None
    sums, valid = np.array([[2.0, 1.0]]), np.ones((1, 2), dtype=np.bool_)
    found = agent._prepared(sums, valid, [("a", "")])
    np.testing.assert_allclose(found[0], np.array([0.4, -0.6]) / math.sqrt(0.24), atol=1e-12)


def test_refusals(policy: Policy) -> None:
    played = talks(policy, REWARDS, LABELS)
    agent = Learner(policy, credit.full, **options("group"))
    with pytest.raises(ValueError, match=r"statistics of the training set, got none; call prepare"):
        agent.learn_offline(played)
    assert agent.needs.group == 2
    with pytest.raises(ValueError, match=r"at least 2 with each, got 1 with 'c'; add --set group=4"):
        agent.learn([*played, replace(played[0], instruction="c")])
    with pytest.raises(ValueError, match="standardise = False with baseline 'group'"):
        Learner(policy, credit.full, baseline="group", standardise=True)
    with pytest.raises(ValueError, match="its advantage has its own baseline"):
        Learner(policy, credit.full, method="grpo", baseline="group")
    for settings, message in (
        ({"baseline": "group"}, "baseline 'group' needs companions: expected group >= 2, got 1"),
        ({"baseline": "group-turn", "group": 2, "standardise": True}, "standardise: expected false"),
    ):
        with pytest.raises(ConfigError, match=message):
            from_dict(settings)
    assert from_dict({"baseline": "group", "offline": {"files": ["talks.jsonl"]}}).baseline == "group"
