"""Truncated importance weights for replies sampled by an older policy or another engine.

Pure functions, tensors in, tensors out; shapes as in `losses`. All of it is own: arXiv 2603.06138 samples from the
policy that learns.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ppg_agents.losses import constant_per_token, tokens_per_turn

Importance = Literal["none", "turn", "token"]


class Weights(NamedTuple):
    """Truncated importance weights.

    Attributes:
        per_token: min(cap, w) [B, L], 0 outside the mask; no gradient.
        raw: w [N] before truncation, one per turn (level ``turn``) or token (level ``token``) of the mask.
    """

    per_token: Tensor
    raw: Tensor


def importance_weights(
    log_probs: Tensor,
    sampling_log_probs: Tensor,
    token_mask: Tensor,
    turn_index: Tensor,
    *,
    level: Importance = "turn",
    cap: float = 2.0,
) -> Weights:
    """Weight replies that another policy q sampled (an older version, another engine) for the learner π (own).

        turn:   w_{b,t} = min(cap, exp(Σ_{tokens i of turn t} (lp_i − lp°_i))), the same for all its tokens
        token:  w_i     = min(cap, exp(lp_i − lp°_i))

    Level ``turn``, cap = ∞: given the conversation so far, E_{y∼q}[w · A(y) · ∇ log π(y)] = E_{y∼π}[A(y) · ∇ log π(y)]
    for any A that depends on the reply y, if q(y) > 0 wherever π(y) > 0: the reply itself is corrected exactly.
    Nothing else is: the history came from q, and so did the later replies whose rewards a policy class with lookahead
    puts into A. So the greedy class is corrected except for the distribution of histories; K-step and full planning
    except for that and for the K − 1 (n − t) later replies.

    A finite cap bounds the variance and biases towards q: a reply more than cap times as likely under π as under q
    counts cap times. Level ``token`` has far less variance in long replies, but is biased even without a cap: it
    leaves out the ratios of the reply's other tokens. Both are exact at π = q, where every w is 1.

    Args:
        log_probs: lp [B, L] of the learner, floating; its gradient is stopped.
        sampling_log_probs: lp° [B, L], of the distribution sampled from.
        token_mask: [B, L] bool, true at sampled tokens.
        turn_index: [B, L] integer, each token's turn, from 0; read only where ``token_mask`` is true.
        level: ``turn`` or ``token``.
        cap: Largest weight, ≥ 1.

    Raises:
        ValueError: Shapes or dtypes that do not fit, an unknown level, a cap below 1, or NaN in the mask.
    """
    if level not in ("turn", "token") or not cap >= 1:
        raise ValueError(f"expected level 'turn' or 'token' and cap >= 1, got {level!r} and {cap}")
    learner = constant_per_token("log_probs", log_probs, token_mask)
    ratio = learner - constant_per_token("sampling_log_probs", sampling_log_probs, token_mask).to(learner)
    if level == "token":
        raw = ratio.exp()
        return Weights(raw.clamp(max=cap).masked_fill(~token_mask, 0.0), raw[token_mask])
    tokens, turn = tokens_per_turn(token_mask, turn_index)
    per_turn = torch.zeros_like(tokens, dtype=ratio.dtype).scatter_add(1, turn, ratio).exp()
    per_token = per_turn.clamp(max=cap).gather(1, turn).masked_fill(~token_mask, 0.0)
    return Weights(per_token, per_turn[tokens > 0])


def effective_share(total: float, squares: float, count: int) -> float:
    """Return the effective sample size as a share of the sample, (Σw)² / (N · Σw²); 1 if all weights are equal.

    Args:
        total: Σw.
        squares: Σw².
        count: N; 0 gives 1.
    """
    return total**2 / (count * squares) if count and squares else 1.0
