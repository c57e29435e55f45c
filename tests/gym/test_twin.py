"""The exact twin: its formulas against brute force, the horizon of each domain, and language against the twin."""

from __future__ import annotations

import functools
import itertools
import re
from typing import Any

import numpy as np
import pytest

from ppg_agents import credit
from ppg_gym.domain.loading import DOMAINS, folder, load
from ppg_gym.domain.reading import reader
from ppg_gym.domain.saying import say
from ppg_gym.domain.twin import Array, Twin, influence, softmax
from ppg_gym.simulator import Simulator

STEPS = 300  # of exact ascent: every class is within 0.001 of where 4,000 steps end
CONVERSATIONS = 400


def small(seed: int = 0, states: int = 3, kinds: int = 2) -> Twin:
    """Return a random twin."""
    rng = np.random.default_rng(seed)
    step = rng.integers(states, size=(states, kinds))
    return Twin(tuple("abc"[:states]), tuple("xyz"[:kinds]), rng.random((states, kinds)), step)


def random_logits(twin: Twin, n: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).normal(size=(n, len(twin.states), len(twin.kinds)))


def plays(twin: Twin, n: int) -> Any:
    """Yield (actions, states, rewards) of every way to play n turns."""
    for actions in itertools.product(range(len(twin.kinds)), repeat=n):
        states, rewards = [0], []
        for action in actions:
            rewards.append(twin.score[states[-1], action])
            states.append(int(twin.step[states[-1], action]))
        yield actions, states[:-1], np.array(rewards)


MASKS = [
    credit.greedy(4),
    credit.k_step(4, 2),
    credit.segment(4, [1, 3]),
    credit.full(4),
    np.triu(np.random.default_rng(5).random((4, 4)) < 0.5),
]


@pytest.mark.parametrize("mask", MASKS)
def test_gradient_and_action_values_equal_enumeration(mask: credit.Mask) -> None:
    twin, n = small(), 4
    logits = random_logits(twin, n)
    policy = softmax(logits)
    gradient = np.zeros_like(logits)
    values, mass = np.zeros_like(logits), np.zeros_like(logits)
    for actions, states, rewards in plays(twin, n):
        chance = np.prod([policy[t, states[t], actions[t]] for t in range(n)])
        for t in range(n):
            credited = (mask[t] * rewards).sum()
            score = -policy[t, states[t]]
            score[actions[t]] += 1.0
            gradient[t, states[t]] += chance * credited * score
            values[t, states[t], actions[t]] += chance * credited
            mass[t, states[t], actions[t]] += chance
    np.testing.assert_allclose(twin.gradient(logits, mask), gradient, atol=1e-13)
    reached = mass > 0
    np.testing.assert_allclose(twin.action_value(policy, mask)[reached], (values / np.where(reached, mass, 1))[reached])


def test_the_full_gradient_is_that_of_the_expected_return() -> None:
    twin, n, eps = small(2), 3, 1e-6
    logits = random_logits(twin, n)
    numeric = np.zeros_like(logits)
    for index in np.ndindex(logits.shape):
        up, down = logits.copy(), logits.copy()
        up[index] += eps
        down[index] -= eps
        numeric[index] = (twin.rewards(softmax(up)).sum() - twin.rewards(softmax(down)).sum()) / (2 * eps)
    np.testing.assert_allclose(twin.gradient(logits, credit.full(n)), numeric, atol=1e-9)


def test_full_action_values_are_those_of_dynamic_programming_and_greedy_ones_the_score() -> None:
    twin, n = small(3, kinds=3), 5
    policy = softmax(random_logits(twin, n))
    q, ahead = np.zeros_like(policy), np.zeros(len(twin.states))
    for t in reversed(range(n)):
        q[t] = twin.score + ahead[twin.step]
        ahead = (policy[t] * q[t]).sum(axis=1)
    np.testing.assert_allclose(twin.action_value(policy, credit.full(n)), q)
    np.testing.assert_allclose(twin.action_value(policy, credit.greedy(n)), np.broadcast_to(twin.score, q.shape))


def test_best_rewards_and_visits_equal_enumeration() -> None:
    twin, n = small(4), 5
    policy = softmax(random_logits(twin, n))
    assert twin.best(n) == pytest.approx(max(rewards.mean() for _, _, rewards in plays(twin, n)))
    expected = sum(
        np.prod([policy[t, s, a] for t, (s, a) in enumerate(zip(states, actions, strict=True))]) * rewards
        for actions, states, rewards in plays(twin, n)
    )
    np.testing.assert_allclose(twin.rewards(policy), expected)
    np.testing.assert_allclose(twin.visits(policy).sum(axis=1), 1.0)


def test_influence_changes_nothing_before_the_turn() -> None:
    twin, n, turn = small(6), 5, 2
    policy = softmax(random_logits(twin, n))
    best, worst = influence(twin, policy, turn, ["x"] * 3, ["y"] * 3)
    np.testing.assert_allclose(best[:turn], worst[:turn])
    assert best[turn] - worst[turn] == pytest.approx(
        (twin.visits(policy)[turn] * (twin.score[:, 0] - twin.score[:, 1])).sum()
    )


def test_a_mix_of_unknown_kinds_is_refused() -> None:
    twin = Twin.of(load("chatting").table)
    with pytest.raises(ValueError, match="expected weights for some of the kinds"):
        twin.policy({"truth": 1.0, "trut": 1.0}, 8)
    with pytest.raises(ValueError, match="expected weights"):
        twin.policy({"truth": 0.0}, 8)


@pytest.mark.parametrize("name", DOMAINS)
def test_a_twin_has_the_rule_table_s_entries(name: str) -> None:
    table = load(name).table
    twin = Twin.of(table)
    for (s, state), (k, kind) in itertools.product(enumerate(twin.states), enumerate(twin.kinds)):
        assert twin.score[s, k] == table.score[state, kind]
        assert twin.states[twin.step[s, k]] == table.next[state, kind]


@functools.cache
def reached(name: str, lookahead: int | None) -> float:
    """Return the mean reward per turn at which a policy class ends, from the domain's own mix."""
    domain = load(name)
    twin, n = Twin.of(domain.table), domain.turns
    start = twin.start(domain, n)
    return float(twin.rewards(twin.ascend(credit.k_step(n, lookahead or n), start, steps=STEPS)).mean())


def test_chatting_needs_no_foresight() -> None:
    assert reached("chatting", 1) >= 0.98 * reached("chatting", None)


def test_therapy_needs_three_steps() -> None:
    assert reached("therapy", 1) <= 0.9 * reached("therapy", None)
    assert reached("therapy", 3) >= 0.98 * reached("therapy", None)


def test_education_needs_the_whole_lesson() -> None:
    assert reached("education", 3) <= 0.95 * reached("education", None)


@pytest.mark.parametrize("name", DOMAINS)
def test_full_planning_reaches_the_optimum(name: str) -> None:
    domain = load(name)
    assert reached(name, None) >= 0.99 * Twin.of(domain.table).best(domain.turns)


@pytest.mark.parametrize("name", DOMAINS)
def test_the_readme_shows_what_is_reached(name: str) -> None:
    domain, text = load(name), (folder(name) / "README.md").read_text(encoding="utf-8")
    shown = {
        label: float(value) for label, value in re.findall(r"^\| ([\w -]+?)(?: \(.*\))? \| ([\d.]+) \|", text, re.M)
    }
    twin, n = Twin.of(domain.table), domain.turns
    start = float(twin.rewards(twin.start(domain, n)).mean())
    expected = {"where learning starts": start, "greedy": reached(name, 1), "3-step": reached(name, 3)}
    expected |= {"full": reached(name, None), "best there is": twin.best(n)}
    assert {label: shown[label] for label in expected} == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("name", DOMAINS)
def test_language_agrees_with_the_twin(name: str) -> None:
    domain, read, simulator = load(name), reader(name), Simulator(name, personas="held-out")
    mixes = {state: domain.mix_in(state) for state in domain.table.states}
    rngs = [np.random.default_rng([7, i]) for i in range(CONVERSATIONS)]
    opened = simulator.open([simulator.persona(None, rng) for rng in rngs], rngs)
    conversations = [conversation for conversation, _ in opened]
    rewards = np.zeros((CONVERSATIONS, domain.turns))
    for t in range(domain.turns):
        chances = [mixes[read.track(c).state] for c in conversations]
        drawn = [str(rng.choice(list(mix), p=list(mix.values()))) for mix, rng in zip(chances, rngs, strict=True)]
        replies = [say(read, k, c, rng) for k, c, rng in zip(drawn, conversations, rngs, strict=True)]
        outcomes = simulator.turn(conversations, replies, rngs)
        conversations = [outcome.conversation for outcome in outcomes]
        rewards[:, t] = [outcome.reward for outcome in outcomes]
    twin = Twin.of(domain.table)
    expected = twin.rewards(twin.start(domain, domain.turns))
    error = rewards.std(axis=0, ddof=1) / np.sqrt(CONVERSATIONS)
    assert np.abs((rewards.mean(axis=0) - expected) / error).max() < 4
