"""REFUEL, ReBN, bi-level GAE: by hand, and what they reduce to."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ppg_agents import alternatives as alt
from ppg_agents import baselines
from ppg_agents import credit as c

REWARDS = torch.tensor([0.2, 1.0, -0.7, 0.4], dtype=torch.float64)
OLD = torch.log_softmax(torch.tensor([0.1, -0.3, 0.6, 0.0], dtype=torch.float64), 0)
VALID = torch.ones(16, 1, dtype=torch.bool)


def all_pairs(values: Tensor) -> tuple[Tensor, Tensor]:
    return values.repeat_interleave(4)[:, None], values.repeat(4)[:, None]


def test_refuel_by_hand() -> None:
    one = torch.tensor([[0.5]], dtype=torch.float64, requires_grad=True)
    two, high, low = (torch.tensor([[v]], dtype=torch.float64) for v in (0.2, 1.0, 0.4))
    loss = alt.refuel(one, two, high, low, torch.tensor([[True]]), eta=2.0)
    # (0.3 − 2·0.6)²
    assert loss.item() == pytest.approx(0.81)
    assert torch.autograd.grad(loss.sum(), one)[0].item() == pytest.approx(-1.8)


def test_refuel_is_zero_at_the_exact_solution_and_is_copg_there_and_elsewhere() -> None:
    eta = 1.7
    solution = torch.log_softmax(OLD + eta * REWARDS, 0)
    at_rest = alt.refuel(*all_pairs(solution - OLD), *all_pairs(REWARDS), VALID, eta=eta)
    assert at_rest.abs().max() < 1e-28
    leaf = torch.tensor([0.5, 0.4, -0.2, -0.9], dtype=torch.float64, requires_grad=True)
    pairs = all_pairs(torch.log_softmax(leaf, 0) - OLD)
    refuel = alt.refuel(*pairs, *all_pairs(REWARDS), VALID, eta=eta)
    copg = alt.copg(*pairs, *all_pairs(REWARDS), VALID, beta=1 / eta)
    for b in range(16):
        (one,) = torch.autograd.grad(refuel[b, 0], leaf, retain_graph=True)
        (other,) = torch.autograd.grad(copg[b, 0], leaf, retain_graph=True)
        torch.testing.assert_close(one, 2 * eta * other, rtol=0, atol=1e-14)


NAN = math.nan
CREDIT = torch.tensor([[1.0, NAN, 3.0], [5.0, 7.0, NAN]], dtype=torch.float64)
PLAYED = torch.tensor([[True, False, True], [True, True, False]])


def test_rebn_by_hand() -> None:
    # 1, 3, 5, 7: mean 4, biased variance 5
    root = math.sqrt(5)
    expected = torch.tensor([[-3, 0, -1], [1, 3, 0]], dtype=torch.float64) / root
    got = alt.rebn(CREDIT, PLAYED)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(got[PLAYED].std(correction=0).item(), 1.0, rtol=0, atol=1e-8)
    torch.testing.assert_close(alt.rebn(CREDIT.flip(0), PLAYED.flip(0)), got.flip(0))
    np.testing.assert_allclose(got, baselines.standardise(CREDIT.numpy(), PLAYED.numpy()), atol=1e-7)
    assert not alt.rebn(torch.full_like(CREDIT, 0.3), PLAYED).any()
    assert not alt.rebn(CREDIT, torch.zeros_like(PLAYED)).any()


# Turns of two, one and two tokens with the partner between them; one turn of three tokens.
MASK = torch.tensor([[1, 1, 0, 1, 0, 1, 1], [1, 1, 1, 0, 0, 0, 0]], dtype=torch.bool)
TURN = torch.tensor([[0, 0, 9, 1, -1, 2, 2], [0, 0, 0, 0, 0, 0, 0]])
VALUES = torch.tensor([[0.1, 0.3, 9, 0.2, 9, 0.5, 0.4], [0.7, 0.2, 0.6, 9, 9, 9, 9]], dtype=torch.float64)
SCORES = torch.tensor([[1.0, 0.0, 0.5], [2.0, NAN, NAN]], dtype=torch.float64)
THERE = torch.tensor([[True, True, True], [True, False, False]])


def test_bi_level_gae_by_hand() -> None:
    got = alt.bi_level_gae(SCORES, VALUES, MASK, TURN, THERE, discount=0.8, turn_discount=0.9, lam=0.5)
    # V at turn ends: 0.3, 0.2, 0.4. The turn scored 0 is a turn.
    a2 = 0.5 - 0.4
    a1 = 0 + 0.9 * 0.4 - 0.2 + 0.45 * a2
    a0 = 1 + 0.9 * 0.2 - 0.3 + 0.45 * a1
    first = 0.8 * 0.3 - 0.1 + 0.4 * a0
    sixth = 0.8 * 0.4 - 0.5 + 0.4 * a2
    torch.testing.assert_close(got.advantage[0], torch.tensor([first, a0, 0, a1, 0, sixth, a2], dtype=torch.float64))
    torch.testing.assert_close(got.target, (got.advantage + VALUES).masked_fill(~MASK, 0.0))


def rewards() -> Tensor:
    return alt.at_turn_ends(SCORES, MASK, TURN)


def test_bi_level_gae_is_gae_when_the_levels_agree() -> None:
    everything = alt.bi_level_gae(SCORES, VALUES, MASK, TURN, THERE)
    torch.testing.assert_close(everything.advantage, alt.gae(rewards(), VALUES, MASK).advantage)
    to_go = torch.tensor([[1.5, 1.5, 0, 0.5, 0, 0.5, 0.5], [2, 2, 2, 0, 0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(everything.target, to_go)
    # one turn, any γ and λ
    one_turn = alt.bi_level_gae(SCORES, VALUES, MASK, TURN, THERE, discount=0.8, turn_discount=0.3, lam=0.6)
    plain = alt.gae(rewards(), VALUES, MASK, discount=0.8, lam=0.6)
    torch.testing.assert_close(one_turn.advantage[1], plain.advantage[1])
    # turns of one token, γ = γ_T
    values = VALUES[:1, [1, 3, 6]]
    mask, turn = torch.ones(1, 3, dtype=torch.bool), torch.tensor([[0, 1, 2]])
    short = alt.bi_level_gae(SCORES[:1], values, mask, turn, THERE[:1], discount=0.8, turn_discount=0.8, lam=0.6)
    plain = alt.gae(SCORES[:1], values, mask, discount=0.8, lam=0.6)
    torch.testing.assert_close(short.advantage, plain.advantage)
    torch.testing.assert_close(short.target, plain.target)


def test_bi_level_gae_takes_a_policy_class() -> None:
    greedy = alt.bi_level_gae(SCORES, VALUES, MASK, TURN, THERE, turn_discount=0.0)
    expected = torch.tensor([[1, 1, 0, 0, 0, 0.5, 0.5], [2, 2, 2, 0, 0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(greedy.target, expected)
    for mask, discount in ((c.greedy(3), 0.0), (c.full(3), 1.0)):
        credit = torch.from_numpy(c.credit(SCORES.numpy(), mask, THERE.numpy()))
        by_class = alt.bi_level_gae(SCORES, VALUES, MASK, TURN, THERE, turn_targets=credit)
        by_recursion = alt.bi_level_gae(SCORES, VALUES, MASK, TURN, THERE, turn_discount=discount)
        torch.testing.assert_close(by_class.advantage, by_recursion.advantage)


def test_bi_level_gae_leaves_an_invalid_turn_out() -> None:
    valid = THERE & torch.tensor([True, False, True])
    got = alt.bi_level_gae(
        torch.where(valid, SCORES, NAN), VALUES, MASK, TURN, valid, discount=0.8, turn_discount=0.9, lam=0.5
    )
    shorter = MASK & (TURN != 1)
    renumbered = torch.where(TURN == 2, 1, TURN)
    expected = alt.bi_level_gae(
        SCORES[:, [0, 2]], VALUES, shorter, renumbered, valid[:, [0, 2]], discount=0.8, turn_discount=0.9, lam=0.5
    )
    torch.testing.assert_close(got.advantage, expected.advantage)
    torch.testing.assert_close(got.target, expected.target)
    assert got.advantage[0, 3] == 0
