"""Faults of judge and partner cost nobody anything: by enumeration on the tabular MDP, and by hand."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest
from numpy.typing import NDArray

from ppg_agents import baselines, missing
from ppg_agents import credit as c
from ppg_agents.missing import Credits, observation_weights
from tests.agents.test_gradient import (
    CLASSES,
    MDP,
    TOLERANCE,
    Array,
    Rollouts,
    all_rollouts,
    batch_gradient,
    expected_gradient,
    make_mdp,
)

Flags = NDArray[np.bool_]
COLUMNS = np.random.default_rng(3).normal(size=16)
BASELINES: dict[str, missing.Baseline] = {
    "leave-one-out": partial(baselines.leave_one_out, groups=["one"] * 2),
    "batch-mean": baselines.batch_mean,
    "group-mean": partial(baselines.group_mean, groups=["one"] * 2),
    "moving-average": lambda rewards, seen: np.broadcast_to(COLUMNS[: rewards.shape[1]], rewards.shape),
}


def with_faults(played: int, n: int, p: float) -> list[tuple[list[bool], list[bool], float]]:
    """Return valid, missing and probability of every way that faults treat a conversation of ``played`` turns.

    With probability p it is lost before a turn, the first one too, and with p a turn that was played has no score.
    """
    if not n:
        return [([], [], 1.0)]
    if not played:
        return [([False] * n, [False] * n, 1.0)]
    found = [([False] * n, [True] * n, p)]
    for judged, share in ((True, (1 - p) ** 2), (False, (1 - p) * p)):
        rest = with_faults(played - 1, n - 1, p)
        found += [([judged, *valid], [not judged, *gone], share * chance) for valid, gone, chance in rest]
    return [way for way in found if way[2]]


@pytest.mark.parametrize("p", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("ends", [False, True], ids=["fixed-length", "policy-ends"])
@pytest.mark.parametrize("name", CLASSES)
def test_with_known_rates_the_expected_gradient_is_that_without_faults(
    name: str, ends: bool, p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    mdp, (mask, _) = make_mdp(seed=11, ends=ends, states=2 + ends), CLASSES[name]
    whole = all_rollouts(mdp)
    ways = [(b, *way) for b in range(len(whole.valid)) for way in with_faults(int(whole.valid[b].sum()), 4, p)]
    rows, valid, gone, chances = (list(column) for column in zip(*ways, strict=True))
    probability = whole.probability[rows] * chances
    assert probability.sum() == pytest.approx(1, abs=1e-12)
    played = Rollouts(whole.states[rows], whole.actions[rows], whole.rewards[rows], np.array(valid), probability)
    monkeypatch.setattr(missing, "rates", lambda reached, lost, silent: (np.full(reached.shape[1], p),) * 2)
    credits = Credits(played.rewards, played.valid, np.array(gone), mask)
    for baseline in (BASELINES["moving-average"], lambda rewards, seen: np.zeros(rewards.shape)):
        advantage = credits.against(baseline) * credits.replies * probability[:, None] * len(rows)
        got = batch_gradient(mdp, played, advantage)
        np.testing.assert_allclose(got, expected_gradient(mdp, mask), rtol=0, atol=TOLERANCE)


def test_without_that_mend_the_gradient_was_wrong() -> None:
    """The same enumeration, with a missing reward as 0: at p = .3 the first turn is far off."""
    mdp, mask = make_mdp(seed=11, states=2), c.full(4)
    whole, p = all_rollouts(mdp), 0.3
    ways = [(b, *way) for b in range(len(whole.valid)) for way in with_faults(4, 4, p)]
    rows, valid, _, chances = (list(column) for column in zip(*ways, strict=True))
    probability = whole.probability[rows] * chances
    played = Rollouts(whole.states[rows], whole.actions[rows], whole.rewards[rows], np.array(valid), probability)
    plain = c.credit(played.rewards, mask, played.valid) * probability[:, None] * len(rows)
    ratio = np.abs(batch_gradient(mdp, played, plain)[0]) / np.abs(expected_gradient(mdp, mask)[0])
    assert ratio.max() < 0.6


@pytest.fixture(scope="module")
def two_turns() -> MDP:
    """Two turns whose states depend on the first action: 8 paths, 64 batches of two."""
    mdp = make_mdp(seed=12, n=2, states=2)
    return MDP(np.array([1.0, 0.0]), mdp.transition, mdp.reward, mdp.theta, ends=False)


def test_for_every_pattern_of_faults_the_expected_gradient_is_that_without(two_turns: MDP) -> None:
    """With rates estimated from the batch itself: a batch of two, every pattern, every baseline."""
    one, mdp, mask = all_rollouts(two_turns), two_turns, np.array([[1, 0.25], [0, 2]])
    rows = np.array(list(itertools.product(range(len(one.valid)), repeat=2)))
    probability = one.probability[rows].prod(1)
    truth = {
        (t, ell): mask[t, ell] * expected_gradient(mdp, np.outer(np.eye(2)[t], np.eye(2)[ell]))
        for t in range(2)
        for ell in range(t, 2)
    }
    ways = [(np.array(valid), np.array(gone)) for valid, gone, _ in with_faults(2, 2, 0.5)]
    assert len(ways) == 7
    for first, second in itertools.combinations_with_replacement(ways, 2):
        valid, gone = (np.stack(pair) for pair in zip(first, second, strict=True))
        has_both = valid[:, :, None] & ~gone[:, None, :]
        number = has_both.sum(0)
        advantages: dict[str, list[Array]] = {name: [] for name in (*BASELINES, "none")}
        for batch in rows:
            credits = Credits(one.rewards[batch], valid, gone, mask)
            for name, baseline in BASELINES.items():
                advantages[name].append(credits.against(baseline) * credits.replies)
            advantages["none"].append(credits.filled() * credits.replies)
        flat = rows.reshape(-1)
        played = Rollouts(
            one.states[flat],
            one.actions[flat],
            one.rewards[flat],
            np.tile(valid, (len(rows), 1)),
            one.probability[flat],
        )
        for name, parts in advantages.items():
            weighed = np.concatenate(parts) * probability.repeat(2)[:, None] * len(rows)
            expected = np.zeros(mdp.theta.shape)
            for (t, ell), gradient in truth.items():
                if number[t, ell]:  # a mean that holds the own reward shrinks the step, with faults or without
                    own = 1 - 1 / number[t, ell] if name in ("batch-mean", "group-mean") else 1.0
                    expected += own * gradient
            got = batch_gradient(mdp, played, weighed)
            np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE, err_msg=f"{name}, {valid}, {gone}")


# The example: 16 conversations of 8 turns, every reward .8; a partner lost after turn 3, turn 5 of another unjudged.
VALID = np.ones((16, 8), dtype=bool)
VALID[0, 3:], VALID[1, 4] = False, False
REWARDS = np.where(VALID, 0.8, np.nan)
EVERY_CLASS = {"full": c.full(8), "greedy": c.greedy(8), "3-step": c.k_step(8, 3), "segment": c.segment(8, [3, 5])}
PERSONAS = [b // 4 for b in range(16)]


@pytest.mark.parametrize("mask", EVERY_CLASS.values(), ids=EVERY_CLASS)
def test_where_all_rewards_are_equal_nobody_pays_for_a_fault(mask: c.Mask) -> None:
    credits = Credits(REWARDS, VALID, ~VALID, mask)
    average = baselines.MovingAverage(64)
    average(np.full((1, 64), 0.8), np.ones((1, 64), dtype=bool))
    for name in ("batch-mean", "leave-one-out", "moving-average"):
        baseline = baselines.named(name, PERSONAS, average)
        assert baseline is not None
        np.testing.assert_allclose(credits.against(baseline), 0, atol=1e-14)
    np.testing.assert_allclose(credits.against(partial(baselines.group_mean, groups=PERSONAS)), 0, atol=1e-14)
    whole = np.where(VALID, c.credit(np.full((16, 8), 0.8), mask, np.ones_like(VALID)), 0.0)
    np.testing.assert_allclose(credits.filled(), whole, atol=1e-14)
    np.testing.assert_allclose(credits.filled([b // 2 for b in range(16)]), whole, atol=1e-14)
    np.testing.assert_allclose(credits.filled_rewards(), 0.8, atol=1e-14)


def test_an_end_that_the_policy_chose_is_worth_nothing_and_pays() -> None:
    rewards, mask = REWARDS[:, :], c.full(8)
    missing_rewards = ~VALID
    missing_rewards[0] = False  # now conversation 0 has ended after turn 3
    credits = Credits(rewards, VALID, missing_rewards, mask)
    assert credits.filled()[0, :3] == pytest.approx([2.4, 1.6, 0.8])
    assert (credits.against(baselines.batch_mean)[0, :3] < -3).all()


def test_weights_by_hand() -> None:
    # Four conversations of three turns: 0 is lost after turn 0, 1 has no score at turn 1, 2 and 3 are whole.
    valid = np.array([[1, 0, 0], [1, 0, 1], [1, 1, 1], [1, 1, 1]], dtype=bool)
    replies, pairs = observation_weights(valid, ~valid)
    # Turn 1 was played in 3 of 4 and judged in 2 of these 3; turn 2 in 3 of 4.
    assert replies.tolist() == pytest.approx(np.array([[1, 0, 0], [1, 0, 4 / 3], [1, 2, 4 / 3], [1, 2, 4 / 3]]))
    assert pairs[:, 0].tolist() == pytest.approx(np.array([[1, 0, 0], [1, 0, 4 / 3], [1, 2, 4 / 3], [1, 2, 4 / 3]]))
    assert pairs[:, 1].tolist() == pytest.approx(np.array([[0, 0, 0], [0, 0, 0], [0, 1, 1], [0, 1, 1]]))
    assert not np.tril(pairs[3], -1).any()
    # Had conversation 1 ended after turn 0, by its own choice, it could not have been lost: 1 of 3 was, not 1 of 4.
    ended = np.array([[1, 0, 0], [1, 0, 0], [1, 1, 1], [1, 1, 1]], dtype=bool)
    lost = np.zeros_like(ended)
    lost[0, 1:] = True
    _, pairs = observation_weights(ended, lost)
    assert pairs[:, 0].tolist() == pytest.approx(np.array([[1, 0, 0], [1, 1, 1], [1, 1.5, 1.5], [1, 1.5, 1.5]]))


def test_without_faults_it_is_plain_credit() -> None:
    random = np.random.default_rng(5)
    rewards, valid = random.random((6, 4)), random.random((6, 1)) * 5 > np.arange(4)
    mask, none = c.k_step(4, 3), np.zeros((6, 4), dtype=bool)
    credits = Credits(rewards, valid, none, mask, 0.9)
    plain = c.credit(rewards, mask, valid, 0.9)
    assert credits.filled().tobytes() == plain.tobytes()
    for baseline in (baselines.batch_mean, partial(baselines.leave_one_out, groups=[0] * 6)):
        expected = np.where(valid, plain - baseline(plain, valid), 0.0)
        np.testing.assert_allclose(credits.against(baseline), expected, atol=1e-14)


def test_a_reward_is_not_both_judged_and_missing() -> None:
    with pytest.raises(ValueError, match="true only where valid is false"):
        Credits(REWARDS, VALID, VALID, c.full(8))
