"""Other alternatives: SAPO, DISPO, the pairwise CoPG and P3O, A-LoL offline, EMPG, the high-entropy mask.

Token losses are [B, L] as in ``alternatives.clipped``. Pairwise losses are per pair and turn, [P, n]: row p is a
pair of conversations, column t their replies y, y' at turn t, with log-ratios summed over the reply
(``tokens.turn_sum`` of ``tokens.log_ratio``) and a credit each, c_t and c'_t, for a reward (ours; the sources have one
reward per completion). ``valid`` is true where both turns are. ``tokens.aggregate_turns`` reduces them; both replies of
a pair belong in the same micro-batch.
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
    """SAPO (2511.20347): a soft gate in the place of the clip, L = −f(w)·A, f(w) = (4/τ)·σ(τ·(w − 1)).

    τ = τ₊ where A > 0, else τ₋; form and defaults as in TRL (there with ``sequence_mean``). With p = σ(τ(w − 1)) the
    gate's slope is f'(w) = 4p(1 − p): 1 at w = 1, where the gradient is REINFORCE's, symmetric about it, and
    f'(w)·w → 0 as w → ∞. f(1) = 2/τ, so values of the loss are not comparable with those of others. Taking the sign
    of a turn's credit to choose τ is ours.

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
        ValueError: Shapes or dtypes that do not fit, NaN in the mask, or a temperature that is not positive.
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

    Four regimes: w above and below 1, for what was good and what was bad. Equal ε's are a two-sided ``cispo``, ε → ∞
    is importance weighting per token. Form and defaults are second-hand. Theirs tells correct from incorrect
    answers; ours takes the sign of A. With a credit ≥ 0 and no baseline the negative bounds are never used: subtract
    a baseline.

    Args:
        log_probs: lp [B, L], floating, carries the gradient.
        sampling_log_probs: lp° [B, L].
        advantage: A [B, L]; theirs is GRPO's, with ``token_mean``.
        token_mask: [B, L] bool.
        positive_low: ε₊lo ≥ 0; w is never negative, so 1 and more is no bound.
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
    """CoPG (2406.19185): contrastive policy gradient on pairs of any origin.

        L = −(D − (β/2)·u)·u,   D = R − R',   u = log(π_θ/π_ref)(y) − log(π_θ/π_ref)(y')

    It is (D − β·u)²/(2β) up to a constant, so that no importance weights are needed: the gradient −(D − βu)·∇u is
    zero at π* ∝ π_ref·e^{R/β}, whatever sampled the pairs. On samples of π_θ it is −2∇(E[R] − β·KL(π_θ ‖ π_ref)). A
    constant added to both rewards changes nothing. The form with β/2 is from memory, the square second-hand; β has no
    default here because theirs is not known to us. R = c_t is ours, and needs two replies **to the same history**: the
    log-partition terms of different histories do not cancel.

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

    Unclipped its gradient is −½·w₁w₂·(r₁ − r₂)·∇(lp₁ − lp₂): the pairwise policy gradient, which on samples of π_θ is
    that of E[r], and off it with both ratios. Adding to both rewards what depends on the history alone changes
    nothing. The unclipped form is from the authors' text; of the clipped ones (V1 separate, V2 joint) we know no exact
    form: this one, and leaving out V2, are ours, and so is ε. Their reward has β·log(π/π_SFT) taken off:
    ``advantages.kl_shaped_reward``. On samples of π_θ the partner may be any independent conversation with a valid
    turn t (ours): it is a baseline, no shared history is needed.

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
    """A-LoL (2305.14718): offline, on what is better than the reference policy would do, A = R − V_ref.

    ====================  ===========================================================================
    ``reference_free``    L_j = −max(A, 0)·lp_j
    ``sequence_ratio``    L_j = −sg(clip(ρ, 1 − ε, 1 + ε))·max(A, 0)·lp_j, ρ = π_θ/π_ref of the reply
    ``token_ratio``       the same with one clipped ρ_j per token (their "seq")
    ``kl``                L_j = −A·lp_j + β·(lp_j − lpʳ_j) where A ≥ 0
    ====================  ===========================================================================

    Where A < 0 everything is 0: they drop such data. ε, β and sums over tokens (``sum``, no means) as in the authors'
    code. With V = 0 and R ≥ 0, ``reference_free`` is ``losses.reward_weighted_log_likelihood``. Ours: the sequence is
    the reply of a turn, R = c_t, and V_t a value fitted to held-out logged turns on frozen features.

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
    own, kept = checked(log_probs, token_mask), credit.clamp(min=0.0)
    if variant == "reference_free":
        return -kept * own
    log_ratios = log_ratio(log_probs, reference_log_probs, token_mask)
    if variant == "kl":
        return (-kept * own + beta * log_ratios).masked_fill(~token_mask | (credit < 0), 0.0)
    if variant == "sequence_ratio":
        tokens, turn = tokens_per_turn(token_mask, turn_index)
        log_ratios = turn_sum(log_ratios, token_mask, turn_index, tokens.shape[1]).gather(1, turn)
    return -ratio(log_ratios).detach().clamp(1 - clip, 1 + clip) * kept * own


def empg(
    advantage: Tensor,
    entropy: Tensor,
    valid: Tensor,
    *,
    scale: float = 1.0,
    future_scale: float = 1.0,
    zeta: float = 0.0,
) -> Tensor:
    """EMPG (2509.09265): an advantage changed by the turn's entropy, for any loss.

        h_t = (H_t − min)/(max − min + 1e-8),   g_t = e^{−k·h_t} / mean(e^{−k·h})
        A_t ← A_t·g_t + ζ·e^{−k'·h_{t+1}},   then less its mean

    min, max and means over all valid turns of the batch, t + 1 the conversation's next valid turn, no bonus after its
    last. mean g = 1; equal entropies give g = 1, so that with ζ = 0 the result is the centred A; k = 0 does too. h, g
    and the bonus are from the authors' page (k = k' = 1, ζ = 0.1); how they combine, and the centring, are second-hand.
    ζ = 0 by default is ours: the bonus adds an objective of its own. A = c_t − b_t is ours.

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
    own = constant_per_token("advantage", advantage, valid)
    spread = constant_per_token("entropy", entropy, valid).to(own)
    if not bool(valid.any()):
        return own
    low, high = spread[valid].min(), spread[valid].max()
    uncertainty = (spread - low) / (high - low + 1e-8)
    gate = (-scale * uncertainty).exp()
    bonus = zeta * (-future_scale * uncertainty).exp().masked_fill(~valid, 0.0)
    following = torch.zeros_like(own)
    coming = own.new_zeros(len(own))
    for t in reversed(range(own.shape[1])):
        following[:, t] = coming
        coming = torch.where(valid[:, t], bonus[:, t], coming)
    changed = own * gate / gate[valid].mean() + following
    return (changed - changed[valid].mean()).masked_fill(~valid, 0.0)


def high_entropy_mask(entropy: Tensor, token_mask: Tensor, *, share: float = 0.2) -> Tensor:
    """Tokens at forks, "80/20" (2506.01939): those whose entropy is at or above the (1 − ρ) quantile of the batch.

    Multiply any token loss by it. The denominator of the aggregation stays that of all tokens, and a KL term is not
    masked, as in TRL.

    Args:
        entropy: H [B, L] of the current policy, nats.
        token_mask: [B, L] bool; other tokens enter no quantile.
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
    """Return both log-ratios with their gradients and D = R − R' without, 0 at invalid turns.

    Args:
        log_ratios: [P, n].
        other_log_ratios: [P, n].
        rewards: R [P, n].
        other_rewards: R' [P, n].
        valid: [P, n] bool.

    Raises:
        ValueError: Shapes or dtypes that do not fit, or NaN at a valid turn.
    """
    own = constant_per_token("rewards", rewards, valid)
    difference = own - constant_per_token("other_rewards", other_rewards, valid).to(own)
    return checked(log_ratios, valid), checked(other_log_ratios, valid), difference.to(log_ratios)
