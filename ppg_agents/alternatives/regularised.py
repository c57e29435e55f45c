"""KL-regularised policy gradients, RPG (arXiv 2505.17508): four divergences, each in two forms.

The objective is J(θ) = E_{π_θ}[R] − β·D, estimated on samples of π° (the behaviour policy, in their work also the
reference, renewed every iteration). With w = π_θ/π°, A = R − b and sg for stop-gradient, L is

================  =============================  ================================  ===============================
divergence D                                     differentiable (w has gradient)   REINFORCE-style: −sg(W)·lp, W =
================  =============================  ================================  ===============================
``forward``       FKL = KL(π°‖π_θ)               −w·A − β·log π_θ                  w·A + β
``forward_u``     UFKL = UKL(π°‖π_θ)             −w·A + β·(w − log w − 1)          w·A − β·(w − 1)
``reverse``       RKL = KL(π_θ‖π°)               w·(−A + β·log w)                  w·(A − β·(log w + 1))
``reverse_u``     URKL = UKL(π_θ‖π°)             −w·A + β·(w·log w − w)            w·(A − β·log w)
================  =============================  ================================  ===============================

with UKL(p‖q) = Σ p·log(p/q) + Σ(q − p), for measures of any mass; the factor Z° = Σπ° is 1 for a language model.
For normalised policies the two forms of a divergence, and a divergence and its unnormalised twin, have the same
expected gradient, −∇J. At w = 1, W is A + β, A, A − β, A. β = 0 is the importance-weighted policy gradient. Here the
differentiable form has −β·log w for −β·log π_θ: the gradient is the same, and the value estimates −J.

Ours: the sample is a reply, R its credit c_t, b any baseline. ``level="turn"`` takes w as the product over the reply's
tokens, which is exact for the reply given its history; a reply's differentiable loss is split equally over its tokens.
``level="token"`` (as in their code) takes one token as the sample: **its log w does not give the gradient of the
reply's reverse KL**, which needs the log-ratios from the token to the end of the reply: ``kl_to_go``. Histories come
from π°: neither level corrects earlier turns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ppg_agents.alternatives.clipped import check_bounds, clipped_surrogate
from ppg_agents.alternatives.tokens import (
    LOG_RATIO_LIMIT,
    checked,
    log_ratio,
    ratio,
    to_go,
    token_advantage,
    turn_share,
    turn_sum,
)
from ppg_agents.nearest import not_one_of

Divergence = Literal["forward", "forward_u", "reverse", "reverse_u"]
Level = Literal["token", "turn"]
DifferentiableClip = Literal["none", "paper", "released"]
ReinforceClip = Literal["none", "paper", "hard", "released"]


def rpg_differentiable(
    log_probs: Tensor,
    sampling_log_probs: Tensor,
    advantage: Tensor,
    token_mask: Tensor,
    turn_index: Tensor,
    *,
    divergence: Divergence,
    beta: float,
    level: Level = "token",
    clip: DifferentiableClip = "none",
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float = 10.0,
    reference_log_probs: Tensor | None = None,
    kl_to_go: bool = False,
) -> Tensor:
    """RPG, fully differentiable form (2505.17508); see the table in the module's docstring.

    Clips, which bias J:

    - ``paper``: PPO's dual clip on Â, with Â = A − β·log w (``reverse_u``), A − β·(log w + 1) (``reverse``), A
      (``forward`` and ``forward_u``). They let the gradient through Â too, which has the same expectation when nothing
      is clipped; we stop it. How β enters their forward divergences is unclear to us: we add the table's term,
      unclipped.
    - ``released``: PPO's dual clip on A, plus β times −log w, w − log w − 1, w·log w, or w·(log w − 1) + 1, unclipped
      in w; except for ``forward`` the term is clamped to ±10, with no gradient beyond. Read from their repository
      (commit ec8e30b).

    Args:
        log_probs: lp [B, L], floating, carries the gradient.
        sampling_log_probs: lp° [B, L].
        advantage: A [B, L], equal within a turn at level ``turn``.
        token_mask: [B, L] bool; the tokens of a turn follow those of the turn before.
        turn_index: [B, L] integer, from 0.
        divergence: D.
        beta: β ≥ 0; their default is 1e-4.
        level: Whether w is a token's ratio or a turn's.
        clip: See above.
        clip_low: ε_1 in [0, 1].
        clip_high: ε_2 ≥ 0.
        dual_clip: c > 1; 10 in their scripts.
        reference_log_probs: lpʳ [B, L] if the reference is not the sampling policy (ours): the reverse divergences
            then have u = π_θ/π_ref in their logarithms, and w stays the weight. The forward divergences need samples
            of the reference and refuse this argument.
        kl_to_go: Sum the log-ratios to the end of the reply (ours); reverse divergences at level ``token`` only.

    Returns:
        L [B, L], 0 outside the mask.

    Raises:
        ValueError: Shapes or dtypes that do not fit, NaN in the mask, an unknown name, a bound outside its range, or
            an option that the divergence, the level or the clip does not allow.
    """
    _known("clip", clip, get_args(DifferentiableClip))
    check_bounds(clip_low, clip_high, dual_clip)
    _check(divergence, beta, level, clip, reference_log_probs, kl_to_go)
    s = _sample(log_probs, sampling_log_probs, advantage, token_mask, turn_index, level, reference_log_probs, kl_to_go)
    w, log_u, credit = s.weight, s.log_u, s.advantage
    if clip == "none":
        return ((beta * _kl_term(divergence, s) - w * credit) * s.share).masked_fill(~token_mask, 0.0)
    term = _kl_term(divergence, s)
    if clip == "paper" and divergence in ("reverse", "reverse_u"):
        offset = log_u + 1 if divergence == "reverse" else log_u
        credit, term = credit - beta * offset.detach(), torch.zeros_like(w)
    elif clip == "released" and divergence != "forward":
        term = (term + 1 if divergence == "reverse_u" else term).clamp(-10, 10)
    clipped = clipped_surrogate(w, credit, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    return ((clipped + beta * term) * s.share).masked_fill(~token_mask, 0.0)


def rpg_reinforce(
    log_probs: Tensor,
    sampling_log_probs: Tensor,
    advantage: Tensor,
    token_mask: Tensor,
    turn_index: Tensor,
    *,
    divergence: Divergence,
    beta: float,
    level: Level = "token",
    clip: ReinforceClip = "none",
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float = 10.0,
    reference_log_probs: Tensor | None = None,
    kl_to_go: bool = False,
) -> Tensor:
    """RPG, REINFORCE-style form (2505.17508): L = −sg(W)·lp; see the table in the module's docstring.

    Clips, which bias J. K is the KL part of W: β, −β·(w − 1), −β·w·(log w + 1), −β·w·log w.

    - ``paper``: the coefficient of lp is w·A + K, zeroed where A' ≥ 0 and w ≥ 1 + ε_2, and where A' < 0 and
      (w ≤ 1 − ε_1 or w ≥ c), with A' = A + K/w.
    - ``hard`` (their repository): clip(w, 1 − ε_1, 1 + ε_2) in place of every w, in logarithms too; never zeroed.
    - ``released`` (their repository, the one its scripts name): w·A + K with K from the clipped w, zeroed as in
      ``paper`` but by the sign of A, not A'.

    The repository (commit ec8e30b) defines this loss but, as far as we found, never calls it: how the published runs
    of this form were made is an open question.

    Args, result and errors are those of ``rpg_differentiable``, with ``clip`` out of the list above.
    """
    _known("clip", clip, get_args(ReinforceClip))
    check_bounds(clip_low, clip_high, dual_clip)
    _check(divergence, beta, level, clip, reference_log_probs, kl_to_go)
    s = _sample(log_probs, sampling_log_probs, advantage, token_mask, turn_index, level, reference_log_probs, kl_to_go)
    w, log_u, credit = s.weight.detach(), s.log_u.detach(), s.advantage
    bounded = w.clamp(1 - clip_low, 1 + clip_high)
    if clip == "none":
        coefficient = w * credit + beta * _kl_part(divergence, w, log_u)
    elif clip == "hard":
        coefficient = bounded * credit + beta * _kl_part(divergence, bounded, _log(bounded))
    elif clip == "released":
        coefficient = w * credit + beta * _kl_part(divergence, bounded, _log(bounded))
        coefficient = _zeroed(coefficient, credit, w, clip_low, clip_high, dual_clip)
    else:
        part = beta * _kl_part(divergence, w, log_u)
        coefficient = _zeroed(w * credit + part, credit + part / w, w, clip_low, clip_high, dual_clip)
    return -coefficient * checked(log_probs, token_mask)


@dataclass(frozen=True)
class _Sample:
    """What both forms need per token [B, L]; at level ``turn`` every token has its reply's value."""

    advantage: Tensor
    log_w: Tensor
    log_u: Tensor
    weight: Tensor
    share: Tensor


def _sample(
    log_probs: Tensor,
    sampling_log_probs: Tensor,
    advantage: Tensor,
    token_mask: Tensor,
    turn_index: Tensor,
    level: Level,
    reference_log_probs: Tensor | None,
    kl_to_go: bool,
) -> _Sample:
    def at_level(other: Tensor) -> Tensor:
        per_token = log_ratio(log_probs, other, token_mask)
        if level == "turn":
            turn = turn_index.long().masked_fill(~token_mask, 0)
            turns = int(turn.max()) + 1 if turn.numel() else 1
            per_token = turn_sum(per_token, token_mask, turn_index, turns).gather(1, turn)
        return per_token.masked_fill(~token_mask, 0.0).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)

    log_w = at_level(sampling_log_probs)
    log_u = log_w if reference_log_probs is None else at_level(reference_log_probs)
    if kl_to_go:
        log_u = log_u + (to_go(log_u, token_mask, turn_index) - log_u).detach()
    share = turn_share(token_mask, turn_index) if level == "turn" else token_mask
    return _Sample(token_advantage(advantage, log_probs, token_mask), log_w, log_u, ratio(log_w), share.to(log_probs))


def _kl_term(divergence: Divergence, s: _Sample) -> Tensor:
    """Return the factor of β in the differentiable form."""
    if divergence == "forward":
        return -s.log_w
    if divergence == "forward_u":
        return s.weight - s.log_w - 1
    return s.weight * s.log_u if divergence == "reverse" else s.weight * s.log_u - s.weight


def _kl_part(divergence: Divergence, w: Tensor, log_u: Tensor) -> Tensor:
    """Return K/β: W without its advantage term."""
    if divergence == "forward":
        return torch.ones_like(w)
    if divergence == "forward_u":
        return 1 - w
    return -w * (log_u + 1) if divergence == "reverse" else -w * log_u


def _zeroed(
    coefficient: Tensor, sign: Tensor, w: Tensor, clip_low: float, clip_high: float, dual_clip: float
) -> Tensor:
    """Zero the coefficient outside the trust region, on the side given by the sign."""
    above = (sign >= 0) & (w >= 1 + clip_high)
    below = (sign < 0) & ((w <= 1 - clip_low) | (w >= dual_clip))
    return coefficient.masked_fill(above | below, 0.0)


def _log(bounded: Tensor) -> Tensor:
    return bounded.clamp(min=math.exp(-LOG_RATIO_LIMIT)).log()


def _check(
    divergence: Divergence,
    beta: float,
    level: Level,
    clip: str,
    reference_log_probs: Tensor | None,
    kl_to_go: bool,
) -> None:
    _known("divergence", divergence, get_args(Divergence))
    _known("level", level, get_args(Level))
    if not beta >= 0:
        raise ValueError(f"expected beta >= 0, got {beta}")
    if reference_log_probs is None and not kl_to_go:
        return
    if divergence in ("forward", "forward_u"):
        raise ValueError(
            f"expected no reference_log_probs and no kl_to_go for {divergence!r}: it needs samples of the reference, "
            "and is exact per token; use 'reverse' or 'reverse_u'"
        )
    if clip in ("hard", "released") or (kl_to_go and level == "turn"):
        raise ValueError(
            f"expected clip 'none' or 'paper' with reference_log_probs or kl_to_go, and kl_to_go at level 'token' "
            f"only, got clip = {clip!r}, level = {level!r}"
        )


def _known(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(not_one_of(name, value, known))
