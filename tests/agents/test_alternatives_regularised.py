"""RPG: all eight variants against the enumerated gradient of the objective, the clips by hand."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import get_args

import pytest
import torch
from torch import Tensor

from ppg_agents import alternatives as alt
from ppg_agents.alternatives.regularised import Divergence

DIVERGENCES: tuple[Divergence, ...] = get_args(Divergence)
FORMS = {"differentiable": alt.rpg_differentiable, "reinforce": alt.rpg_reinforce}
REWARDS = torch.tensor([0.2, 1.0, -0.7, 0.4], dtype=torch.float64)
OLD = torch.log_softmax(torch.tensor([0.1, -0.3, 0.6, 0.0], dtype=torch.float64), 0)
LOGITS = torch.tensor([0.5, 0.4, -0.2, -0.9], dtype=torch.float64)
BETA = 0.3


def divergence_of(name: str, lp: Tensor, other: Tensor) -> Tensor:
    p, q = lp.exp(), other.exp()
    if name.startswith("forward"):
        kl = (q * (other - lp)).sum()
        return kl + (p - q).sum() if name == "forward_u" else kl
    kl = (p * (lp - other)).sum()
    return kl + (q - p).sum() if name == "reverse_u" else kl


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_expected_gradient_is_that_of_the_objective(divergence: Divergence, form: str) -> None:
    logits = LOGITS.clone().requires_grad_()
    lp = torch.log_softmax(logits, 0)
    objective = (lp.exp() * REWARDS).sum() - BETA * divergence_of(divergence, lp, OLD)
    (expected,) = torch.autograd.grad(-objective, logits, retain_graph=True)
    mask, turn = torch.ones(4, 1, dtype=torch.bool), torch.zeros(4, 1, dtype=torch.long)
    for baseline in (0.0, 0.8):
        loss = FORMS[form](
            lp[:, None], OLD[:, None], (REWARDS - baseline)[:, None], mask, turn, divergence=divergence, beta=BETA
        )[:, 0]
        (got,) = torch.autograd.grad((OLD.exp() * loss).sum(), logits, retain_graph=True)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)
    if form == "differentiable" and divergence != "reverse_u":  # there the value lacks the constant Σπ° = 1
        value = (OLD.exp() * loss).sum().item() - 0.8
        assert value == pytest.approx(-objective.item(), abs=1e-14)


def test_the_unnormalised_divergence_is_k3_for_measures_of_any_mass() -> None:
    lp, old = LOGITS, OLD + 0.4
    mask, turn = torch.ones(4, 1, dtype=torch.bool), torch.zeros(4, 1, dtype=torch.long)
    zero = torch.zeros(4, 1, dtype=torch.float64)
    k3 = alt.rpg_differentiable(lp[:, None], old[:, None], zero, mask, turn, divergence="forward_u", beta=1.0)[:, 0]
    assert (old.exp() * k3).sum().item() == pytest.approx(divergence_of("forward_u", lp, old).item())
    assert (k3 >= 0).all()


# Two tokens of two words each; the second word's distribution depends on the first. Four replies.
REPLIES = list(itertools.product(range(2), repeat=2))


def reply_log_probs(logits: Tensor) -> Tensor:
    """Return lp [4, 2] of the tokens of every reply, from logits [3, 2]: the first token's, then by first token."""
    table = torch.log_softmax(logits, -1)
    return torch.stack([torch.stack([table[0, a], table[1 + a, b]]) for a, b in REPLIES])


def logits(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 2, dtype=torch.float64, generator=generator)


TWO = torch.ones(4, 2, dtype=torch.bool)
FIRST = torch.zeros(4, 2, dtype=torch.long)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_ratio_per_reply_is_exact_for_replies_of_several_tokens(divergence: Divergence, form: str) -> None:
    theta = logits(0).requires_grad_()
    lp, old = reply_log_probs(theta), reply_log_probs(logits(1))
    objective = (lp.sum(1).exp() * REWARDS).sum() - BETA * divergence_of(divergence, lp.sum(1), old.sum(1))
    (expected,) = torch.autograd.grad(-objective, theta, retain_graph=True)
    credit = REWARDS[:, None].expand(4, 2)

    def expected_gradient(level: str) -> Tensor:
        loss = FORMS[form](
            lp,
            old,
            credit,
            TWO,
            FIRST,
            divergence=divergence,
            beta=BETA,
            level=level,  # type: ignore[arg-type]
        )
        (result,) = torch.autograd.grad((old.sum(1).exp() * loss.sum(1)).sum(), theta, retain_graph=True)
        return result

    torch.testing.assert_close(expected_gradient("turn"), expected, rtol=0, atol=1e-14)
    assert (expected_gradient("token") - expected).abs().max() > 1e-3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("divergence", ["reverse", "reverse_u"])
def test_the_reverse_divergence_of_a_reply_needs_the_log_ratios_to_its_end(divergence: Divergence, form: str) -> None:
    theta = logits(2).requires_grad_()
    strict = torch.tensor([[0.0, 0.0], [2.0, -2.0], [0.0, 0.0]], dtype=torch.float64)  # after one first word only
    lp, reference = reply_log_probs(theta), reply_log_probs(strict)
    objective = (lp.sum(1).exp() * REWARDS).sum() - BETA * divergence_of("reverse", lp.sum(1), reference.sum(1))
    (expected,) = torch.autograd.grad(-objective, theta, retain_graph=True)

    def error(kl_to_go: bool) -> float:
        loss = FORMS[form](
            lp,
            lp.detach(),
            REWARDS[:, None].expand(4, 2),
            TWO,
            FIRST,
            divergence=divergence,
            beta=BETA,
            reference_log_probs=reference,
            kl_to_go=kl_to_go,
        )
        (got,) = torch.autograd.grad((lp.detach().sum(1).exp() * loss.sum(1)).sum(), theta, retain_graph=True)
        return float((got - expected).abs().max())

    assert error(kl_to_go=True) < 1e-14
    assert error(kl_to_go=False) > 1e-2


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_both_forms_have_the_same_gradient_at_every_token(divergence: Divergence) -> None:
    lp, old, reference = (reply_log_probs(logits(seed)) for seed in (9, 10, 11))
    reverse = divergence.startswith("reverse")
    for to_go, other in ((False, None), (True, None), (True, reference)) if reverse else ((False, None),):
        gradients = []
        for form in FORMS.values():
            leaf, credit = lp.clone().requires_grad_(), REWARDS[:, None].expand(4, 2)
            loss = form(
                leaf,
                old,
                credit,
                TWO,
                FIRST,
                divergence=divergence,
                beta=BETA,
                kl_to_go=to_go,
                reference_log_probs=other,
            )
            gradients.append(torch.autograd.grad(loss.sum(), leaf)[0])
        torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-14)


@pytest.mark.parametrize("divergence", ["forward", "forward_u"])
def test_the_forward_divergence_is_exact_per_token_when_only_it_counts(divergence: Divergence) -> None:
    theta = logits(4).requires_grad_()
    lp, old = reply_log_probs(theta), reply_log_probs(logits(5))
    (expected,) = torch.autograd.grad(divergence_of("forward", lp.sum(1), old.sum(1)), theta, retain_graph=True)
    for form in FORMS.values():
        loss = form(lp, old, torch.zeros(4, 2).double(), TWO, FIRST, divergence=divergence, beta=1.0)
        (got,) = torch.autograd.grad((old.sum(1).exp() * loss.sum(1)).sum(), theta, retain_graph=True)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)


WEIGHTS = torch.tensor([[0.5, 1.0, 1.4, 0.5, 1.4, 12.0]], dtype=torch.float64)
ADVANTAGE = torch.tensor([[1.0, 1.0, 1.0, -1.0, -1.0, -1.0]], dtype=torch.float64)
ROW, SAME_TURN = torch.ones(1, 6, dtype=torch.bool), torch.zeros(1, 6, dtype=torch.long)


def coefficients(form: str, divergence: Divergence, clip: str, beta: float = 0.1) -> list[float]:
    """Minus the gradient with respect to lp: the coefficient of log π at every token."""
    lp = WEIGHTS.log().requires_grad_()
    loss = FORMS[form](
        lp,
        torch.zeros_like(WEIGHTS),
        ADVANTAGE,
        ROW,
        SAME_TURN,
        divergence=divergence,
        beta=beta,
        clip=clip,  # type: ignore[arg-type]
        clip_high=0.28,
    )
    (result,) = torch.autograd.grad(-loss.sum(), lp)
    return [float(value) for value in result[0]]


@pytest.mark.parametrize(("divergence", "at_one"), list(zip(DIVERGENCES, (1.1, 1.0, 0.9, 1.0), strict=True)))
@pytest.mark.parametrize("form", FORMS)
def test_at_ratio_one_the_weight_is_the_table_s(form: str, divergence: Divergence, at_one: float) -> None:
    differentiable_reverse = form == "differentiable" and divergence == "reverse"
    assert coefficients(form, divergence, "none")[1] == pytest.approx(at_one)
    assert coefficients(form, divergence, "none", beta=0.0) == pytest.approx((WEIGHTS * ADVANTAGE)[0].tolist())
    if not differentiable_reverse:
        assert coefficients(form, divergence, "paper")[1] == pytest.approx(at_one)


def test_the_paper_s_clip_by_hand() -> None:
    log = math.log
    # reverse_u: w·A − β·w·log w; zero at (A' ≥ 0, w ≥ 1.28), (A' < 0, w ≤ 0.8 or w ≥ 10)
    expected = [0.5 - 0.05 * log(0.5), 1.0, 0.0, 0.0, -1.4 - 0.14 * log(1.4), 0.0]
    assert coefficients("reinforce", "reverse_u", "paper") == pytest.approx(expected)
    # a β that outweighs the advantage turns the sign A' = A − β·(log w + 1) of the third token, which stays
    beta = 2.0
    turned = coefficients("reinforce", "reverse", "paper", beta)
    assert turned[2] == pytest.approx(1.4 * (1 - beta * (log(1.4) + 1)))
    assert turned[0] == pytest.approx(0.5 * (1 - beta * (log(0.5) + 1)))
    # A' = 1 − 2.5·log 1.4 > 0 is zeroed, though the coefficient itself is negative
    assert coefficients("reinforce", "reverse_u", "paper", 2.5)[2] == 0
    # differentiable: dual clip on Â = A − β·log w, stopped: −0.1·log 12 makes −1 more negative, clipped at w > 10
    expected = [0.5 * (1 - 0.1 * log(0.5)), 1.0, 0.0, 0.0, 1.4 * (-1 - 0.1 * log(1.4)), 0.0]
    assert coefficients("differentiable", "reverse_u", "paper") == pytest.approx(expected)
    # forward: the divergence stays, unclipped
    assert coefficients("differentiable", "forward", "paper") == pytest.approx([0.6, 1.1, 0.1, 0.1, -1.3, 0.1])


def test_the_released_clips_by_hand() -> None:
    log = math.log
    bounded = [0.8, 1.0, 1.28, 0.8, 1.28, 1.28]
    hard = [v * (a - 0.1 * log(v)) for v, a in zip(bounded, ADVANTAGE[0].tolist(), strict=True)]
    assert coefficients("reinforce", "reverse_u", "hard") == pytest.approx(hard)
    # K from the clipped w, zeroed by the sign of A alone
    kept = [0.5 - 0.08 * log(0.8), 1.0, 0.0, 0.0, -1.4 - 0.128 * log(1.28), 0.0]
    assert coefficients("reinforce", "reverse_u", "released") == pytest.approx(kept)
    # the sign of A alone: what the paper's clip keeps at a large β is zeroed here
    assert coefficients("reinforce", "reverse", "released", 2.0)[2] == 0
    # dual clip plus β·∇(w·log w) = β·w·(log w + 1); the value 12·log 12 = 29.8 is beyond 10 and has no gradient
    pull = [0.1 * w * (log(w) + 1) for w in WEIGHTS[0].tolist()]
    plain = [0.5, 1.0, 0.0, 0.0, -1.4, 0.0]
    expected = [p - q for p, q in zip(plain[:5], pull[:5], strict=True)] + [0.0]
    assert coefficients("differentiable", "reverse", "released") == pytest.approx(expected)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("level", ["token", "turn"])
@pytest.mark.parametrize("clip", ["none", "released"])
def test_gradcheck(divergence: Divergence, level: str, clip: str) -> None:
    lp = reply_log_probs(logits(6)).clone().requires_grad_()
    loss = partial(
        alt.rpg_differentiable,
        divergence=divergence,
        beta=0.4,
        level=level,  # type: ignore[arg-type]
        clip=clip,  # type: ignore[arg-type]
    )
    old, credit = reply_log_probs(logits(7)), REWARDS[:, None].expand(4, 2)
    assert torch.autograd.gradcheck(lambda leaf: loss(leaf, old, credit, TWO, FIRST), (lp,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "revers"}, "did you mean 'reverse'"),
        ({"level": "tokens"}, "did you mean 'token'"),
        ({"clip": "hart"}, "did you mean 'hard'"),
        ({"beta": -1.0}, "beta >= 0"),
        ({"divergence": "forward", "kl_to_go": True}, "samples of the reference"),
        ({"clip": "hard", "reference_log_probs": OLD[:, None]}, "clip 'none' or 'paper'"),
        ({"level": "turn", "kl_to_go": True}, "at level 'token'"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, object], message: str) -> None:
    arguments = {"divergence": "reverse", "beta": 0.1, **options}
    with pytest.raises(ValueError, match=message):
        alt.rpg_reinforce(OLD[:, None], OLD[:, None], OLD[:, None], TWO[:, :1], FIRST[:, :1], **arguments)  # type: ignore[arg-type]
