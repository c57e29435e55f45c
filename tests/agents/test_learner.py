"""The agent's gradient against the definition, and that it learns, repeats itself and can be resumed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.vector import SyncVectorEnv

from ppg_agents import credit
from ppg_agents.agents import agents, make_agent
from ppg_agents.agents.learner import Learner
from ppg_agents.generation.hf import HFSampler
from ppg_agents.ledger import LedgerError
from ppg_agents.policy import Policy
from ppg_agents.rollout import collect
from ppg_agents.trajectory import Trajectory, Turn

Make = Callable[..., Policy]
Envs = Callable[..., SyncVectorEnv]


def ledger(policy: Policy, turns: list[int], seed: int = 0) -> list[Trajectory]:
    """Return conversations of the policy's version, with so many turns each, random tokens and rewards.

    Two share a persona.
    """
    random = np.random.default_rng(seed)

    def one_turn() -> Turn:
        prompt, tokens = random.integers(0, 256, 5), random.integers(0, 256, int(random.integers(1, 6)))
        ids = (*tokens.tolist(), policy.end_of_turn_id)
        nobody = (math.nan,) * len(ids)
        return Turn("m", "r", tuple(prompt.tolist()), ids, nobody, float(random.random()), {}, policy.version)

    return [
        Trajectory(f"i{b // 2}", "p", "d", None, tuple(one_turn() for _ in range(n)), True, False)
        for b, n in enumerate(turns)
    ]


def gradient(policy: Policy, trajectories: list[Trajectory], mask: Any = credit.full, **options: Any) -> Any:
    settings = {"baseline": "none", "learning_rate": 0.0, "max_grad_norm": 1e9, **options}
    metrics = Learner(policy, mask, **settings).learn(trajectories)
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]), metrics


@pytest.mark.parametrize("mask", [credit.full, credit.greedy, lambda n: credit.k_step(n, 2)])
def test_gradient_is_the_sum_of_naive_per_turn_gradients(make_policy: Make, mask: Any) -> None:
    """Each turn on its own: the whole softmax on its prefix, times the rewards that count for it."""
    policy = make_policy(dtype=torch.float64)
    conversations = ledger(policy, [3, 1, 2, 4, 0])
    got, metrics = gradient(policy, conversations, mask, discount=0.9)

    naive = torch.zeros_like(got)
    for conversation in conversations:
        n, prefix = len(conversation.turns), []
        for t, turn in enumerate(conversation.turns):
            start = len(prefix) + len(turn.prompt_ids)
            prefix += [*turn.prompt_ids, *turn.token_ids]
            counted = [ell for ell in range(t, n) if mask(4)[t, ell]]
            value = sum(0.9 ** (ell - t) * conversation.turns[ell].reward for ell in counted)
            scores = policy.model(input_ids=torch.tensor([prefix])).logits[0].log_softmax(-1)
            own = sum(scores[i - 1, prefix[i]] for i in range(start, len(prefix)))
            grads = torch.autograd.grad(-value * own / len(conversations), policy.parameters())
            naive += torch.cat([g.flatten() for g in grads])
    assert float((got - naive).abs().max()) <= 1e-6  # the model normalises in float32
    assert metrics["grad_norm"] == pytest.approx(float(naive.norm()))


@pytest.mark.parametrize("aggregation", ["sum", "token_mean", "sequence_mean", "turn_mean"])
def test_micro_batches_add_up(make_policy: Make, aggregation: str) -> None:
    policy = make_policy(dtype=torch.float64)
    conversations = ledger(policy, [3, 1, 2, 4, 2])
    whole, a = gradient(policy, conversations, aggregation=aggregation)
    policy.version = 0
    parts, b = gradient(policy, conversations, aggregation=aggregation, micro_batch_tokens=40)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)
    assert a["loss"] == pytest.approx(b["loss"])


@pytest.mark.parametrize("aggregation", ["sum", "token_mean", "turn_mean"])
@pytest.mark.parametrize("baseline", ["none", "leave-one-out", "batch-mean"])
def test_workers_take_the_step_of_one(
    make_policy: Make, on_ranks: Callable[..., list[Any]], baseline: str, aggregation: str
) -> None:
    """Personas are split over the ranks; the last rank has nothing to learn from."""
    policy = make_policy(dtype=torch.float64)
    played = ledger(policy, [3, 1, 2, 4, 2, 1])
    played[-1] = replace(played[-1], turns=(replace(played[-1].turns[0], reward=math.nan),))
    options = {"baseline": baseline, "aggregation": aggregation, "standardise": True, "micro_batch_tokens": 60}
    whole, alone = gradient(policy, played, **options)
    shards, policies = [played[:1], played[1:5], played[5:]], [make_policy(dtype=torch.float64) for _ in range(3)]
    found = on_ranks(3, lambda own: gradient(policies[own.rank], shards[own.rank], workers=own, **options))
    for got, metrics in found:
        torch.testing.assert_close(got, whole, rtol=0, atol=1e-12)
        assert {k: v for k, v in metrics.items() if k != "padding"} == pytest.approx(
            {k: v for k, v in alone.items() if k != "padding"}
        )


@pytest.mark.parametrize("method", ["ppg", "a-lol", "sft"])
def test_a_worker_without_a_share_of_logged_dialogues_takes_the_step_of_one(
    method: str, make_policy: Make, on_ranks: Callable[..., list[Any]]
) -> None:
    """The last batch of a pass may have fewer dialogues than there are processes."""
    policies = [make_policy(dtype=torch.float64) for _ in range(4)]
    logged = ledger(policies[0], [3, 2])

    def step(policy: Policy, share: list[Trajectory], **options: Any) -> Any:
        agent = Learner(policy, credit.full, method=method, max_grad_norm=1e9, learning_rate=0.0, **options)
        metrics = agent.learn_offline(share)
        gradients = [p.grad for p in policy.parameters()]
        return torch.cat([g.flatten() for g in gradients if g is not None]), metrics

    whole, alone = step(policies[0], logged)
    shares = [logged[:1], [], logged[1:]]
    for got, metrics in on_ranks(3, lambda own: step(policies[1 + own.rank], shares[own.rank], workers=own)):
        torch.testing.assert_close(got, whole, rtol=0, atol=1e-12)
        same = {k: v for k, v in alone.items() if k != "padding"}
        assert {k: metrics[k] for k in same} == pytest.approx(same)


def test_a_fault_on_one_worker_stops_all_of_them(make_policy: Make, on_ranks: Callable[..., list[Any]]) -> None:
    played = ledger(make_policy(), [3, 1])
    future = [replace(played[1], turns=(replace(played[1].turns[0], policy_version=3),))]
    policies = [make_policy(), make_policy()]

    def work(own: Any) -> str:
        with pytest.raises(LedgerError) as error:
            gradient(policies[own.rank], [played[:1], future][own.rank], workers=own)
        return str(error.value)

    first, second = on_ranks(2, work)
    assert "expected policy version 0 at conversation 1 of 1" in first
    assert first == second


def test_a_masked_turn_does_not_touch_the_gradient(policy: Policy) -> None:
    """An unjudged turn has no reward to give and no gradient of its own; its tokens are still read."""

    def with_turn(reward: float, token: int) -> list[Trajectory]:
        first, *rest = ledger(policy, [3, 3])
        masked = replace(first.turns[2], reward=reward, token_ids=(token, *first.turns[2].token_ids[1:]))
        return [replace(first, turns=(*first.turns[:2], masked)), *rest]

    unjudged, _ = gradient(policy, with_turn(math.nan, 1), baseline="leave-one-out")
    infinite, _ = gradient(policy, with_turn(math.inf, 1), baseline="leave-one-out")
    other_words, _ = gradient(policy, with_turn(math.nan, 2), baseline="leave-one-out")
    judged, _ = gradient(policy, with_turn(0.5, 1), baseline="leave-one-out")
    assert torch.equal(unjudged, infinite)
    torch.testing.assert_close(unjudged, other_words, rtol=0, atol=1e-7)
    assert not torch.allclose(unjudged, judged)


def test_no_judged_turn_no_step(policy: Policy) -> None:
    silent = [replace(t, turns=tuple(replace(x, reward=math.nan) for x in t.turns)) for t in ledger(policy, [2, 0])]
    agent = Learner(policy, credit.greedy, learning_rate=1.0)
    before = [p.clone() for p in policy.parameters()]
    metrics = agent.learn(silent)
    assert (metrics["loss"], metrics["grad_norm"], metrics["policy_version"], agent.steps) == (0, 0, 0, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


@pytest.mark.parametrize("baseline", ["none", "leave-one-out", "batch-mean", "moving-average"])
def test_same_seed_twice_gives_identical_metrics(make_policy: Make, toy_envs: Envs, baseline: Any) -> None:
    def train() -> list[dict[str, float]]:
        policy = make_policy()
        sampler = HFSampler(policy, max_new_tokens=6)
        agent = Learner(policy, credit.full, baseline=baseline, standardise=True, n_turns=3)
        envs = toy_envs(*[{"turns": 3}] * 4)
        return [
            agent.learn(collect(envs, policy, sampler, [i, i, 7, 7], torch.Generator().manual_seed(i)))
            for i in range(3)
        ]

    a, b = train(), train()
    assert a == b
    assert [m["policy_version"] for m in a] == [1, 2, 3]
    assert any(m["grad_norm"] > 0 for m in a)
    assert set(a[0]) == {
        "loss", "grad_norm", "credit_mean", "credit_std", "learning_rate", "tokens", "padding", "policy_version",
        "staleness_max", "log_prob_gap_mean", "log_prob_gap_max", "entropy", "kl_sampler", "kl_reference",
        "grad_clipped", "advantage_std",
    }  # fmt: skip


def test_saved_and_loaded_it_goes_on_as_if_nothing_happened(make_policy: Make, tmp_path: Path) -> None:
    def fresh() -> Learner:
        return Learner(
            make_policy(),
            credit.full,
            baseline="moving-average",
            n_turns=4,
            learning_rate=0.01,
        )

    agent = fresh()
    for i in range(3):
        agent.learn(ledger(agent.policy, [4, 2, 3], seed=i))
    agent.save(tmp_path)
    assert {f.suffix for f in tmp_path.iterdir()} <= {".safetensors", ".json", ".jinja"}
    twin = fresh()
    twin.load(tmp_path)
    assert (twin.steps, twin.policy.version) == (3, 3)
    expected = [agent.learn(ledger(agent.policy, [4, 2, 3], seed=i)) for i in (3, 4)]
    assert [twin.learn(ledger(twin.policy, [4, 2, 3], seed=i)) for i in (3, 4)] == expected
    for a, b in zip(agent.policy.parameters(), twin.policy.parameters(), strict=True):
        assert torch.equal(a, b)


def test_it_learns_a_toy(make_policy: Make, toy_envs: Envs) -> None:
    """The reward is the share of vowels in a reply: a random model says few, a trained one many."""
    policy = make_policy()
    sampler = HFSampler(policy, max_new_tokens=8)
    agent = Learner(policy, credit.greedy, baseline="batch-mean", learning_rate=0.03)
    envs = toy_envs(*[{"turns": 2}] * 24)
    scores = []
    for i in range(20):
        played = collect(envs, policy, sampler, list(range(24)), torch.Generator().manual_seed(i))
        scores.append(np.mean([r for t in played for r in t.judged()]))
        agent.learn(played)
    assert np.mean(scores[:2]) < 0.1
    assert np.mean(scores[-2:]) > 0.5


def test_a_kl_term_brings_the_policy_back_to_its_reference(make_policy: Make, toy_envs: Envs) -> None:
    policy = make_policy()
    sampler = HFSampler(policy, max_new_tokens=8, temperature=0.8)
    agent = Learner(policy, credit.greedy, baseline="none", learning_rate=0.01, kl_coefficient=1.0)
    envs = toy_envs(*[{"turns": 2}] * 32)
    found = []
    for i in range(10):
        played = collect(envs, policy, sampler, list(range(32)), torch.Generator().manual_seed(i))
        silent = [replace(t, turns=tuple(replace(x, reward=0.0) for x in t.turns)) for t in played]
        found.append(agent.learn(silent)["kl"])
    assert found[0] > 2
    assert found[-1] < 0.5 * found[0]


def test_offline_learning_raises_its_own_objective(make_policy: Make) -> None:
    policy = make_policy()
    logged = ledger(policy, [3, 3, 2, 4])
    agent = Learner(policy, credit.full, learning_rate=0.01, micro_batch_tokens=40)
    before = agent.evaluate_offline(logged)
    loss = agent.learn_offline(logged)["loss"]
    assert loss == pytest.approx(-before["objective"], rel=1e-5)
    for _ in range(10):
        agent.learn_offline(logged)
    after = agent.evaluate_offline(logged)
    assert after["objective"] > before["objective"]
    assert after["turns"] == 12
    assert after["objective_per_turn"] == pytest.approx(after["objective"] * 4 / 12)
    assert after["log_likelihood"] < 0


def test_learning_rate_and_clipping(policy: Policy) -> None:
    agent = Learner(policy, credit.greedy, baseline="none", learning_rate=lambda i: 0.1 / (i + 1), max_grad_norm=0.01)
    first, second = (agent.learn(ledger(policy, [2, 2])) for _ in range(2))
    assert (first["learning_rate"], second["learning_rate"]) == (0.1, 0.05)
    assert second["grad_norm"] > 0.01  # before clipping
    norm = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]).norm()
    assert float(norm) == pytest.approx(0.01, rel=1e-3)


def test_a_plain_step_is_the_rate_times_the_gradient(make_policy: Make) -> None:
    """Algorithm 1 of the paper: θ ← θ + α · g, nothing subtracted, clipped or normalised."""
    policy = make_policy(dtype=torch.float64)
    plain = {"baseline": "none", "optimizer": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.25}
    agent = Learner(policy, credit.full, weight_decay=0.1, **plain)
    for _ in range(2):  # no momentum: the second step knows nothing of the first
        before = [p.detach().clone() for p in policy.parameters()]
        metrics = agent.learn(ledger(policy, [3, 2, 4]))
        for p, was in zip(policy.parameters(), before, strict=True):
            assert p.grad is not None
            torch.testing.assert_close(p.detach(), was - 0.25 * (p.grad + 0.1 * was), rtol=0, atol=1e-12)
        norm = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]).norm()
        assert metrics["grad_norm"] == pytest.approx(float(norm))
        assert metrics["grad_norm"] > 1
        assert metrics["grad_clipped"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_with_plain_steps_goes_on_to_the_last_bit(make_policy: Make, tmp_path: Path, dtype: torch.dtype) -> None:
    """Without moments the float32 copies of bfloat16 weights are all that has to be kept."""
    made = [make_policy(dtype=dtype, lora=False) for _ in range(2)]
    one, other = (Learner(policy, credit.full, optimizer="sgd", learning_rate=1e-3) for policy in made)
    one.learn(ledger(made[0], [2, 2]))
    one.save(tmp_path)
    other.load(tmp_path)
    assert other.steps == 1
    for ours, theirs in zip(other.masters, one.masters, strict=True):
        assert torch.equal(ours, theirs)
    assert (one.masters[0] is not made[0].parameters()[0]) == (dtype == torch.bfloat16)


def test_refusals_and_registry(policy: Policy) -> None:
    for wrong, message in (
        ({"optimizer": "adam"}, "expected an optimizer in"),
        ({"optimizer": "sgd", "betas": (0.9, 0.95)}, "betas with the optimizer 'adamw' alone"),
        ({"max_grad_norm": -1.0}, "max_grad_norm >= 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Learner(policy, credit.full, **wrong)
    with pytest.raises(ValueError, match="got 'gae'"):
        Learner(policy, credit.full, baseline="gae")
    with pytest.raises(ValueError, match="n_turns"):
        Learner(policy, credit.full, baseline="moving-average")
    bad = ledger(policy, [1])
    next(iter(policy.parameters())).data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        Learner(policy, credit.full, baseline="none").learn(bad)
    assert "ppg" in agents()
    assert isinstance(make_agent("ppg", policy, credit.full), Learner)
    assert isinstance(make_agent("ppg_agents.agents.learner:Learner", policy, credit.full), Learner)
    with pytest.raises(ValueError, match="did you mean 'ppg'"):
        make_agent("ppgg")
    with pytest.raises(ValueError, match=r"got 'reinforce'; it is 'ppg' now"):
        make_agent("reinforce")
    with pytest.raises(ValueError, match=r"got str without needs, learn, save, load; derive it from"):
        make_agent("builtins:str")
    with pytest.raises(ValueError, match=r"expected an agent at 'no.where:Agent', got ModuleNotFoundError"):
        make_agent("no.where:Agent")
