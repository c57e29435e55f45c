"""SAPO, DISPO, CoPG, P3O, A-LoL, EMPG, the high-entropy mask: by hand, and the identity each must satisfy."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from ppg_agents import alternatives as alt
from ppg_agents.losses import aggregate, broadcast_credit, partial_policy_gradient


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def slopes(loss: Callable[..., Tensor], weights: Tensor, adv: Tensor) -> Tensor:
    """Minus the gradient with respect to lp at w = weights, one token each."""
    lp = weights.log().requires_grad_()
    mask = torch.ones_like(weights, dtype=torch.bool)
    (result,) = torch.autograd.grad(-loss(lp, torch.zeros_like(weights), adv, mask).sum(), lp)
    return result[0]


def test_sapo_by_hand() -> None:
    weights, adv, mask = row(1.0, 2.0, 2.0, 0.0 + 1e-300), row(3.0, 3.0, -3.0, 1.0), torch.ones(1, 4).bool()

    def sigma(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    value = alt.sapo(weights.log(), torch.zeros_like(weights), adv, mask)
    expected = row(-3 * 2, -3 * 4 * sigma(1), 3 * 4 / 1.05 * sigma(1.05), -4 * sigma(-1))
    torch.testing.assert_close(value, expected)
    p, q = sigma(1), sigma(1.05)
    got = slopes(alt.sapo, weights, adv)
    assert got.tolist() == pytest.approx([3.0, 3 * 2 * 4 * p * (1 - p), -3 * 2 * 4 * q * (1 - q), 0.0], abs=1e-8)


def test_sapo_s_gate_is_symmetric_about_one_and_forgets_large_ratios() -> None:
    near = slopes(alt.sapo, row(0.6, 1.4), row(1.0, 1.0)) / torch.tensor([0.6, 1.4], dtype=torch.float64)
    assert near[0].item() == pytest.approx(near[1].item())
    assert abs(slopes(alt.sapo, row(60.0), row(1.0)).item()) < 1e-20
    hard = partial(alt.sapo, temperature_positive=1e-6, temperature_negative=1e-6)
    weights = row(0.1, 3.0)  # τ → 0 is importance weighting: f(w) → 2/τ + (w − 1)
    torch.testing.assert_close(slopes(hard, weights, row(2.0, -1.0)), torch.tensor([0.2, -3.0]).double())


def test_dispo_s_four_regimes_by_hand() -> None:
    weights = row(0.5, 12.0, 0.5, 150.0, 0.5)
    adv = row(2.0, 2.0, -2.0, -2.0, 0.0)
    # good: [0.8, 11]; bad: [0, 101]; nothing to learn: nothing
    assert slopes(alt.dispo, weights, adv).tolist() == pytest.approx([1.6, 22.0, -1.0, -202.0, 0.0])


def test_dispo_with_equal_bounds_is_cispo_and_without_bounds_importance_weighting() -> None:
    weights, adv = row(0.5, 0.95, 1.5, 0.5, 1.5), row(1.0, 1.0, 1.0, -1.0, -1.0)
    equal = partial(alt.dispo, positive_low=1.0, positive_high=0.3, negative_low=1.0, negative_high=0.3)
    torch.testing.assert_close(slopes(equal, weights, adv), slopes(partial(alt.cispo, max_weight=1.3), weights, adv))
    free = partial(alt.dispo, positive_low=1.0, positive_high=math.inf, negative_high=math.inf)
    torch.testing.assert_close(slopes(free, weights, adv), (weights * adv)[0])
    with pytest.raises(ValueError, match="epsilons >= 0"):
        alt.dispo(weights, weights, adv, torch.ones(1, 5).bool(), negative_low=-0.1)


# One history, four replies: all pairs (i, j), row-major.
REWARDS = torch.tensor([0.2, 1.0, -0.7, 0.4], dtype=torch.float64)
REFERENCE = torch.log_softmax(torch.tensor([0.1, -0.3, 0.6, 0.0], dtype=torch.float64), 0)
LOGITS = torch.tensor([0.5, 0.4, -0.2, -0.9], dtype=torch.float64)
VALID = torch.ones(16, 1, dtype=torch.bool)


def all_pairs(values: Tensor) -> tuple[Tensor, Tensor]:
    return values.repeat_interleave(4)[:, None], values.repeat(4)[:, None]


def pair_weights(log_probs: Tensor) -> Tensor:
    one, two = all_pairs(log_probs.detach())
    return (one + two).exp()


def expected_gradient(
    loss: Callable[..., Tensor], logits: Tensor, against: Tensor, sampler: Tensor, rewards: Tensor = REWARDS
) -> Tensor:
    """Gradient of E over pairs of independent replies of ``sampler``, exactly."""
    leaf = logits.clone().requires_grad_()
    log_ratios = torch.log_softmax(leaf, 0) - against
    per_pair = loss(*all_pairs(log_ratios), *all_pairs(rewards), VALID)
    (result,) = torch.autograd.grad((pair_weights(sampler) * per_pair).sum(), leaf)
    return result


def objective_gradient(logits: Tensor, beta: float) -> Tensor:
    leaf = logits.clone().requires_grad_()
    lp = torch.log_softmax(leaf, 0)
    objective = (lp.exp() * (REWARDS - beta * (lp - REFERENCE))).sum()
    (result,) = torch.autograd.grad(objective, leaf)
    return result


def test_copg_by_hand() -> None:
    # u = 0.5 − 0.2, D = 1 − 0.4: −(0.6 − 0.15)·0.3; gradient −(0.6 − 0.3)
    one = row(0.5).requires_grad_()
    loss = alt.copg(one, row(0.2), row(1.0), row(0.4), torch.tensor([[True]]), beta=1.0)
    assert loss.item() == pytest.approx(-0.135)
    assert torch.autograd.grad(loss.sum(), one)[0].item() == pytest.approx(-0.3)
    u, d, beta = 0.3, 0.6, 0.7
    other = alt.copg(row(0.5), row(0.2), row(1.0), row(0.4), torch.tensor([[True]]), beta=beta).item()
    assert other == pytest.approx(((d - beta * u) ** 2 - d**2) / (2 * beta))


def test_copg_on_policy_is_the_regularised_policy_gradient() -> None:
    beta = 0.5
    got = expected_gradient(partial(alt.copg, beta=beta), LOGITS, REFERENCE, torch.log_softmax(LOGITS, 0))
    torch.testing.assert_close(got, -2 * objective_gradient(LOGITS, beta), rtol=0, atol=1e-14)


def test_copg_is_at_rest_at_the_optimum_whatever_sampled() -> None:
    beta = 0.5
    optimum = REFERENCE + REWARDS / beta
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        sampler = torch.log_softmax(torch.randn(4, dtype=torch.float64, generator=generator), 0)
        loss = partial(alt.copg, beta=beta)
        got = expected_gradient(loss, optimum, REFERENCE, sampler)
        assert got.abs().max() < 1e-14
        assert expected_gradient(loss, LOGITS, REFERENCE, sampler).abs().max() > 1e-2


def test_p3o_by_hand() -> None:
    one, two = row(math.log(1.5)).requires_grad_(), row(math.log(0.5)).requires_grad_()
    valid = torch.tensor([[True]])
    free = alt.p3o(one, two, row(1.0), row(0.6), valid, clip=None)
    got = torch.autograd.grad(free.sum(), (one, two))
    # −½·w₁w₂·D·(1, −1) = −½·0.75·0.4
    assert [g.item() for g in got] == pytest.approx([-0.15, 0.15])
    clipped = alt.p3o(one, two, row(1.0), row(0.6), valid, clip=0.2)
    # A₁ = 0.5·0.4, A₂ = −1.5·0.4: w₁ above 1.2 with A₁ > 0, w₂ below 0.8 with A₂ < 0: −½(1.2·0.2 − 0.8·0.6)
    assert clipped.item() == pytest.approx(0.12)
    assert [g.item() for g in torch.autograd.grad(clipped.sum(), (one, two))] == [0, 0]


@pytest.mark.parametrize("clip", [None, 0.2])
def test_p3o_on_policy_is_the_policy_gradient(clip: float | None) -> None:
    lp = torch.log_softmax(LOGITS, 0)
    got = expected_gradient(partial(alt.p3o, clip=clip), LOGITS, lp, lp)
    torch.testing.assert_close(got, -objective_gradient(LOGITS, 0.0), rtol=0, atol=1e-14)


def test_p3o_unclipped_off_policy_is_the_policy_gradient() -> None:
    got = expected_gradient(partial(alt.p3o, clip=None), LOGITS, REFERENCE, REFERENCE)
    torch.testing.assert_close(got, -objective_gradient(LOGITS, 0.0), rtol=0, atol=1e-14)


@pytest.mark.parametrize("loss", [partial(alt.copg, beta=0.5), alt.p3o, alt.refuel])
def test_a_constant_added_to_both_rewards_of_a_pair_changes_nothing(loss: Callable[..., Tensor]) -> None:
    same = expected_gradient(loss, LOGITS, REFERENCE, REFERENCE, REWARDS + 4.0)
    plain = expected_gradient(loss, LOGITS, REFERENCE, REFERENCE)
    torch.testing.assert_close(same, plain, rtol=0, atol=1e-14)


@pytest.mark.parametrize("loss", [partial(alt.copg, beta=0.5), partial(alt.p3o, clip=None), alt.p3o, alt.refuel])
def test_an_invalid_pair_gives_nothing(loss: Callable[..., Tensor]) -> None:
    valid = torch.tensor([[True, False]])
    nan = math.nan
    one = row(0.3, nan).requires_grad_()
    per_pair = loss(one, row(0.1, 0.2), row(1.0, nan), row(0.5, nan), valid)
    assert per_pair[0, 1] == 0
    (got,) = torch.autograd.grad(per_pair.sum(), one)
    assert torch.isfinite(got).all()
    assert got[0, 1] == 0
    with pytest.raises(ValueError, match="expected a number for rewards"):
        loss(row(0.3, 0.1), row(0.1, 0.2), row(1.0, nan), row(0.5, 1.0), torch.ones_like(valid))


@pytest.mark.parametrize("loss", [partial(alt.copg, beta=0.5), alt.refuel])
def test_pairwise_gradcheck(loss: Callable[..., Tensor]) -> None:
    one, two = LOGITS[None].clone().requires_grad_(), REFERENCE[None].clone().requires_grad_()
    rewards, valid = (REWARDS[None], REWARDS.flip(0)[None]), torch.ones(1, 4).bool()
    assert torch.autograd.gradcheck(lambda a, b: loss(a, b, *rewards, valid), (one, two))


MASK = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
TURN = torch.tensor([[-1, 0, 0, 9, 1], [0, 0, 0, -1, -1]])
LOG_PROBS = torch.tensor([[-9.0, -1.0, -2.0, -9.0, -4.0], [-1.0, -1.5, -4.0, -9.0, -9.0]], dtype=torch.float64)
CREDIT = torch.tensor([[1.0, -0.5], [2.0, 0.0]], dtype=torch.float64)


def test_a_lol_by_hand() -> None:
    advantage = broadcast_credit(CREDIT, MASK, TURN)
    reference = LOG_PROBS - torch.tensor([[0, 0.5, 0.25, 0, 1], [-3, 0.1, 0.1, 0, 0]], dtype=torch.float64)

    def coefficient(**options: object) -> list[list[float]]:
        lp = LOG_PROBS.clone().requires_grad_()
        loss = alt.a_lol(lp, reference, advantage, MASK, TURN, **options)  # type: ignore[arg-type]
        return [[round(-v, 6) for v in line] for line in torch.autograd.grad(loss.sum(), lp)[0].tolist()]

    assert coefficient() == [[0, 1, 1, 0, 0], [2, 2, 2, 0, 0]]
    # ρ = e^0.75 > 1.9, and e^−2.8 < 0.1
    assert coefficient(variant="sequence_ratio") == [[0, 1.9, 1.9, 0, 0], [0.2, 0.2, 0.2, 0, 0]]
    per_token = [[0, math.exp(0.5), math.exp(0.25), 0, 0], [2 * 0.1, 2 * math.exp(0.1), 2 * math.exp(0.1), 0, 0]]
    assert coefficient(variant="token_ratio") == [[round(v, 6) for v in line] for line in per_token]
    assert coefficient(variant="kl") == [[0, 0.8, 0.8, 0, 0], [1.8, 1.8, 1.8, 0, 0]]
    value = alt.a_lol(LOG_PROBS, reference, advantage, MASK, TURN, variant="kl")
    assert value[0].tolist() == pytest.approx([0, 1 + 0.2 * 0.5, 2 + 0.2 * 0.25, 0, 0])
    with pytest.raises(ValueError, match="did you mean 'token_ratio'"):
        coefficient(variant="token")


def test_a_lol_without_a_value_is_the_offline_loss() -> None:
    credit = CREDIT.clamp(min=0)
    advantage = broadcast_credit(credit, MASK, TURN)
    loss = aggregate(alt.a_lol(LOG_PROBS, LOG_PROBS, advantage, MASK, TURN), MASK, TURN)
    assert loss.item() == partial_policy_gradient(LOG_PROBS, MASK, TURN, credit).item()
    for variant in ("sequence_ratio", "token_ratio"):  # ρ = 1 at the reference
        same = alt.a_lol(LOG_PROBS, LOG_PROBS, advantage, MASK, TURN, variant=variant)
        assert aggregate(same, MASK, TURN).item() == loss.item()


NAN = math.nan
ADVANTAGE = torch.tensor([[1.0, NAN, 3.0], [-1.0, 2.0, NAN]], dtype=torch.float64)
ENTROPY = torch.tensor([[0.5, NAN, 1.5], [1.0, 0.5, NAN]], dtype=torch.float64)
PLAYED = torch.tensor([[True, False, True], [True, True, False]])


def test_empg_by_hand() -> None:
    got = alt.empg(ADVANTAGE, ENTROPY, PLAYED, zeta=0.1)
    # h = 0, 1, ½, 0; the turn after (0, 0) is (0, 2)
    e = [math.exp(-h) for h in (0, 1, 0.5, 0)]
    mean = sum(e) / 4
    changed = [1 * e[0] / mean + 0.1 * e[1], 3 * e[1] / mean, -1 * e[2] / mean + 0.1 * e[3], 2 * e[3] / mean]
    centre = sum(changed) / 4
    a, b, c, d = (value - centre for value in changed)
    torch.testing.assert_close(got, torch.tensor([[a, 0, b], [c, d, 0]], dtype=torch.float64), rtol=1e-7, atol=1e-7)


def test_empg_at_equal_entropies_or_without_scale_is_the_centred_advantage() -> None:
    centred = torch.where(PLAYED, ADVANTAGE - 5 / 4, 0.0)
    torch.testing.assert_close(alt.empg(ADVANTAGE, torch.where(PLAYED, 0.7, NAN).double(), PLAYED), centred)
    torch.testing.assert_close(alt.empg(ADVANTAGE, ENTROPY, PLAYED, scale=0.0), centred)
    gates = alt.empg(torch.ones_like(ADVANTAGE), ENTROPY, PLAYED)  # g − mean g, and mean g = 1
    assert gates.sum().item() == pytest.approx(0, abs=1e-12)
    assert gates[0, 0].item() == pytest.approx(4 / (2 + math.exp(-1) + math.exp(-0.5)) - 1)
    assert not alt.empg(ADVANTAGE, ENTROPY, torch.zeros_like(PLAYED)).any()


def test_high_entropy_mask_by_hand() -> None:
    entropy = torch.where(MASK, -LOG_PROBS, 99.0)  # 1, 2, 4, 1, 1.5, 4 in the mask
    kept = alt.high_entropy_mask(entropy, MASK, share=0.4)
    # quantile 0.6 of 1, 1, 1.5, 2, 4, 4 is 2: three at or above it
    assert kept.tolist() == [[0, 0, 1, 0, 1], [0, 0, 1, 0, 0]]
    assert torch.equal(alt.high_entropy_mask(entropy, MASK, share=1.0), MASK)
    threshold = torch.quantile(entropy[MASK], 0.7)
    assert torch.equal(alt.high_entropy_mask(entropy, MASK, share=0.3), MASK & (entropy >= threshold))
    with pytest.raises(ValueError, match=r"share in \(0, 1\]"):
        alt.high_entropy_mask(entropy, MASK, share=0.0)
