"""Other alternatives: SAPO, DISPO, the pairwise CoPG and P3O, A-LoL offline, EMPG, the high-entropy mask.

Token losses are [B, L] as in ``alternatives.clipped``. Pairwise losses are per pair and turn, [P, n]: row p is a
pair of conversations, column t their replies y, y' at turn t, with log-ratios summed over the reply
(``tokens.turn_sum`` of ``tokens.log_ratio``) and the credits c_t and c'_t as rewards (ours; the sources have one reward
per completion). ``valid`` is true where both turns are valid. Both replies of a pair must be in the same micro-batch.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from ppg_agents.alternatives.clipped import clipped_surrogate
from ppg_agents.alternatives.tokens import checked, log_ratio, ratio, token_advantage, turn_sum
from ppg_agents.losses import constant_per_token, tokens_per_turn
from ppg_agents.nearest import not_one_of

ALoLVariant = Literal["reference_free", "sequence_ratio", "token_ratio", "kl"]


def sapo(
    log_probs: Tensor,
    sampling_log_probs: Tensor,
    advantage: Tensor,
    token_mask: Tensor,
    *,
    temperature_positive: float = 1.0,
    temperature_negative: float = 1.05,
) -> Tensor:
    """SAPO (2511.20347): a soft gate instead of the clip, L = −f(w)·A, f(w) = (4/τ)·σ(τ·(w − 1)).

    τ = τ₊ where A > 0, else τ₋; form and defaults are TRL's (there with ``sequence_mean``). With p = σ(τ(w − 1)) the
    gate's slope is f'(w) = 4p(1 − p): 1 at w = 1, where the gradient is REINFORCE's, symmetric about it, and
    f'(w)·w → 0 as w → ∞. f(1) = 2/τ, so the loss's values cannot be compared with other losses'. Choosing τ by the
    sign of a turn's credit is ours.

    Args:
        log_probs: lp [B, L], floating, carries the gradient.
        sampling_log_probs: lp° [B, L].
        advantage: A [B, L].
        token_mask: [B, L] bool.
        temperature_positive: τ₊ > 0.
        temperature_negative: τ₋ > 0.

    Returns:
        L [B, L], 0 outside the mask.

    Raises:
        ValueError: Shapes or dtypes that do not fit, NaN in the mask, or a temperature not positive.
    """
    if not (temperature_positive > 0 and temperature_negative > 0):
        raise ValueError(f"expected temperatures > 0, got {temperature_positive} and {temperature_negative}")
    weight = ratio(log_ratio(log_probs, sampling_log_probs, token_mask))
    credit = token_advantage(advantage, log_probs, token_mask)
    positive = torch.full_like(credit, temperature_positive)
    temperature = torch.where(credit > 0, positive, torch.full_like(credit, temperature_negative))
    return -4 / temperature * torch.sigmoid(temperature * (weight - 1)) * credit


def dispo(
    log_probs: Tensor,
    sampling_log_probs: Tensor,
    advantage: Tensor,
    token_mask: Tensor,
    *,
    positive_low: float = 0.2,
    positive_high: float = 10.0,
    negative_low: float = 1.0,
    negative_high: float = 100.0,
) -> Tensor:
    """DISPO (2602.00983): L = −sg(r)·A·lp, r = clip(w, 1 − ε_lo, 1 + ε_hi), the ε's chosen by the sign of A.

    Four regimes: w above and below 1, for good and for bad replies. Equal ε's give a two-sided ``cispo``, ε → ∞
    importance weighting per token. Form and defaults are second-hand. Theirs distinguishes correct from incorrect
    answers; ours uses the sign of A. With a credit ≥ 0 and no baseline the negative bounds are never used: subtract a
    baseline.

    Args:
        log_probs: lp [B, L], floating, carries the gradient.
        sampling_log_probs: lp° [B, L].
        advantage: A [B, L]; theirs is GRPO's, with ``token_mean``.
        token_mask: [B, L] bool.
        positive_low: ε₊lo ≥ 0; w is never negative, so 1 or more sets no bound.
        positive_high: ε₊hi ≥ 0.
        negative_low: ε₋lo ≥ 0.
        negative_high: ε₋hi ≥ 0.

    Returns:
        L [B, L], 0 outside the mask.

    Raises:
        ValueError: Shapes or dtypes that do not fit, NaN in the mask, or a negative ε.
    """
    bounds = (positive_low, positive_high, negative_low, negative_high)
    if not all(bound >= 0 for bound in bounds):
        raise ValueError(f"expected four epsilons >= 0, got {bounds}")
    weight = ratio(log_ratio(log_probs, sampling_log_probs, token_mask)).detach()
    credit = token_advantage(advantage, log_probs, token_mask)
    good = weight.clamp(1 - positive_low, 1 + positive_high)
    clipped = torch.where(credit > 0, good, weight.clamp(1 - negative_low, 1 + negative_high))
    return -clipped * credit * checked(log_probs, token_mask)


def copg(
    log_ratios: Tensor,
    other_log_ratios: Tensor,
    rewards: Tensor,
    other_rewards: Tensor,
    valid: Tensor,
    *,
    beta: float,
) -> Tensor:
    """CoPG (2406.19185): contrastive policy gradient on pairs from any source.

        L = −(D − (β/2)·u)·u,   D = R − R',   u = log(π_θ/π_ref)(y) − log(π_θ/π_ref)(y')

    Up to a constant it is (D − β·u)²/(2β), so it needs no importance weights: the gradient −(D − βu)·∇u is zero at
    π* ∝ π_ref·e^{R/β}, whatever sampled the pairs. On samples of π_θ it is −2∇(E[R] − β·KL(π_θ ‖ π_ref)). A constant
    added to both rewards changes nothing. The form with β/2 is from memory, the square second-hand; β has no default
    because we do not know theirs. R = c_t is ours and needs two replies **to the same history**: the log-partition
    terms of different histories do not cancel.

    Args:
        log_ratios: Σ (lp − lpʳ) of y [P, n], carries the gradient.
        other_log_ratios: The same of y'.
        rewards: R of y [P, n].
        other_rewards: R' of y'.
        valid: [P, n] bool.
        beta: β > 0.

    Returns:
        L [P, n], 0 at invalid turns.

    Raises:
        ValueError: β not positive, shapes that differ, or NaN at a valid turn.
    """
    if not beta > 0:
        raise ValueError(f"expected beta > 0, got {beta}")
    one, two, difference = pairs(log_ratios, other_log_ratios, rewards, other_rewards, valid)
    u = one - two
    return -(difference - beta / 2 * u) * u


def p3o(
    log_ratios: Tensor,
    other_log_ratios: Tensor,
    rewards: Tensor,
    other_rewards: Tensor,
    valid: Tensor,
    *,
    clip: float | None = 0.2,
) -> Tensor:
    """P3O, pairwise policy gradient (2310.00212), clipped per reply.

        L = −½ Σ_i min(w_i·A_i, clip(w_i, 1 − ε, 1 + ε)·A_i),   A_i = sg(w_{−i}·(r_i − r_{−i})),   i = 1, 2

    Unclipped, its gradient is −½·w₁w₂·(r₁ − r₂)·∇(lp₁ − lp₂), the pairwise policy gradient: on samples of π_θ that of
    E[r], off them with both ratios. Adding to both rewards a term that depends only on the history changes nothing.
    The unclipped form is from the authors' text. We know no exact form of the clipped ones (V1 separate, V2 joint):
    this one, leaving out V2, and ε are ours. They subtract β·log(π/π_SFT) from the reward:
    ``advantages.kl_shaped_reward``. On samples of π_θ the other reply may be from any independent conversation with a
    valid turn t (ours): it is a baseline and needs no shared history.

    Args:
        log_ratios: Σ (lp − lp°) of y₁ against the policy that sampled [P, n], carries the gradient.
        other_log_ratios: The same of y₂.
        rewards: r₁ [P, n].
        other_rewards: r₂.
        valid: [P, n] bool.
        clip: ε in [0, 1], or None.

    Returns:
        L [P, n], 0 at invalid turns.

    Raises:
        ValueError: Shapes that differ, NaN at a valid turn, or ε outside [0, 1].
    """
    log_one, log_two, difference = pairs(log_ratios, other_log_ratios, rewards, other_rewards, valid)
    one, two = ratio(log_one), ratio(log_two)
    first, second = two.detach() * difference, -one.detach() * difference
    if clip is None:
        return -(one * first + two * second) / 2
    return (
        clipped_surrogate(one, first, clip_low=clip, clip_high=clip)
        + clipped_surrogate(two, second, clip_low=clip, clip_high=clip)
    ) / 2


def a_lol(
    log_probs: Tensor,
    reference_log_probs: Tensor,
    advantage: Tensor,
    token_mask: Tensor,
    turn_index: Tensor,
    *,
    variant: ALoLVariant = "reference_free",
    clip: float = 0.9,
    beta: float = 0.2,
) -> Tensor:
    """A-LoL (2305.14718): offline, learns from replies that beat the reference policy's value, A = R − V_ref.

    ====================  ===========================================================================
    ``reference_free``    L_j = −max(A, 0)·lp_j
    ``sequence_ratio``    L_j = −sg(clip(ρ, 1 − ε, 1 + ε))·max(A, 0)·lp_j, ρ = π_θ/π_ref of the reply
    ``token_ratio``       the same with one clipped ρ_j per token (their "seq")
    ``kl``                L_j = −A·lp_j + β·(lp_j − lpʳ_j) where A ≥ 0
    ====================  ===========================================================================

    Where A < 0 the loss is 0: they drop such data. ε, β and sums over tokens (``sum``, no means) are as in the authors'
    code. With V = 0 and R ≥ 0, ``reference_free`` is ``losses.partial_policy_gradient`` of logged replies. Ours: the
    sequence is a turn's reply, R = c_t, and V_t is a value fitted to held-out logged turns on frozen features.

    Args:
        log_probs: lp [B, L] of the logged tokens, floating, carries the gradient.
        reference_log_probs: lpʳ [B, L]; not used by ``reference_free``.
        advantage: A [B, L], the turn's c_t − V_t at every token.
        token_mask: [B, L] bool.
        turn_index: [B, L] integer, from 0.
        variant: Row of the table.
        clip: ε in [0, 1].
        beta: β ≥ 0 of ``kl``.

    Returns:
        L [B, L], 0 outside the mask.

    Raises:
        ValueError: Shapes or dtypes that do not fit, NaN in the mask, an unknown variant, or ε or β out of range.
    """
    if variant not in get_args(ALoLVariant):
        raise ValueError(not_one_of("variant", variant, get_args(ALoLVariant)))
    if not 0 <= clip <= 1 or not beta >= 0:
        raise ValueError(f"expected clip in [0, 1] and beta >= 0, got {clip} and {beta}")
    credit = token_advantage(advantage, log_probs, token_mask)
    scored, gain = checked(log_probs, token_mask), credit.clamp(min=0.0)
    if variant == "reference_free":
        return -gain * scored
    log_ratios = log_ratio(log_probs, reference_log_probs, token_mask)
    if variant == "kl":
        return (-gain * scored + beta * log_ratios).masked_fill(~token_mask | (credit < 0), 0.0)
    if variant == "sequence_ratio":
        tokens, turn = tokens_per_turn(token_mask, turn_index)
        log_ratios = turn_sum(log_ratios, token_mask, turn_index, tokens.shape[1]).gather(1, turn)
    return -ratio(log_ratios).detach().clamp(1 - clip, 1 + clip) * gain * scored


def empg(
    advantage: Tensor,
    entropy: Tensor,
    valid: Tensor,
    *,
    scale: float = 1.0,
    future_scale: float = 1.0,
    zeta: float = 0.0,
) -> Tensor:
    """EMPG (2509.09265): an advantage modulated by the turn's entropy, for any loss.

        h_t = (H_t − min)/(max − min + 1e-8),   g_t = e^{−k·h_t} / mean(e^{−k·h})
        A_t ← A_t·g_t + ζ·e^{−k'·h_{t+1}},   then minus its mean

    min, max and means run over all valid turns of the batch; t + 1 is the conversation's next valid turn, and the last
    gets no bonus. The mean of g is 1. Equal entropies, or k = 0, give g = 1: with ζ = 0 the result is then the centred
    A. h, g and the bonus are from the authors' page (k = k' = 1, ζ = 0.1); how they combine, and the centring, are
    second-hand. The default ζ = 0 is ours, because the bonus adds another objective; so is A = c_t − b_t.

    Args:
        advantage: A [B, n].
        entropy: H [B, n] ≥ 0, mean token entropy at sampling in nats: ``tokens.turn_mean``.
        valid: [B, n] bool.
        scale: k.
        future_scale: k'.
        zeta: ζ.

    Returns:
        A [B, n], 0 at invalid turns.

    Raises:
        ValueError: Shapes or dtypes that do not fit, or NaN at a valid turn.
    """
    base = constant_per_token("advantage", advantage, valid)
    turn_entropy = constant_per_token("entropy", entropy, valid).to(base)
    if not bool(valid.any()):
        return base
    low, high = turn_entropy[valid].min(), turn_entropy[valid].max()
    uncertainty = (turn_entropy - low) / (high - low + 1e-8)
    gate = (-scale * uncertainty).exp()
    bonus = zeta * (-future_scale * uncertainty).exp().masked_fill(~valid, 0.0)
    following = torch.zeros_like(base)
    coming = base.new_zeros(len(base))
    for t in reversed(range(base.shape[1])):
        following[:, t] = coming
        coming = torch.where(valid[:, t], bonus[:, t], coming)
    modulated = base * gate / gate[valid].mean() + following
    return (modulated - modulated[valid].mean()).masked_fill(~valid, 0.0)


def high_entropy_mask(entropy: Tensor, token_mask: Tensor, *, share: float = 0.2) -> Tensor:
    """Select forking tokens, "80/20" (2506.01939): those with entropy at or above the batch's (1 − ρ) quantile.

    Multiply any token loss by it. As in TRL, the aggregation still divides by all tokens, and a KL term is not masked.

    Args:
        entropy: H [B, L] of the current policy, nats.
        token_mask: [B, L] bool; tokens outside it do not enter the quantile.
        share: ρ in (0, 1]; 1 keeps all. Ties are kept.

    Returns:
        [B, L] bool, false outside the mask.

    Raises:
        ValueError: Shapes or dtypes that do not fit, NaN in the mask, or a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"expected a share in (0, 1], got {share}")
    constant = constant_per_token("entropy", entropy, token_mask)
    if not bool(token_mask.any()):
        return token_mask
    ordered = constant[token_mask].sort().values
    place = (1 - share) * (len(ordered) - 1)
    low, high = ordered[int(place)], ordered[min(int(place) + 1, len(ordered) - 1)]
    return token_mask & (constant >= torch.lerp(low, high, place - int(place)))


def pairs(
    log_ratios: Tensor, other_log_ratios: Tensor, rewards: Tensor, other_rewards: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return both log-ratios with gradient, and D = R − R' without; 0 at invalid turns.

    Args:
        log_ratios: [P, n].
        other_log_ratios: [P, n].
        rewards: R [P, n].
        other_rewards: R' [P, n].
        valid: [P, n] bool.

    Raises:
        ValueError: Shapes or dtypes that do not fit, or NaN at a valid turn.
    """
    reward = constant_per_token("rewards", rewards, valid)
    difference = reward - constant_per_token("other_rewards", other_rewards, valid).to(reward)
    return checked(log_ratios, valid), checked(other_log_ratios, valid), difference.to(log_ratios)
