"""Importance weights and the KL term: golden values, and their expectations by enumeration."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from ppg_agents.agents.importance import effective_share, importance_weights
from ppg_agents.losses import aggregate, kl_estimate, kl_loss, partial_policy_gradient

# One conversation, prompt tokens at 0 and 3: turn 0 of two tokens, turn 1 of one.
MASK = torch.tensor([[0, 1, 1, 0, 1]], dtype=torch.bool)
TURN = torch.tensor([[0, 0, 0, 1, 1]])
OWN = torch.tensor([[9.0, -1.0, -2.0, 9.0, -3.0]], dtype=torch.float64)
LOG2 = math.log(2)


def test_weights_by_hand() -> None:
    sampling = OWN - torch.tensor([[0, 3 * LOG2, -1 * LOG2, 0, -LOG2]], dtype=torch.float64)
    per_token, raw = importance_weights(OWN, sampling, MASK, TURN, level="turn", cap=2.0)
    torch.testing.assert_close(raw, torch.tensor([4.0, 0.5], dtype=torch.float64))
    torch.testing.assert_close(per_token, torch.tensor([[0, 2.0, 2.0, 0, 0.5]], dtype=torch.float64))
    per_token, raw = importance_weights(OWN, sampling, MASK, TURN, level="token", cap=2.0)
    torch.testing.assert_close(raw, torch.tensor([8.0, 0.5, 0.5], dtype=torch.float64))
    torch.testing.assert_close(per_token, torch.tensor([[0, 2.0, 0.5, 0, 0.5]], dtype=torch.float64))
    leaf = OWN.clone().requires_grad_()
    weights, _ = importance_weights(leaf, sampling, MASK, TURN)
    credit = torch.tensor([[3.0, 5.0]], dtype=torch.float64)
    partial_policy_gradient(leaf, MASK, TURN, credit, weights=weights).backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, torch.tensor([[0, -6.0, -6.0, 0, -2.5]], dtype=torch.float64))


def test_effective_share_by_hand() -> None:
    assert effective_share(4 * 0.7, 4 * 0.49, 4) == pytest.approx(1)
    assert effective_share(2.0, 4.0, 4) == 0.25  # one turn has all the weight
    assert effective_share(1 + 2 + 3, 1 + 4 + 9, 3) == pytest.approx(36 / 42)
    assert effective_share(0.0, 0.0, 0) == 1


def test_equal_policies_weigh_one_and_far_ones_do_not_overflow() -> None:
    for level in ("turn", "token"):
        assert set(importance_weights(OWN, OWN, MASK, TURN, level=level).raw.tolist()) == {1.0}  # type: ignore[arg-type]
    far = importance_weights(OWN, OWN - 1e4, MASK, TURN, cap=3.0)
    assert far.per_token.tolist() == [[0, 3, 3, 0, 3]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"level": "none"}, "level 'turn' or 'token' and cap >= 1, got 'none'"),
        ({"cap": 0.5}, "cap >= 1, got 'turn' and 0.5"),
        ({"sampling_log_probs": torch.full_like(OWN, math.nan)}, r"number for sampling_log_probs .* nan at \[0, 1\]"),
        ({"sampling_log_probs": OWN[:, :3]}, "sampling_log_probs of token_mask's shape"),
    ],
)
def test_refusals(change: dict[str, object], message: str) -> None:
    arguments = {"log_probs": OWN, "sampling_log_probs": OWN, "token_mask": MASK, "turn_index": TURN, **change}
    with pytest.raises(ValueError, match=message):
        importance_weights(**arguments)  # type: ignore[arg-type]


# Replies of two tokens from an alphabet of two; three conditionals make a policy. A batch holds all four replies,
# each counted by its probability under whoever samples.
REPLIES = list(itertools.product(range(2), repeat=2))
SIZE = len(REPLIES)
BATCH = torch.ones(SIZE, 2, dtype=torch.bool), torch.zeros(SIZE, 2, dtype=torch.long)


def logits(seed: int) -> Tensor:
    values = torch.from_numpy(np.random.default_rng(seed).normal(size=(3, 2)))
    return values.requires_grad_()


def reply_log_probs(theta: Tensor) -> Tensor:
    """Return [4, 2]: log-probs of both tokens of every reply."""
    table = theta.log_softmax(-1)
    return torch.stack([torch.stack([table[0, a], table[1 + a, b]]) for a, b in REPLIES])


def gradient(value: Tensor, theta: Tensor) -> Tensor:
    return torch.autograd.grad(value, theta, retain_graph=True)[0]


def expectation(per_token: Callable[[Tensor], Tensor], theta: Tensor, sampler: Tensor) -> Tensor:
    """Return the gradient of E_{reply ∼ sampler}[Σ of the per-token loss]."""
    probability = reply_log_probs(sampler).sum(1).exp().detach()
    loss = per_token(reply_log_probs(theta)) * probability[:, None] * SIZE
    return gradient(aggregate(loss, *BATCH), theta)


def test_turn_weights_without_a_cap_are_unbiased_and_token_weights_are_not() -> None:
    theta, sampler = logits(0), logits(1)
    reward = torch.tensor([0.3, -1.0, 2.0, 0.7], dtype=torch.float64)
    exact = gradient((reply_log_probs(theta).sum(1).exp() * reward).sum(), theta)

    def estimate(level: str, cap: float) -> Tensor:
        probability = reply_log_probs(sampler).sum(1).exp().detach()
        lp = reply_log_probs(theta)
        weights, _ = importance_weights(lp, reply_log_probs(sampler), *BATCH, level=level, cap=cap)  # type: ignore[arg-type]
        credit = (reward * probability * SIZE)[:, None]
        return gradient(-partial_policy_gradient(lp, *BATCH, credit, weights=weights), theta)

    torch.testing.assert_close(estimate("turn", math.inf), exact, rtol=0, atol=1e-12)
    assert float((estimate("token", math.inf) - exact).abs().max()) > 0.05
    assert float((estimate("turn", 1.2) - exact).abs().max()) > 0.05


def test_the_kl_loss_has_the_gradient_of_the_reverse_kl_at_every_prefix() -> None:
    theta, reference, sampler = logits(2), logits(3), logits(4)
    ref = reply_log_probs(reference).detach()
    table, other = theta.log_softmax(-1), reference.log_softmax(-1).detach()
    divergence = (table.exp() * (table - other)).sum(-1)  # at the start, after token 0, after token 1
    exact = gradient(divergence[0] + (table[0].exp().detach() * divergence[1:]).sum(), theta)
    on_policy = expectation(lambda lp: kl_loss(lp, ref, BATCH[0]), theta, theta)
    torch.testing.assert_close(on_policy, exact, rtol=0, atol=1e-12)

    def weighted(lp: Tensor) -> Tensor:
        weights, _ = importance_weights(lp, reply_log_probs(sampler), *BATCH, cap=math.inf)
        return kl_loss(lp, ref, BATCH[0], weights)

    torch.testing.assert_close(expectation(weighted, theta, sampler), exact, rtol=0, atol=1e-12)
    k3 = expectation(lambda lp: (ref - lp).expm1() - (ref - lp), theta, theta)
    forward = (other.exp() * (other - table)).sum(-1)
    of_forward = gradient(forward[0] + (table[0].exp().detach() * forward[1:]).sum(), theta)
    torch.testing.assert_close(k3, of_forward, rtol=0, atol=1e-12)
    assert float((k3 - exact).abs().max()) > 0.05


def test_the_kl_estimate_is_unbiased_and_never_negative() -> None:
    theta, reference = logits(2), logits(3)
    lp, ref = reply_log_probs(theta), reply_log_probs(reference)
    per_token = kl_estimate(lp, ref, BATCH[0])
    probability = lp.sum(1).exp()
    torch.testing.assert_close((probability * per_token.sum(1)).sum(), (probability * (lp - ref).sum(1)).sum())
    assert bool((per_token >= 0).all())
    assert not per_token.requires_grad


def test_kl_by_hand() -> None:
    reference = OWN - torch.tensor([[7.0, 1.0, 2.0, 7.0, -4.0]], dtype=torch.float64)
    leaf = OWN.clone().requires_grad_()
    loss = kl_loss(leaf, reference, MASK)
    assert loss.tolist() == [[0, 0.5, 2, 0, 8]]
    loss.sum().backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [[0, 1, 2, 0, -4]]
    k3 = kl_estimate(OWN, reference, MASK)
    expected = [[0, math.exp(-1), math.exp(-2) + 1, 0, math.exp(4) - 5]]
    torch.testing.assert_close(k3, torch.tensor(expected, dtype=torch.float64))
    with pytest.raises(ValueError, match="number for reference"):
        kl_loss(OWN, reference / 0 * 0, MASK)
