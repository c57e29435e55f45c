"""Every alternative by its name: the step it takes, beside that of the partial policy gradient; what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ppg_agents import credit
from ppg_agents.agents import METHODS, make_agent
from ppg_agents.agents.advantages import best_share, turns_of
from ppg_agents.agents.gradient import trained_tokens
from ppg_agents.agents.learner import Learner
from ppg_agents.agents.measure import entropies
from ppg_agents.agents.methods import resolve
from ppg_agents.batch import batch
from ppg_agents.distributed import Alone
from ppg_agents.generation.hf import HFSampler
from ppg_agents.missing import Credits
from ppg_agents.policy import Policy
from ppg_agents.rollout import collect
from ppg_agents.rollout.pairs import branch_point, play_pairs
from ppg_agents.trajectory import Trajectory, Turn

Make = Callable[..., Policy]
LEARNING = [name for name, method in METHODS.items() if method.learns and name != "ppg"]
FULL = {"sft": credit.full, "ppo": credit.full, "bi-level-gae": credit.full}
CLASSES = {"full": credit.full, "greedy": credit.greedy, "2-step": lambda n: credit.k_step(n, 2)}


def played(policy: Policy, turns: list[int], seed: int = 0) -> list[Trajectory]:
    """Return conversations of random tokens and rewards as this policy sampled them; neighbours share a persona."""
    random = np.random.default_rng(seed)

    def one_turn() -> Turn:
        prompt, tokens = random.integers(0, 256, 5), random.integers(0, 256, int(random.integers(1, 6)))
        ids = (*tokens.tolist(), policy.end_of_turn_id)
        return Turn("m", "r", tuple(prompt.tolist()), ids, (0.0,) * len(ids), float(random.random()))

    found = []
    for b, n in enumerate(turns):
        own = tuple(one_turn() for _ in range(n))
        if b % 2 and own and found[-1].turns:  # pairs begin alike
            own = (replace(own[0], prompt_ids=found[-1].turns[0].prompt_ids), *own[1:])
        found.append(Trajectory(f"i{b // 2}", "p", "d", None, own, True, False))
    return sampled(policy, found)


def sampled(policy: Policy, trajectories: list[Trajectory]) -> list[Trajectory]:
    """Return the conversations with the policy's own log-probs and version."""
    data = batch(trajectories, policy.pad_id)
    with torch.no_grad():
        scores = policy.log_probs(data.ids, data.attention, data.token_mask)
    return [
        replace(
            trajectory,
            turns=tuple(
                replace(turn, log_probs=tuple(row[s.start : s.end].tolist()), policy_version=policy.version)
                for turn, s in zip(trajectory.turns, trajectory.spans(), strict=True)
            ),
        )
        for trajectory, row in zip(trajectories, scores, strict=True)
    ]


def agent_of(name: str, policy: Policy, mask: Any = None, **options: Any) -> Any:
    mask = mask or FULL.get(name, credit.greedy)
    return make_agent(name, policy, mask, **{"learning_rate": 0.0, "max_grad_norm": 1e9, **options})


def gradient(name: str, policy: Policy, trajectories: list[Trajectory], mask: Any = None, **options: Any) -> Any:
    metrics = agent_of(name, policy, mask, **options).learn(trajectories)
    policy.version = 0
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]), metrics


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Sampling log-probs are kept in float32: w = 1 up to 1e-6."""
    assert float((got - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.fixture(scope="module")
def double(make_policy: Make) -> Policy:
    return make_policy(dtype=torch.float64)


@pytest.mark.parametrize("mask", CLASSES.values(), ids=CLASSES)
def test_at_the_sampling_policy_all_losses_take_the_step_of_ppg(double: Policy, mask: Any) -> None:
    conversations = played(double, [3, 3, 2, 1])
    expected, _ = gradient("ppg", double, conversations, mask, baseline="batch-mean")
    for name in ("cispo", "sapo", "dispo", "rpg-forward-u", "rpg-reverse-u-reinforce", "rpg-reverse-u"):
        close(gradient(name, double, conversations, mask)[0], expected)
    for form in ("differentiable", "reinforce"):
        for divergence in ("forward", "reverse"):
            options: dict[str, Any] = {"divergence": divergence, "form": form, "beta": 0.0, "ratio": "reply"}
            close(gradient("rpg", double, conversations, mask, **options)[0], expected)
    expected, _ = gradient("ppg", double, conversations, mask, baseline="leave-one-out")
    for ratio in ("reply", "token"):
        close(gradient("rloo", double, conversations, mask, ratio=ratio)[0], expected)
    pair = conversations[:2]
    close(2 * gradient("dr-grpo", double, pair, mask)[0], gradient("rloo", double, pair, mask)[0])


@pytest.mark.parametrize("name", LEARNING)
def test_one_step_prefers_the_better_reply(name: str, make_policy: Make) -> None:
    policy = make_policy()
    pair = played(policy, [1, 1, 1, 1])
    pair = [
        replace(t, turns=tuple(replace(turn, reward=float(b % 2 == 0)) for turn in t.turns)) for b, t in enumerate(pair)
    ]

    def preference() -> float:
        data = batch(pair, policy.pad_id)
        with torch.no_grad():
            scores = policy.log_probs(data.ids, data.attention, data.token_mask).sum(1)
        return float(scores[::2].sum() - scores[1::2].sum())

    before = preference()
    metrics = agent_of(name, policy, learning_rate=1e-3, max_grad_norm=1.0).learn(pair)
    assert preference() > before + 1e-3
    assert (metrics["policy_version"], metrics["staleness_max"]) == (1, 0)


@pytest.mark.parametrize("name", LEARNING)
def test_micro_batches_and_unjudged_turns_change_nothing(name: str, double: Policy) -> None:
    conversations = played(double, [3, 3, 2, 2, 3, 1])
    last = conversations[0].turns[2]
    silent = [replace(conversations[0], turns=(*conversations[0].turns[:2], replace(last, reward=math.nan)))]
    silent = [*silent, *conversations[1:]]
    options: dict[str, Any] = {"steps_per_batch": 1}
    whole, _ = gradient(name, double, silent, **options)
    assert float(whole.abs().max()) > 0
    parts, _ = gradient(name, double, silent, **options, micro_batch_tokens=60)
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-12)
    words = (1, *last.token_ids[1:])
    other = replace(silent[0], turns=(*silent[0].turns[:2], replace(last, reward=math.inf, token_ids=words)))
    torch.testing.assert_close(gradient(name, double, [other, *silent[1:]], **options)[0], whole, rtol=1e-9, atol=1e-12)


TEAM: list[tuple[str, dict[str, Any]]] = [
    ("sft", {"keep": 0.5}),
    ("grpo", {"kl_coefficient": 0.1, "aggregation_of_source": True}),
    ("dapo", {"dynamic_sampling": True, "aggregation_of_source": True}),
    ("reinforce++", {"whiten": "tokens", "group_mean": True, "kl_coefficient": 0.1}),
    ("empg", {"zeta": 0.1}),
    ("rebn", {}),
    ("ppo", {"aggregation": "token_mean"}),
    ("ppo", {"credit": "class"}),
    ("bi-level-gae", {"credit": "class", "lam": 0.9}),
    ("a-lol", {"value": "head", "variant": "kl"}),
    ("p3o", {"kl_coefficient": 0.1}),
    ("copg", {}),
]


@pytest.mark.parametrize(("name", "options"), TEAM, ids=[f"{name}-{i}" for i, (name, _) in enumerate(TEAM)])
def test_two_workers_take_the_step_of_one(
    name: str, options: dict[str, Any], make_policy: Make, on_ranks: Callable[..., list[Any]]
) -> None:
    policies = [make_policy(dtype=torch.float64) for _ in range(3)]
    conversations = played(policies[0], [3, 2, 1, 3, 2, 2])
    silent = replace(conversations[5].turns[1], reward=math.nan)
    conversations[5] = replace(conversations[5], turns=(conversations[5].turns[0], silent))
    options = {**options, "max_grad_norm": 1.0, "steps_per_batch": 2, "learning_rate": 1e-4}
    whole, alone = gradient(name, policies[0], conversations, **options)

    def work(own: Any) -> Any:
        mine = [conversations[:2], conversations[2:]][own.rank]
        return gradient(name, policies[1 + own.rank], mine, **options, workers=own)

    for got, metrics in on_ranks(2, work):
        torch.testing.assert_close(got, whole, rtol=1e-6, atol=1e-9)
        assert metrics.keys() == alone.keys()
        same = {k: v for k, v in alone.items() if k != "padding"}
        assert {k: metrics[k] for k in same} == pytest.approx(same, rel=1e-5, abs=1e-7)


def test_statistics_are_of_what_was_judged(double: Policy) -> None:
    conversations = played(double, [3, 3, 3, 3])
    agent = agent_of("rebn", double)
    data = batch(conversations, double.pad_id)
    whole = agent._credit(conversations, data)
    turns = turns_of(data, whole, whole.credit, None, Alone())
    advantage = resolve(agent.method.advantage)(turns, agent.options)
    assert float(advantage.mean()) == pytest.approx(0, abs=1e-12)
    assert float(advantage.std(correction=0)) == pytest.approx(1)
    assert int(turns.lengths.sum()) == int(trained_tokens(data).sum())
    measured = agent._measure(data, entropies(double, 1.0), trained_tokens(data))
    entropy = turns_of(data, whole, whole.credit, measured, Alone()).entropy
    logits = double.model(input_ids=data.ids[:1]).logits[0].double().log_softmax(-1)
    span = conversations[0].spans()[1]
    of_turn = [-(logits[i - 1].exp() * logits[i - 1]).sum().detach() for i in range(span.start, span.end)]
    assert float(entropy[0, 1]) == pytest.approx(float(torch.stack(of_turn).mean()), rel=1e-5)


def test_what_is_kept() -> None:
    rewards = np.array([[0.2, math.nan], [0.9, 0.1], [0.8, 0.8], [math.nan, math.nan], [0.8, 0.8]])
    whole: Any = type("Batch", (), {})()
    whole.valid = np.isfinite(rewards)
    whole.credits = Credits(rewards, whole.valid, np.zeros_like(whole.valid), credit.full(2))  # two ended early
    assert best_share(whole, {"keep": 0.25}).tolist() == [False, False, True, False, False]
    assert best_share(whole, {"keep": 0.5}).tolist() == [False, False, True, False, True]
    # The first turn is easy. A conversation that was lost after it does not win by that.
    rewards = np.array([[1.0, math.nan], [1.0, 0.4], [1.0, 0.6]])
    whole.valid = np.isfinite(rewards)
    whole.credits = Credits(rewards, whole.valid, ~whole.valid, credit.full(2))
    assert best_share(whole, {"keep": 0.3}).tolist() == [False, False, True]


def test_a_second_step_moves_the_ratio_and_what_is_clipped_is_counted(make_policy: Make) -> None:
    conversations = played(make_policy(), [2, 2, 2, 2])
    options: dict[str, Any] = {"learning_rate": 0.02, "max_grad_norm": 1.0}
    once = agent_of("grpo", make_policy(), **options).learn(conversations)
    assert (once["clip_fraction"], once["policy_version"]) == (0, 1)
    assert once["ratio_max"] == pytest.approx(1, abs=1e-4)
    twice = agent_of("grpo", make_policy(), steps_per_batch=2, **options).learn(conversations)
    assert twice["clip_fraction"] > 0.2
    assert twice["ratio_max"] > 1.2
    assert (twice["policy_version"], twice["log_prob_gap_max"]) == (2, once["log_prob_gap_max"])
    weighed = agent_of("ppg", make_policy(), steps_per_batch=2, importance="turn", **options).learn(conversations)
    assert weighed["importance_ess"] < 1
    with pytest.raises(ValueError, match="set importance to 'turn' or 'token'"):
        Learner(make_policy(), credit.full, steps_per_batch=2)


def test_a_divergence_is_measured_and_pulls(double: Policy) -> None:
    conversations = played(double, [2, 2, 2, 2])
    for name in ("ppg", "grpo", "rloo"):
        free, without = gradient(name, double, conversations)
        pulled, metrics = gradient(name, double, conversations, kl_coefficient=0.5)
        assert "kl" not in without
        assert math.isfinite(metrics["kl"])
        assert float((pulled - free).abs().max()) > 1e-3


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("grpo", {"clip_lo": 0.1}, r"an option of 'grpo' \(clip_low, .*, got 'clip_lo'; did you mean 'clip_low'"),
    ("base", {"clip_low": 0.1}, r"an option of 'base' \(none\)"),
    ("grpo", {"clip_low": "small"}, "clip_low: expected float, got 'small'"),
    ("grpo", {"clip_low": 2.0}, "clip_low in"),
    ("grpo", {"baseline": "none"}, "expected baseline = 'batch-mean', got 'none': its advantage has its own baseline"),
    ("cispo", {"importance": "turn"}, "expected importance = 'none', got 'turn'"),
    ("cispo", {"max_weight": 0.5}, "max_weight >= 1"),
    ("rpg", {"divergence": "reverse-u"}, "expected one of .*, got 'reverse-u'; did you mean 'reverse_u'"),
    ("rpg-forward", {"divergence": "reverse"}, "an option of 'rpg-forward'"),
    ("rpg-forward", {"kl_to_go": True}, "no kl_to_go"),
    ("rpg", {"kl_coefficient": 0.1}, "expected kl_coefficient = 0.0"),
    ("base", {"steps_per_batch": 2}, "takes no optimiser step"),
    ("best-of-n", {"n": 0}, "n >= 1"),
    ("sft", {"keep": 0.0}, r"keep in \(0, 1\]"),
    ("sft", {"mask": credit.greedy}, "leave out --policy-class"),
    ("dr-grpo", {"aggregation_of_source": True}, "expected a sampler"),
    ("dapo", {"aggregation_of_source": True, "aggregation": "turn_mean"}, "got both"),
    ("ppo", {"mask": credit.greedy}, "set agent_options.credit=class"),
    ("ppo", {"discount": 0.9}, "token_discount"),
    ("ppo", {"value_learning_rate": 0.0}, "value_learning_rate > 0"),
    ("ppo", {"baseline": "none"}, "its own baseline"),
    ("a-lol", {"clip": 1.5}, "clip in"),
    ("copg", {"beta": 0.0}, "beta > 0"),
    ("p3o", {"aggregation": "token_mean"}, "no sum over tokens"),
]


@pytest.mark.parametrize(("name", "options", "message"), WRONG, ids=[f"{w[0]}-{next(iter(w[1]))}" for w in WRONG])
def test_wrong_options_are_refused(name: str, options: dict[str, Any], message: str, double: Policy) -> None:
    with pytest.raises(ValueError, match=message):
        agent_of(name, double, **{"n_turns": 3, **options})


def test_a_persona_alone_and_logged_words_are_refused(policy: Policy) -> None:
    conversations = played(policy, [2, 2])
    alone = [replace(t, instruction=f"alone {b}") for b, t in enumerate(conversations)]
    for name in ("rloo", "grpo", "dr-grpo", "dapo"):
        with pytest.raises(ValueError, match=r"at least 2 with each, got 1 with 'alone 0'; add --set group=4"):
            agent_of(name, policy).learn(alone)
    with pytest.raises(ValueError, match="learns from its own samples only"):
        agent_of("grpo", policy).learn_offline(conversations)
    assert agent_of("sft", policy, learning_rate=0.01).learn_offline(conversations)["conversations_kept"] == 1


@pytest.mark.parametrize("name", ["ppg", "empg", "ppo", "copg"])
def test_saved_and_loaded_it_goes_on_as_if_nothing_happened(name: str, make_policy: Make, tmp_path: Path) -> None:
    options: dict[str, Any] = {"learning_rate": 0.01, "max_grad_norm": 1.0, "n_turns": 3}
    agent = agent_of(name, make_policy(), **options)
    for i in range(2):
        agent.learn(played(agent.policy, [3, 2, 3, 3], seed=i))
    agent.save(tmp_path)
    assert {f.suffix for f in tmp_path.iterdir()} <= {".safetensors", ".json", ".jinja"}
    twin = agent_of(name, make_policy(), **options)
    twin.load(tmp_path)
    conversations = played(agent.policy, [3, 2, 3, 3], seed=2)
    assert twin.learn(conversations) == agent.learn(conversations)
    for a, b in zip(agent.policy.parameters(), twin.policy.parameters(), strict=True):
        assert torch.equal(a, b)
    if name == "ppo":
        assert torch.equal(agent.head.weight, twin.head.weight)
        assert bool(agent.head.weight.any())


HEADS: list[tuple[str, dict[str, Any]]] = [
    ("ppo", {"credit": "class"}),
    ("ppo", {}),
    ("bi-level-gae", {}),
    ("a-lol", {"value": "head"}),
]


@pytest.mark.parametrize(("name", "options"), HEADS[:3])
def test_a_value_head_starts_from_the_turns_means(name: str, options: dict[str, Any], double: Policy) -> None:
    conversations = [replace(t, turns=tuple(replace(turn, token_ids=turn.token_ids[-2:], log_probs=turn.log_probs[-2:])
                     for turn in t.turns)) for t in played(double, [3, 3, 2, 3])]  # fmt: skip
    conversations = sampled(double, conversations)  # replies of one length weigh the same
    expected, _ = gradient("ppg", double, conversations, credit.full, baseline="batch-mean")
    got, metrics = gradient(name, double, conversations, credit.full, whiten=False, **options)
    close(got, expected)
    assert metrics["explained_variance"] == pytest.approx(metrics["explained_variance_constant"])


@pytest.mark.parametrize(("name", "options"), HEADS)
def test_a_value_head_learns_what_the_state_says_beyond_the_turn(
    name: str, options: dict[str, Any], make_policy: Make, on_ranks: Callable[..., list[Any]]
) -> None:
    """Conversations of the other ranks count: two ranks have the values, and the weights, of one."""

    def learned(policy: Policy, workers: Any, share: slice) -> tuple[list[dict[str, float]], Any]:
        agent = agent_of(name, policy, credit.full, value_learning_rate=0.3, value_clip=0.0, workers=workers, **options)
        metrics = []
        for _ in range(12):
            metrics.append(agent.learn(conversations[share]))
            policy.version = 0
        return metrics, agent.head.weight.detach().clone()

    conversations = played(make_policy(), [3, 3, 2, 3])
    metrics, weight = learned(make_policy(), Alone(), slice(None))
    assert metrics[0]["explained_variance"] == pytest.approx(metrics[0]["explained_variance_constant"])
    assert metrics[-1]["explained_variance"] > metrics[-1]["explained_variance_constant"] + 0.1
    policies = [make_policy(), make_policy()]
    for both, same in on_ranks(
        2, lambda own: learned(policies[own.rank], own, slice(0, 2) if own.main else slice(2, 4))
    ):
        assert both[-1]["explained_variance"] == pytest.approx(metrics[-1]["explained_variance"], abs=1e-4)
        torch.testing.assert_close(same, weight, rtol=1e-3, atol=1e-3)


def test_explained_variance_by_hand(make_policy: Make) -> None:
    """Three conversations of two turns, rewards 0 and 1: the returns of full planning are 1, 0; 1, 1; 2, 1."""
    policy = make_policy()
    rewards = [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)]
    conversations = [
        replace(t, turns=tuple(replace(turn, reward=r) for turn, r in zip(t.turns, both, strict=True)))
        for t, both in zip(played(policy, [2, 2, 2]), rewards, strict=True)
    ]
    returns = np.array([[1.0, 0.0], [1.0, 1.0], [2.0, 1.0]])
    metrics = agent_of("ppo", policy, credit.full, credit="class").learn(conversations)
    of_turns = ((returns - returns.mean(0)) ** 2).sum() / ((returns - returns.mean()) ** 2).sum()
    assert metrics["explained_variance_constant"] == pytest.approx(1 - of_turns)
    assert metrics["explained_variance"] == pytest.approx(1 - of_turns)  # a new head is that constant


def test_a_turn_that_one_conversation_reached_keeps_the_last_known_mean(make_policy: Make) -> None:
    policy = make_policy()
    agent = agent_of("ppo", policy, credit.full, credit="class", whiten=False)
    first = played(policy, [2, 2])
    agent.learn(first)
    mean = agent.head.intercepts.clone()
    policy.version = first[0].turns[0].policy_version
    lone = replace(first[1], turns=first[1].turns[:1])
    agent.learn([first[0], lone])
    assert float(agent.head.intercepts[1]) == float(mean[1])
    assert float(agent.head.intercepts[0]) != float(mean[0])


def test_a_conversation_that_was_cut_goes_on_with_the_value_of_its_end(double: Policy) -> None:
    conversations = played(double, [2, 2])
    agent = agent_of("ppo", double, credit.full, whiten=False)

    def advantages(truncated: bool) -> Any:
        cut = [replace(t, truncated=truncated, terminated=not truncated) for t in conversations]
        data = batch(cut, double.pad_id)
        critique = agent._advantage(cut, data, agent._credit(cut, data), 1.0, sampled=True)
        assert critique.per_token
        return critique.advantage[trained_tokens(data)].numpy()

    mean_of_the_last_turn = advantages(True) - advantages(False)
    np.testing.assert_allclose(mean_of_the_last_turn, float(agent.head.intercepts[1]), rtol=1e-6)


def test_p3o_is_leave_one_out_and_copg_is_refuel(double: Policy) -> None:
    conversations = played(double, [3, 3, 3, 3])
    expected, _ = gradient("ppg", double, conversations, credit.greedy, baseline="leave-one-out")
    got, metrics = gradient("p3o", double, conversations)
    close(got, expected)
    assert metrics["pairs_dropped"] == 0
    branch = [replace(t, turns=t.turns[:1]) for t in conversations]  # their first replies share a history, and no other
    close(gradient("p3o", double, branch)[0], gradient("ppg", double, branch, baseline="leave-one-out")[0])
    for eta in (1.0, 0.5):
        trained, _ = gradient("refuel", double, conversations, eta=eta)
        close(trained, 4 * eta * gradient("p3o", double, branch)[0])  # at the sampling policy u = 0


def test_a_pair_that_does_not_share_its_history_is_dropped(double: Policy) -> None:
    conversations = played(double, [2, 2, 2, 2])
    other = replace(conversations[1].turns[0], prompt_ids=(1, 2, 3))
    parted = [conversations[0], replace(conversations[1], turns=(other, *conversations[1].turns[1:]))]
    same = [conversations[2], conversations[2]]
    assert branch_point(*conversations[:2]) == 0
    assert (branch_point(*parted), branch_point(*same)) == (None, None)
    alone, _ = gradient("refuel", double, conversations[:2])
    got, metrics = gradient("refuel", double, [*conversations[:2], *sampled(double, parted), *same])
    assert metrics["pairs_dropped"] == 2
    close(3 * got, alone)
    with pytest.raises(ValueError, match="expected pairs of conversations with one persona"):
        gradient("copg", double, [*conversations[1:], conversations[0]])


@pytest.mark.parametrize("partner", ["same", "moody"])
def test_a_second_conversation_shares_the_history_of_the_first(partner: str, policy: Policy, toy_envs: Any) -> None:
    sampler = HFSampler(policy, max_new_tokens=6)
    envs = toy_envs(*[{"turns": 4}] * 8)
    seeds = [seed for seed in range(8) for _ in range(2)]
    calls = iter(range(2))

    def play(sampler: Any, seeds: Any) -> list[Trajectory]:
        offset = 100 * next(calls) if partner == "moody" else 0
        generator = torch.Generator().manual_seed(len(seeds) + offset)
        return collect(envs, policy, sampler, [seed + offset for seed in seeds], generator)

    rng = np.random.default_rng(0)
    turns = np.random.default_rng(0).integers(np.full(8, 4))
    pairs = play_pairs(play, sampler, seeds, rng, policy.end_of_turn_id)
    points = [branch_point(one, two) for one, two in zip(pairs[::2], pairs[1::2], strict=True)]
    if partner == "moody":
        assert points == [None] * 8
        return
    parted = 0
    for one, two, h, at in zip(pairs[::2], pairs[1::2], turns, points, strict=True):
        assert one.turns[:h] == two.turns[:h]
        assert one.persona == two.persona
        if at is not None:
            assert at >= h
            parted += 1
    assert parted >= 6
    agent = Learner(policy, credit.full, baseline="none")
    assert agent.learn(pairs)["log_prob_gap_max"] < 1e-4  # what followed was sampled after the whole history


FROM_GROUPS = [name for name in LEARNING if METHODS[name].advantage and name not in ("sft", "reinforce++", "rebn")]


@pytest.mark.parametrize("name", ["ppg", "cispo", "p3o", "a-lol", *FROM_GROUPS])
def test_faults_of_judge_and_partner_teach_nothing(name: str, double: Policy) -> None:
    """Where all rewards are equal there is nothing to learn, whoever was lost or not judged."""
    conversations = [
        replace(conversation, turns=tuple(replace(turn, reward=0.8) for turn in conversation.turns))
        for conversation in played(double, [4, 4, 4, 4, 2, 4, 4, 4])
    ]
    conversations[4] = replace(conversations[4], truncated=True, terminated=False, partner_status="error", lost=True)
    first, second, *rest = conversations[6].turns
    conversations[6] = replace(conversations[6], turns=(first, replace(second, reward=math.nan), *rest))
    mask = FULL.get(name, lambda n: credit.k_step(n, 3))
    got, _ = gradient(name, double, conversations, mask)
    assert float(got.abs().max()) < 1e-9
    ended = replace(conversations[4], lost=False, partner_status="ok")  # its own end is no fault, and pays
    paid, _ = gradient(name, double, [*conversations[:4], ended, *conversations[5:]], mask)
    assert name in ("a-lol",) or float(paid.abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["ppo", "bi-level-gae"])
def test_a_lost_conversation_has_the_advantages_of_the_others(name: str, double: Policy) -> None:
    conversations = [
        replace(conversation, turns=tuple(replace(turn, reward=0.8) for turn in conversation.turns))
        for conversation in played(double, [3, 3, 1, 3])
    ]
    conversations[2] = replace(conversations[2], truncated=True, terminated=False, lost=True)
    first, second, third = conversations[1].turns
    conversations[1] = replace(conversations[1], turns=(first, replace(second, reward=math.nan), third))
    agent = agent_of(name, double, whiten=False)
    data = batch(conversations, double.pad_id)
    whole = agent._credit(conversations, data)
    critique = agent._advantage(conversations, data, whole, 1.0, sampled=True)
    trained = trained_tokens(data)
    assert agent.head is not None
    torch.testing.assert_close(agent.head.intercepts[:3], torch.tensor([2.4, 1.6, 0.8], dtype=torch.float64))
    torch.testing.assert_close(critique.advantage[trained], torch.zeros(int(trained.sum()), dtype=torch.float64))
