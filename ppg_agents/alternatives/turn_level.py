"""The nearest turn-level relatives: REFUEL, ReBN, bi-level GAE. Shapes as in ``alternatives.others``."""

from __future__ import annotations

import torch
from torch import Tensor

from ppg_agents.alternatives.others import pairs
from ppg_agents.alternatives.tokens import turn_bounds, turn_ends
from ppg_agents.alternatives.value import GAE, gae
from ppg_agents.losses import broadcast_credit, constant_per_token, turn_token_mask


def refuel(
    log_ratios: Tensor,
    other_log_ratios: Tensor,
    rewards: Tensor,
    other_rewards: Tensor,
    valid: Tensor,
    *,
    eta: float = 1.0,
) -> Tensor:
    """REFUEL (2410.04612): fit the difference of log-ratios to the difference of two futures.

        L = (u − η·(R − R'))²,   u = (lp − lp°)(y_h) − (lp − lp°)(y'_h)

    The two rollouts share the history before turn h, differ in their replies there, and both continue on-policy. lp
    sums over **turn h's tokens only**; R is the score of the whole conversation. They draw h at random and drop
    identical replies; their code has η = 1 and log-probs at the sampling temperature. L is zero at π ∝ π°·e^{ηR}. It
    is ``copg`` with π_ref = π° and β = 1/η: ∇L = 2η·∇L_CoPG. A policy class's credit c_h as R is ours; greedy needs
    no rollout past h.

    Args:
        log_ratios: Σ (lp − lp°) of y_h [P, n], carries the gradient.
        other_log_ratios: The same for y'_h.
        rewards: R [P, n].
        other_rewards: R'.
        valid: [P, n] bool, true at the turn h where the pair branches.
        eta: η > 0.

    Returns:
        L [P, n] ≥ 0, 0 elsewhere.

    Raises:
        ValueError: η not positive, shapes that differ, or NaN at a valid turn.
    """
    if not eta > 0:
        raise ValueError(f"expected eta > 0, got {eta}")
    one, two, difference = pairs(log_ratios, other_log_ratios, rewards, other_rewards, valid)
    return (one - two - eta * difference).square()


def rebn(credit: Tensor, valid: Tensor, *, epsilon: float = 1e-9) -> Tensor:
    """ReBN (GEM, 2510.01051): return batch normalisation, A_t = (G_t − mean) / (std + ε).

    Mean and (biased) std over **all turns of all conversations of the batch**; no value network, no groups. They use
    G_t = Σ_{s ≥ t} γ^{s−t} r_s, the credit of full planning with a discount, and token sums over a constant length
    (``constant``); any class's c_t as G_t is ours. The mean includes the turn's own return and mixes turn indices, so
    it is slightly biased. ``baselines.standardise`` is the same with another ε.

    Args:
        credit: G [B, n].
        valid: [B, n] bool.
        epsilon: ε > 0, in the unit of the credit.

    Returns:
        A [B, n], 0 at invalid turns and when all credits are equal.

    Raises:
        ValueError: Shapes or dtypes that do not fit, NaN at a valid turn, or ε not positive.
    """
    if not epsilon > 0:
        raise ValueError(f"expected epsilon > 0, got {epsilon}")
    returns = constant_per_token("credit", credit, valid)
    count = valid.sum().clamp(min=1)
    deviation = (returns - returns.sum() / count).masked_fill(~valid, 0.0)
    return deviation / ((deviation.square().sum() / count).sqrt() + epsilon)


def bi_level_gae(
    rewards: Tensor,
    values: Tensor,
    token_mask: Tensor,
    turn_index: Tensor,
    valid: Tensor,
    *,
    discount: float = 1.0,
    turn_discount: float = 1.0,
    lam: float = 1.0,
    turn_targets: Tensor | None = None,
) -> GAE:
    """Bi-level GAE (VAGEN, 2510.16907; shipped in RAGEN, 2504.20073): over turns, then over each turn's tokens.

        turns:   δ_t = r_t + γ_T·V_{t+1} − V_t,   A_t = δ_t + γ_T·λ·A_{t+1},   U_t = A_t + V_t
        tokens:  GAE with γ, λ inside the turn, reward U_t on its last token, value 0 and a fresh start after it

    V_t is the value at the turn's last token, t + 1 the next valid turn, V after the last turn 0. With λ = γ = γ_T = 1
    it is return − V at every token, as is ``gae``; with γ_T = 0 and λ = γ = 1 the greedy r_t − V. For a conversation of
    one turn, and for turns of one token with γ = γ_T, it is ``gae``. Turn ends come from ``turn_index``; theirs are
    the tokens whose reward is not 0, which misses a turn scored 0. They whiten afterwards: ``advantages.whiten``.
    ``turn_targets`` replaces U_t by a policy class's credit c_t (ours).

    Args:
        rewards: r [B, n]; not read at invalid turns, nor with ``turn_targets``.
        values: V [B, L] of the state before each token; no gradient is taken.
        token_mask: [B, L] bool.
        turn_index: [B, L] integer, from 0.
        valid: [B, n] bool; tokens of invalid turns are left out.
        discount: γ in [0, 1], per token.
        turn_discount: γ_T in [0, 1], per turn.
        lam: λ in [0, 1], for both levels.
        turn_targets: U [B, n], or None for the turn-level recursion.

    Returns:
        Advantage and target per token [B, L], 0 outside the mask and at invalid turns.

    Raises:
        ValueError: Shapes or dtypes that do not fit, NaN at a valid turn or token, or a factor outside [0, 1].
    """
    mask = turn_token_mask(token_mask, turn_index, valid)
    turns = valid.shape[1]
    if turn_targets is None:
        last = turn_bounds(mask, turn_index, turns)[1]
        present = valid & (last >= 0)
        end_value = constant_per_token("values", values, mask).gather(1, last.clamp(min=0))
        turn_targets = gae(rewards, end_value, present, discount=turn_discount, lam=lam).target
    ends = turn_ends(mask, turn_index, turns)
    targets = broadcast_credit(torch.as_tensor(turn_targets), mask, turn_index).masked_fill(~ends, 0.0)
    return gae(targets, values, mask, discount=discount, lam=lam, ends=ends)
