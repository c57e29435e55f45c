"""The classical family: what all token losses share, clips by hand, group statistics, GAE, the value loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from ppg_agents import alternatives as alt
from ppg_agents import baselines
from ppg_agents.agents.gradient import Scored
from ppg_agents.agents.methods import METHODS, resolve
from ppg_agents.alternatives.tokens import to_go, turn_ends, turn_share
from ppg_agents.losses import aggregate, broadcast_credit, partial_policy_gradient, token_policy_gradient

TokenLoss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]  # lp, lp°, A, mask, turn

# Two conversations: turn 0 of two tokens and turn 1 of one (a partner's token between), then turn 0 of three tokens.
MASK = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
TURN = torch.tensor([[-1, 0, 0, 9, 1], [0, 0, 0, -1, -1]])
CREDIT = torch.tensor([[1.0, -0.5], [2.0, 0.0]], dtype=torch.float64)
ADVANTAGE = broadcast_credit(CREDIT, MASK, TURN)
LOG_PROBS = torch.tensor([[-9.0, -1.0, -2.0, -9.0, -4.0], [-1.0, -1.5, -4.0, -9.0, -9.0]], dtype=torch.float64)
NAN = torch.tensor(math.nan, dtype=torch.float64)


def without_turns(loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> TokenLoss:
    return lambda lp, old, adv, mask, turn: loss(lp, old, adv, mask)


LOSSES: dict[str, TokenLoss] = {
    "reinforce": lambda lp, old, adv, mask, turn: token_policy_gradient(lp, adv, mask),
    "ppo": without_turns(alt.ppo_clip),
    "dual": without_turns(partial(alt.ppo_clip, dual_clip=3.0, ratio_cap=4.0)),
    "cispo": without_turns(alt.cispo),
    "sapo": without_turns(alt.sapo),
    "dispo": without_turns(alt.dispo),
    "rpg": partial(alt.rpg_differentiable, divergence="reverse_u", beta=0.3),
    "rpg-turn": partial(alt.rpg_differentiable, divergence="forward_u", beta=0.3, level="turn"),
    "rpg-reinforce": partial(alt.rpg_reinforce, divergence="reverse_u", beta=0.3, clip="paper"),
}


def of(name: str) -> TokenLoss:
    """Return the loss of an agent, with its default options."""
    options = METHODS[name].fill(name, {})
    options.pop("aggregation_of_source", None)

    def loss(lp: Tensor, old: Tensor, adv: Tensor, mask: Tensor, turn: Tensor) -> Tensor:
        part = Scored([0, 1], torch.zeros_like(turn), torch.ones_like(mask), lp, old, mask, turn)
        return resolve(METHODS[name].loss)(part, adv, options)

    return loss


LOSSES |= {f"agent {name}": of(name) for name in METHODS}
PULLED = {  # a term of their own at ratio one: of the normalised divergences (zero on average), of the reference
    *(f"agent rpg-{name}" for name in ("forward", "forward-reinforce", "reverse", "reverse-reinforce")),
    "agent a-lol",
}
DIFFERENTIABLE = ("reinforce", "ppo", "dual", "sapo", "rpg", "rpg-turn")


def gradient(loss: TokenLoss, lp: Tensor, old: Tensor, adv: Tensor, mask: Tensor, turn: Tensor) -> Tensor:
    leaf = lp.clone().requires_grad_()
    per_token = loss(leaf, old, adv, mask, turn)
    assert per_token.shape == mask.shape
    assert not per_token[~mask].any()
    (result,) = torch.autograd.grad(per_token.sum(), leaf)
    return result


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in PULLED])
def test_at_ratio_one_every_gradient_is_that_of_reinforce(name: str) -> None:
    got = gradient(LOSSES[name], LOG_PROBS, LOG_PROBS, ADVANTAGE, MASK, TURN)
    torch.testing.assert_close(got, -ADVANTAGE, rtol=0, atol=1e-15)
    leaf = LOG_PROBS.clone().requires_grad_()
    (policy_gradient,) = torch.autograd.grad(partial_policy_gradient(leaf, MASK, TURN, CREDIT), leaf)
    torch.testing.assert_close(got / 2, policy_gradient, rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", LOSSES)
def test_padding_and_what_is_masked_change_nothing(name: str) -> None:
    old = LOG_PROBS - torch.tensor([[0, 0.1, -0.2, 0, 0.3], [0.05, -0.4, 0.15, 0, 0]], dtype=torch.float64)
    plain = gradient(LOSSES[name], LOG_PROBS, old, ADVANTAGE, MASK, TURN)
    rubbish = [torch.where(MASK, tensor, NAN) for tensor in (LOG_PROBS, old, ADVANTAGE)]
    lp, before, adv = (torch.cat([tensor, NAN.expand(2, 3)], 1) for tensor in rubbish)
    mask, turn = (torch.nn.functional.pad(tensor, (0, 3)) for tensor in (MASK, TURN))
    got = gradient(LOSSES[name], lp, before, adv, mask, turn)
    torch.testing.assert_close(got[:, :5], plain, rtol=0, atol=1e-15)
    assert not got[~mask].any()


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradcheck(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    old = LOG_PROBS + 0.5 * torch.randn(2, 5, dtype=torch.float64, generator=generator)
    leaf = LOG_PROBS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda lp: LOSSES[name](lp, old, ADVANTAGE, MASK, TURN), (leaf,))


def test_an_advantage_per_turn_is_refused_with_a_way_out() -> None:
    with pytest.raises(ValueError, match="broadcast_credit"):
        token_policy_gradient(LOG_PROBS, CREDIT, MASK)


def one_row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def slopes(loss: Callable[..., Tensor], weights: Tensor, adv: Tensor) -> list[float]:
    """Gradient with respect to lp at w = weights, one token each."""
    mask = torch.ones_like(weights, dtype=torch.bool)
    lp = weights.log().requires_grad_()
    (result,) = torch.autograd.grad(loss(lp, torch.zeros_like(weights), adv, mask).sum(), lp)
    return [round(value, 12) for value in result[0].tolist()]


def test_ppo_clip_by_hand() -> None:
    weights, adv = one_row(0.5, 1.1, 1.5, 0.5, 0.9, 1.5, 4.0), one_row(2, 2, 2, -2, -2, -2, -2)
    mask = torch.ones_like(weights, dtype=torch.bool)
    value = alt.ppo_clip(weights.log(), torch.zeros_like(weights), adv, mask, clip_high=0.28)
    # −w·A, −w·A, −1.28·A; then −0.8·A where w < 0.8, else −w·A
    torch.testing.assert_close(value, one_row(-1.0, -2.2, -2.56, 1.6, 1.8, 3.0, 8.0))
    # gradient −w·A, and zero exactly for (A > 0, w > 1.28) and (A < 0, w < 0.8)
    assert slopes(partial(alt.ppo_clip, clip_high=0.28), weights, adv) == [-1.0, -2.2, 0, 0, 1.8, 3.0, 8.0]
    # dual clip: also for (A < 0, w > c)
    assert slopes(partial(alt.ppo_clip, clip_high=0.28, dual_clip=3.0), weights, adv)[-1] == 0
    assert slopes(partial(alt.ppo_clip, ratio_cap=2.0), weights, adv)[-2:] == [3.0, 0]


def test_ppo_without_a_clip_is_importance_weighting_and_so_is_cispo_without_a_bound() -> None:
    weights, adv = one_row(0.1, 3.0, 0.1, 3.0), one_row(1, 1, -2, -2)
    expected = [-0.1, -3.0, 0.2, 6.0]
    assert slopes(partial(alt.ppo_clip, clip_low=1.0, clip_high=math.inf), weights, adv) == expected
    assert slopes(partial(alt.cispo, max_weight=math.inf), weights, adv) == expected
    assert slopes(partial(alt.cispo, max_weight=2.0), weights, adv) == [-0.1, -2.0, 0.2, 4.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(alt.cispo, max_weight=0.2), "max_weight >= 1"),
        (partial(alt.ppo_clip, clip_low=1.2), "clip_low in"),
        (partial(alt.ppo_clip, dual_clip=1.0), "dual_clip > 1"),
        (partial(alt.ppo_clip, ratio_cap=1.1), "ratio_cap > "),
    ],
)
def test_bounds_that_shut_out_ratio_one_are_refused(call: Callable[..., Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(LOG_PROBS, LOG_PROBS, ADVANTAGE, MASK)


def test_an_extreme_ratio_gives_a_finite_gradient() -> None:
    adv = one_row(1.0, -1.0)
    for loss in (alt.ppo_clip, alt.sapo):
        lp, mask = torch.zeros(1, 2, requires_grad=True), torch.ones(1, 2, dtype=torch.bool)
        (got,) = torch.autograd.grad(loss(lp, torch.full((1, 2), -500.0), adv, mask).sum(), lp)
        assert torch.isfinite(got).all()


def test_a_ratio_per_reply_by_hand() -> None:
    sums = alt.turn_sum(alt.log_ratio(LOG_PROBS, LOG_PROBS - math.log(1.1), MASK), MASK, TURN, 2)
    torch.testing.assert_close(sums.exp(), torch.tensor([[1.21, 1.1], [1.331, 1.0]], dtype=torch.float64))
    valid = torch.tensor([[True, True], [True, False]])
    loss = alt.ppo_clip_turns(sums, torch.where(valid, CREDIT, NAN), valid)
    # −min(1.21, 1.2), +½·1.1, −2·1.2, and the turn that was not played
    torch.testing.assert_close(loss, torch.tensor([[-1.2, 0.55], [-2.4, 0.0]], dtype=torch.float64))


@pytest.mark.parametrize("weighted", [True, False])
def test_the_kl_term_has_the_reverse_gradient_with_the_ratio_and_the_forward_one_without(weighted: bool) -> None:
    logits = torch.tensor([0.3, -1.0, 0.8], dtype=torch.float64, requires_grad=True)
    lp = torch.log_softmax(logits, 0)
    reference = torch.log_softmax(torch.tensor([1.0, 0.0, -0.5], dtype=torch.float64), 0)
    mask = torch.ones(3, 1, dtype=torch.bool)
    k3 = alt.kl_term(lp[:, None], reference[:, None], mask, kl_weighted=weighted)[:, 0]
    reverse, forward = (lp.exp() * (lp - reference)).sum(), (reference.exp() * (reference - lp)).sum()
    assert (lp.exp() * k3).sum().item() == pytest.approx(reverse.item())
    (got,) = torch.autograd.grad((lp.detach().exp() * k3).sum(), logits, retain_graph=True)
    (expected,) = torch.autograd.grad(reverse if weighted else forward, logits)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)


# Three nurses and two bakers; one nurse did not play turn 1.
GROUPS = ["nurse", "nurse", "nurse", "baker", "baker"]
PLAYED = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 1], [1, 1]], dtype=torch.bool)
SCORES = torch.tensor([[1, 4], [3, math.nan], [8, 6], [7, 2], [7, 5]], dtype=torch.float64)


def test_rloo_by_hand_and_as_the_baseline() -> None:
    got = alt.rloo(SCORES, PLAYED, GROUPS)
    # turn 0, nurses: 1 − 11/2, 3 − 9/2, 8 − 4/2; turn 1: 4 − 6, 6 − 4
    expected = [[-4.5, -2], [-1.5, 0], [6, 2], [0, -3], [0, 3]]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))
    scores, played = SCORES.numpy(), PLAYED.numpy()
    baseline = baselines.leave_one_out(scores, played, GROUPS)
    np.testing.assert_allclose(got.numpy(), np.where(played, scores - baseline, 0.0), atol=1e-14)


def test_rloo_of_a_turn_reached_alone_asks_the_other_groups_and_a_group_of_one_is_refused() -> None:
    alone = PLAYED & torch.tensor([True, False, False, True, True])[:, None] | torch.tensor([True, False])
    got = alt.rloo(SCORES, alone & PLAYED, GROUPS)
    assert got[0, 1] == 4 - (2 + 5) / 2
    assert alt.grpo(SCORES, alone & PLAYED, GROUPS)[0, 1] == 0
    with pytest.raises(ValueError, match="at least 2 conversations in every group, got 1 of 'baker'"):
        alt.rloo(SCORES, PLAYED, [*GROUPS[:4], "cook"])


def test_grpo_by_hand() -> None:
    got = alt.grpo(SCORES, PLAYED, GROUPS, epsilon=1e-12)
    # nurses, turn 0: mean 4, unbiased variance (9 + 1 + 16)/2 = 13; turn 1: mean 5, variance 2. Bakers: equal; 2 and 5.
    root, half = math.sqrt(13), math.sqrt(0.5)
    expected = [[-3 / root, -half], [-1 / root, 0], [4 / root, half], [0, -half], [0, half]]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))
    shifted = alt.grpo(3 * SCORES + 7, PLAYED, GROUPS, epsilon=1e-12)
    torch.testing.assert_close(shifted, got)


def test_dr_grpo_is_rloo_up_to_the_factor() -> None:
    groups, k = ["one"] * 5, 5
    valid = torch.ones_like(PLAYED)
    scores = SCORES.nan_to_num()
    plain = alt.grpo(scores, valid, groups, scale_by_std=False)
    torch.testing.assert_close(plain, (k - 1) / k * alt.rloo(scores, valid, groups))
    torch.testing.assert_close(alt.grpo(scores, valid, groups, epsilon=1e-12), plain / scores.std(0))
    turn = torch.tensor([[0, 1]] * 5)
    gradients = []
    for adv, aggregation, constant in ((plain, "constant", 8.0), (alt.rloo(scores, valid, groups), "sum", None)):
        lp = torch.full((5, 2), -1.0, dtype=torch.float64, requires_grad=True)
        per_token = alt.ppo_clip(lp, lp.detach(), adv, valid)
        loss = aggregate(per_token, valid, turn, aggregation=aggregation, constant=constant)  # type: ignore[arg-type]
        gradients.append(torch.autograd.grad(loss, lp)[0])
    torch.testing.assert_close(gradients[0], (k - 1) / k / 8 * gradients[1])


def test_dapo_keeps_groups_that_differ_and_fines_long_replies() -> None:
    returns = torch.tensor([1.0, 1.0, 2.0, 3.0, 3.0])
    assert alt.groups_with_spread(returns, GROUPS).tolist() == [True, True, True, False, False]
    fines = alt.overlong_penalty(torch.tensor([5, 6, 8, 10, 30]), max_length=10, buffer=4)
    assert fines.tolist() == [0, 0, -0.5, -1, -1]


@pytest.mark.parametrize("mask", [MASK, MASK & (TURN == 0)])
def test_whitening_over_what_is_masked_in(mask: Tensor) -> None:
    white = alt.whiten(torch.where(mask, LOG_PROBS, NAN), mask)
    assert white[mask].mean().item() == pytest.approx(0, abs=1e-12)
    assert white[mask].var().item() == pytest.approx(1, abs=1e-6)
    assert not white[~mask].any()
    assert not alt.whiten(torch.ones_like(LOG_PROBS), mask).any()


def test_a_divergence_in_the_reward_by_hand() -> None:
    assert alt.at_turn_ends(CREDIT, MASK, TURN).tolist() == [[0, 0, 1, 0, -0.5], [0, 0, 2, 0, 0]]
    shaped = alt.kl_shaped_reward(CREDIT, LOG_PROBS, LOG_PROBS - 0.5, MASK, TURN, beta=0.2)
    torch.testing.assert_close(shaped, torch.tensor([[0.8, -0.6], [1.7, 0.0]]).double())


VALUES = torch.tensor([[9, 0.5, 0.2, 9, 0.4], [0.1, 0.3, 0.6, 9, 9]], dtype=torch.float64)


def test_gae_by_hand_skips_the_partner() -> None:
    rewards = alt.at_turn_ends(CREDIT, MASK, TURN)
    got = alt.gae(rewards, VALUES, MASK, discount=0.9, lam=0.5)
    # δ: −0.5 − 0.4 = −0.9; 1 + 0.36 − 0.2 = 1.16; 0.18 − 0.5 = −0.32, with γλ = 0.45
    a2 = 1.16 + 0.45 * -0.9
    torch.testing.assert_close(got.advantage[0], torch.tensor([0, -0.32 + 0.45 * a2, a2, 0, -0.9]).double())
    torch.testing.assert_close(got.target, (got.advantage + VALUES).masked_fill(~MASK, 0.0))


def test_gae_at_its_ends() -> None:
    rewards = alt.at_turn_ends(CREDIT, MASK, TURN)
    monte_carlo = alt.gae(rewards, VALUES, MASK)
    returns = torch.tensor([[0, 0.5, 0.5, 0, -0.5], [2, 2, 2, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(monte_carlo.target, returns)
    one_step = alt.gae(rewards, VALUES, MASK, lam=0.0, bootstrap=torch.tensor([0.0, 0.7]))
    delta = torch.tensor([[0, -0.3, 1.2, 0, -0.9], [0.2, 0.3, 2 + 0.7 - 0.6, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(one_step.advantage, delta)


def test_value_loss_by_hand() -> None:
    values, old, target = one_row(1.0, 2.0, 0.9, 5), one_row(0.0, 0.0, 1.0, 5), one_row(0.0, 3.0, 0.0, 5)
    mask = torch.tensor([[True, True, True, False]])
    leaf = values.clone().requires_grad_()
    loss = alt.value_loss(leaf, target, mask, old_values=old, clip=0.5)
    # ½·max(1, 0.25), ½·max(1, 6.25) clipped and so without gradient, ½·0.81
    torch.testing.assert_close(loss.detach(), one_row(0.5, 3.125, 0.405, 0))
    (got,) = torch.autograd.grad(loss.sum(), leaf)
    torch.testing.assert_close(got, one_row(1.0, 0.0, 0.9, 0))
    assert torch.autograd.gradcheck(lambda v: alt.value_loss(v, target, mask, old_values=old, clip=0.45), (leaf,))
    with pytest.raises(ValueError, match="together with old_values"):
        alt.value_loss(values, target, mask, clip=0.5)


def test_turns_of_tokens() -> None:
    assert turn_ends(MASK, TURN, 2).tolist() == [[0, 0, 1, 0, 1], [0, 0, 1, 0, 0]]
    third = pytest.approx(1 / 3)
    assert turn_share(MASK, TURN).tolist() == [[0, 0.5, 0.5, 0, 1], [third, third, third, 0, 0]]
    assert to_go(LOG_PROBS, MASK, TURN).tolist() == [[0, -3, -2, 0, -4], [-6.5, -5.5, -4, 0, 0]]
    assert alt.turn_mean(LOG_PROBS, MASK, TURN, 3)[0].tolist() == [-1.5, -4, 0]
    with pytest.raises(ValueError, match=r"turn indices in \[0, 1\)"):
        alt.turn_sum(LOG_PROBS, MASK, TURN, 1)
