"""The classical losses: REINFORCE, PPO's clip (with GRPO's, DAPO's and RLOO's settings), CISPO, the KL term.

A loss returns L per token [B, L], 0 outside the mask, for ``ppg_agents.losses.aggregate``. Notation: lp = log
π_θ(token), lp° = the log-prob at sampling, lpʳ that of the reference, w = exp(lp − lp°), A = the advantage per token,
without gradient: ``losses.broadcast_credit`` of a policy class's credit or of an advantage from
``alternatives.advantages``, or the result of ``alternatives.value.gae``. A policy loss's value means nothing, only its
gradient does.

At w = 1 REINFORCE, PPO, CISPO, SAPO and DISPO all have the gradient −A · ∇lp at every token. **Weights per token are
not exact off the sampling policy**, even with an exact A: they leave out the ratios of the reply's other tokens. They
are exact at w = 1, and for a single reply of one token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ppg_agents.alternatives.tokens import checked, log_ratio, ratio, token_advantage


def ppo_clip(
    log_probs: Tensor,
    sampling_log_probs: Tensor,
    advantage: Tensor,
    token_mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    ratio_cap: float | None = None,
) -> Tensor:
    """PPO's clipped surrogate (1707.06347), per token.

        L = −min(w·A, clip(w, 1 − ε_lo, 1 + ε_hi)·A);   dual clip: L ← min(L, −c·A) where A < 0

    ===========================  ============================================================================
    PPO (1707.06347)             ε_lo = ε_hi = 0.2, A from ``value.gae``
    GRPO (2402.03300)            ε = 0.2, A from ``advantages.grpo``, ``sequence_mean``, plus β · ``kl_term``
    Dr. GRPO (2503.20783)        the same with A not divided by the deviation, ``constant`` with a fixed C
    DAPO (2503.14476)            ε_lo = 0.2, ε_hi = 0.28, GRPO's A, ``token_mean``, no KL term
    REINFORCE++ (2501.03262)     ε = 0.2, A from ``advantages.whiten``
    ===========================  ============================================================================

    The gradient is zero exactly where A > 0 and w > 1 + ε_hi, where A < 0 and w < 1 − ε_lo, and with a dual clip
    where A < 0 and w > c. The dual clip is from 1912.09729 (c = 3). ``ratio_cap`` is TRL's two-sided clip: min(w, δ) in
    the first term. At w = 1 the gradient is REINFORCE's, so none of this acts before the second optimiser step on a
    batch.

    Args:
        log_probs: lp [B, L], floating, carries the gradient.
        sampling_log_probs: lp° [B, L].
        advantage: A [B, L].
        token_mask: [B, L] bool.
        clip_low: ε_lo in [0, 1].
        clip_high: ε_hi ≥ 0.
        dual_clip: c > 1, or None.
        ratio_cap: δ > 1 + ε_hi, or None.

    Returns:
        L [B, L].

    Raises:
        ValueError: Shapes or dtypes that do not fit, NaN in the mask, or a bound outside its range.
    """
    weight = ratio(log_ratio(log_probs, sampling_log_probs, token_mask))
    credit = token_advantage(advantage, log_probs, token_mask)
    return clipped_surrogate(
        weight, credit, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, ratio_cap=ratio_cap
    )


def ppo_clip_turns(
    log_ratios: Tensor,
    advantage: Tensor,
    valid: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> Tensor:
    """PPO's clipped surrogate with one ratio per reply, as in TRL's RLOO (2402.14740 as shipped there).

        w_t = exp(Σ_{tokens j of turn t} (lp_j − lp°_j)),   L_t = −min(w_t·A_t, clip(w_t, 1 − ε_lo, 1 + ε_hi)·A_t)

    Within the clip range it is exact for the reply given its history; weights per token are not. Their sequence is a
    prompt's only completion; using a turn's reply instead is ours.

    Args:
        log_ratios: Σ (lp − lp°) [B, n], carries the gradient: ``tokens.turn_sum`` of ``tokens.log_ratio``.
        advantage: A [B, n], for instance from ``advantages.rloo``.
        valid: [B, n] bool.
        clip_low: ε_lo in [0, 1].
        clip_high: ε_hi ≥ 0.
        dual_clip: c > 1, or None.

    Returns:
        L [B, n], 0 at invalid turns.

    Raises:
        ValueError: A bound is outside its range.
    """
    credit = advantage.detach().to(log_ratios).masked_fill(~valid, 0.0)
    weight = ratio(log_ratios.masked_fill(~valid, 0.0))
    return clipped_surrogate(weight, credit, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)


def cispo(
    log_probs: Tensor,
    sampling_log_probs: Tensor,
    advantage: Tensor,
    token_mask: Tensor,
    *,
    max_weight: float = 5.0,
) -> Tensor:
    """CISPO (2506.13585): L = −sg(min(w, w_max)) · A · lp; no token loses its gradient.

    The bound is absolute and only an upper one: 5.0 as 2510.13786 recommends and TRL uses (their clip also has a lower
    bound, which they leave open). The value differs from PPO's; at w = 1 the gradient is the same. w_max → ∞ is plain
    importance weighting per token.

    Args:
        log_probs: lp [B, L], floating, carries the gradient.
        sampling_log_probs: lp° [B, L].
        advantage: A [B, L].
        token_mask: [B, L] bool.
        max_weight: w_max ≥ 1. Below 1 it would scale gradients even at w = 1.

    Returns:
        L [B, L].

    Raises:
        ValueError: Shapes or dtypes that do not fit, NaN in the mask, or ``max_weight`` below 1.
    """
    if not max_weight >= 1:
        raise ValueError(f"expected max_weight >= 1, an absolute bound on w, got {max_weight}; 5.0 is usual")
    weight = ratio(log_ratio(log_probs, sampling_log_probs, token_mask)).detach().clamp(max=max_weight)
    return -weight * token_advantage(advantage, log_probs, token_mask) * checked(log_probs, token_mask)


def kl_term(
    log_probs: Tensor,
    reference_log_probs: Tensor,
    token_mask: Tensor,
    *,
    sampling_log_probs: Tensor | None = None,
    kl_weighted: bool = True,
) -> Tensor:
    """GRPO's KL term (2402.03300): k3 = e^{lpʳ − lp} − (lpʳ − lp) − 1, times w.

    The value estimates KL(π ‖ π_ref) per token. On samples of π its gradient is that of this KL only when k3 is
    multiplied by w = exp(lp − lp°), gradient included, as TRL does by default; **without w it is that of the forward
    KL(π_ref ‖ π)**. Either way the divergence is that of each token given its prefix. ``losses.kl_loss`` has
    the gradient of the reverse KL without w.

    Args:
        log_probs: lp [B, L], floating, carries the gradient.
        reference_log_probs: lpʳ [B, L].
        token_mask: [B, L] bool.
        sampling_log_probs: lp° [B, L]; None when π itself sampled.
        kl_weighted: Multiply by w.

    Returns:
        [B, L]; the caller multiplies it by β and adds it to the policy loss.

    Raises:
        ValueError: Shapes or dtypes that do not fit, NaN in the mask, or sampling log-probs without weighting.
    """
    if sampling_log_probs is not None and not kl_weighted:
        raise ValueError("expected no sampling_log_probs with kl_weighted=False, which does not use them")
    back = -log_ratio(log_probs, reference_log_probs, token_mask)
    k3 = ratio(back) - back - 1
    if not kl_weighted:
        return k3
    sampling = log_probs.detach() if sampling_log_probs is None else sampling_log_probs
    return k3 * ratio(log_ratio(log_probs, sampling, token_mask))


def clipped_surrogate(
    weight: Tensor,
    advantage: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    ratio_cap: float | None = None,
) -> Tensor:
    """Clip one ratio per entry as in ``ppo_clip``; any shape, no mask.

    Args:
        weight: w, carries the gradient.
        advantage: A, without gradient.
        clip_low: ε_lo in [0, 1].
        clip_high: ε_hi ≥ 0.
        dual_clip: c > 1, or None.
        ratio_cap: δ > 1 + ε_hi, or None.

    Raises:
        ValueError: A bound is outside its range.
    """
    check_bounds(clip_low, clip_high, dual_clip)
    if ratio_cap is not None and not ratio_cap > 1 + clip_high:
        raise ValueError(f"expected ratio_cap > 1 + clip_high = {1 + clip_high}, got {ratio_cap}")
    free = weight if ratio_cap is None else weight.clamp(max=ratio_cap)
    loss = -torch.minimum(free * advantage, weight.clamp(1 - clip_low, 1 + clip_high) * advantage)
    if dual_clip is not None:
        loss = torch.where(advantage < 0, torch.minimum(loss, -dual_clip * advantage), loss)
    return loss


def check_bounds(clip_low: float, clip_high: float, dual_clip: float | None = None) -> None:
    """Raise unless the bounds contain w = 1.

    Raises:
        ValueError: ε_lo outside [0, 1], ε_hi below 0, or c not above 1.
    """
    if not 0 <= clip_low <= 1 or not clip_high >= 0:
        raise ValueError(f"expected clip_low in [0, 1] and clip_high >= 0, got {clip_low} and {clip_high}")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"expected dual_clip > 1, got {dual_clip}")
