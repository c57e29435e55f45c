"""Policy losses as pure functions: tensors in, scalar out.

Shapes: B conversations, L tokens in the longest of them, n turns. Every [B, L] tensor is indexed by the
position of the token itself: ``log_probs[b, i]`` is log π(token i | tokens before i). ``token_mask`` is true
at the tokens the policy sampled, end-of-turn included; entries elsewhere are never read.

[P] marks formulas of arXiv 2603.06138, "own" what this project defines. Nothing here may read a config,
log, or keep state.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from ppg_agents.nearest import not_one_of

Aggregation = Literal["sum", "constant", "token_mean", "sequence_mean", "turn_mean"]


def partial_policy_gradient(
    log_probs: Tensor,
    token_mask: Tensor,
    turn_index: Tensor,
    credit: Tensor,
    *,
    aggregation: Aggregation = "sum",
    constant: float | None = None,
    batch_size: int | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Loss whose gradient is minus the partial policy gradient [P].

        g = (1/B) Σ_b Σ_t A_{b,t} · ∇ log π(y_{b,t} | x_b, τ_{b,t−1}),
        log π(y_t | …) = Σ_{tokens i of turn t} lp_i

    Per token L_i = −A_{b,turn(i)} · lp_i. A is the credit Σ_{ℓ ∈ R_t} r_ℓ, minus a baseline (own) if one
    is used, and carries no gradient. Only ``sum`` is the paper's estimator, see ``aggregate``. Under ``sum`` a turn
    with credit 0 contributes nothing; for the means, first take invalid turns out of ``token_mask`` with
    ``turn_token_mask``. The loss's value means nothing, only its gradient does. With importance weights (own)
    L_i = −w_i · A_{b,turn(i)} · lp_i, see ``ppg_agents.agents.importance``.

    Offline, on log-probs of logged replies, without baseline and weights, the value does mean something: it is minus
    J_logged = E_logged[ Σ_t (Σ_{ℓ ∈ R_t} r_ℓ) · log π(y_t | x, τ_{t−1}) ] [P]. With credits ≥ 0 that is, up to a
    constant, a lower bound on the value, tight at the logging policy (u ≥ 1 + log u); it is not an unbiased on-policy
    gradient. Standardised or baselined credits (own) give up the bound.

    Args:
        log_probs: lp [B, L], floating, carries the gradient.
        token_mask: [B, L] bool, true at sampled tokens.
        turn_index: [B, L] integer, each token's turn, from 0; read only where ``token_mask`` is true.
        credit: A [B, n], from ``ppg_agents.credit.credit``, minus a baseline if any.
        aggregation: How per-token losses become one number.
        constant: C of the ``constant`` aggregation.
        batch_size: Units in the whole optimiser batch if this is one of its micro-batches, see ``aggregate``.
        weights: w [B, L], from ``ppg_agents.agents.importance``; None for 1.

    Returns:
        Scalar, in the dtype of ``log_probs``.

    Raises:
        ValueError: Shapes or dtypes that do not fit, a turn index outside [0, n), a credit that is not finite
            at a sampled token, or arguments that ``aggregate`` rejects.
    """
    advantage = broadcast_credit(credit, token_mask, turn_index).to(log_probs)
    per_token = token_policy_gradient(log_probs, advantage, token_mask, weights)
    return aggregate(
        per_token, token_mask, turn_index, aggregation=aggregation, constant=constant, batch_size=batch_size
    )


def token_policy_gradient(
    log_probs: Tensor, advantage: Tensor, token_mask: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Per-token loss L_i = −w_i · A_i · lp_i of ``partial_policy_gradient``, before its sum over tokens.

    Args:
        log_probs: lp [B, L], floating, carries the gradient.
        advantage: A [B, L], each token's, see ``broadcast_credit``.
        token_mask: [B, L] bool, true at sampled tokens.
        weights: w [B, L], from ``ppg_agents.agents.importance``; None for 1.

    Returns:
        [B, L] for ``aggregate``, 0 outside the mask.

    Raises:
        ValueError: Shapes or dtypes that do not fit, or NaN in the mask.
    """
    _check("log_probs", log_probs, token_mask, floating=True)
    if advantage.shape != token_mask.shape:
        raise ValueError(
            f"expected an advantage per token {list(token_mask.shape)}, got {list(advantage.shape)}; spread one per "
            "turn with losses.broadcast_credit"
        )
    weighted = constant_per_token("advantage", advantage, token_mask).to(log_probs)
    if weights is not None:
        weighted = weighted * constant_per_token("weights", weights, token_mask).to(weighted)
    return -weighted * log_probs.masked_fill(~token_mask, 0.0)


def kl_loss(
    log_probs: Tensor, reference_log_probs: Tensor, token_mask: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Per-token loss that pulls the policy back to a reference: k2 = ½ · (lp − lpʳ)² (own choice).

        L_i = w_i · k2_i,   E_{i ∼ π}[∇ k2_i] = E_{i ∼ π}[(lp_i − lpʳ_i) · ∇ lp_i] = ∇ KL(π(· | past) ‖ π_ref(· | past))

    Over tokens that π sampled, k2 has the gradient of the *reverse* KL of every next-token distribution, with the
    tokens before it fixed as sampled. k3 (``kl_estimate``) is the better estimate but the worse loss: without
    importance weights its gradient is that of the forward KL(π_ref ‖ π). A token's effect on the divergence of later
    tokens is left out. Adding the log-ratios to the end of the reply would give the gradient of the reply's KL, but so
    noisy that in trials on a small model the KL fell half as fast or not at all.

    Args:
        log_probs: lp [B, L], floating, carries the gradient.
        reference_log_probs: lpʳ [B, L], at the temperature of ``log_probs``.
        token_mask: [B, L] bool, true at sampled tokens.
        weights: w [B, L], from ``ppg_agents.agents.importance``; None for 1. At level ``turn`` they
            correct for the reply's other tokens too.

    Returns:
        [B, L] for ``aggregate``, 0 outside the mask.

    Raises:
        ValueError: Shapes or dtypes that do not fit, or NaN in the mask.
    """
    constant_per_token("log_probs", log_probs, token_mask)
    reference = constant_per_token("reference", reference_log_probs, token_mask).to(log_probs)
    per_token = 0.5 * (log_probs.masked_fill(~token_mask, 0.0) - reference).square()
    return per_token if weights is None else per_token * constant_per_token("weights", weights, token_mask)


def kl_estimate(log_probs: Tensor, reference_log_probs: Tensor, token_mask: Tensor) -> Tensor:
    """Estimate KL(π ‖ π_ref) at every token: k3 = e^{lpʳ−lp} − (lpʳ − lp) − 1, never negative.

    Over tokens that π sampled, its mean is the divergence given the prefix, so the sum over a reply is an unbiased
    estimate of KL(π(y_t | …) ‖ π_ref(y_t | …)), in nats.

    Args:
        log_probs: lp [B, L], floating.
        reference_log_probs: lpʳ [B, L].
        token_mask: [B, L] bool.

    Returns:
        [B, L], 0 outside the mask, no gradient.

    Raises:
        ValueError: Shapes or dtypes that do not fit, or NaN in the mask.
    """
    learner = constant_per_token("log_probs", log_probs, token_mask)
    ratio = constant_per_token("reference", reference_log_probs, token_mask).to(learner) - learner
    return ratio.expm1() - ratio


def aggregate(
    per_token: Tensor,
    token_mask: Tensor,
    turn_index: Tensor,
    *,
    aggregation: Aggregation = "sum",
    constant: float | None = None,
    batch_size: int | None = None,
) -> Tensor:
    """Reduce per-token losses L [B, L] with mask m to a scalar (``turn_mean`` own, the others as published).

    ==================  ==============================  ==================================================
    ``sum``             (1/B) Σ m·L                     the PPG estimator [P], the only one
    ``constant``        Σ m·L / (B·C)                   Dr. GRPO (2503.20783): ``sum`` at a fixed scale
    ``token_mean``      Σ m·L / Σ m                     DAPO (2503.14476): long conversations weigh more
    ``sequence_mean``   mean_b (Σ m·L / Σ m)_b          GRPO (2402.03300): tokens of short ones weigh more
    ``turn_mean``       mean_{b,t} (Σ m·L / Σ m)_{b,t}  tokens of short replies weigh more
    ==================  ==============================  ==================================================

    Means run over the conversations or turns with a token in the mask; ``sum`` and ``constant`` divide by all B
    conversations. An empty mask gives 0.

    Args:
        per_token: L [B, L], floating; ignored outside the mask.
        token_mask: m [B, L] bool.
        turn_index: [B, L] integer, used by ``turn_mean``.
        aggregation: Row of the table.
        constant: C > 0, in tokens; only with ``constant``. Fixed for a whole run.
        batch_size: Units (the table's denominator, counted by ``batch_units``) of the *whole* optimiser batch if this
            is one of its micro-batches: their losses then add up to the batch's. None: this is the whole batch.

    Returns:
        Scalar.

    Raises:
        ValueError: Shapes or dtypes that do not fit, an unknown aggregation, ``constant`` missing, not positive or
            given to another aggregation, or ``batch_size`` smaller than this micro-batch.
    """
    _check("per_token", per_token, token_mask, floating=True)
    units = batch_units(token_mask, turn_index, aggregation)
    if (constant is not None) != (aggregation == "constant") or (constant is not None and not constant > 0):
        raise ValueError(f"expected constant > 0 for 'constant' only, got {constant!r} for {aggregation!r}")
    if batch_size is not None and batch_size < units:
        raise ValueError(
            f"expected batch_size >= {units}, the units of {aggregation!r} in this micro-batch, got "
            f"{batch_size}; count those of the whole batch with batch_units"
        )
    # Divided by its own units, a short micro-batch would weigh as much as a long one. Divided by those of the whole
    # batch, all ranks included, the losses (and gradients) simply add up, however the batch was packed.
    size = max(units if batch_size is None else batch_size, 1)
    loss = per_token.masked_fill(~token_mask, 0.0)
    if aggregation == "constant":
        return loss.sum() / (size * (constant or 1.0))
    if aggregation == "sequence_mean":
        return (loss.sum(1) / token_mask.sum(1).clamp(min=1)).sum() / size
    if aggregation == "turn_mean":
        tokens, turn = tokens_per_turn(token_mask, turn_index)
        sums = torch.zeros_like(tokens, dtype=loss.dtype).scatter_add(1, turn, loss)
        return (sums / tokens.clamp(min=1)).sum() / size
    return loss.sum() / size


def batch_units(token_mask: Tensor, turn_index: Tensor, aggregation: Aggregation) -> int:
    """Count what an aggregation divides by, for ``batch_size``.

    Args:
        token_mask: [B, L] bool.
        turn_index: [B, L] integer, each token's turn, from 0.
        aggregation: Row of the table of ``aggregate``.

    Returns:
        Conversations B (``sum``, ``constant``), conversations with a token in the mask (``sequence_mean``),
        turns with a token in the mask (``turn_mean``), or tokens in the mask (``token_mean``). The micro-batches'
        counts add up to the batch's.

    Raises:
        ValueError: Shapes or dtypes that do not fit, or an unknown aggregation.
    """
    _check("turn_index", turn_index, token_mask, floating=False)
    if aggregation in ("sum", "constant"):
        return token_mask.shape[0]
    if aggregation == "token_mean":
        return int(token_mask.sum())
    if aggregation == "sequence_mean":
        return int(token_mask.any(1).sum())
    if aggregation == "turn_mean":
        return int((tokens_per_turn(token_mask, turn_index)[0] > 0).sum())
    raise ValueError(not_one_of("the aggregation", aggregation, get_args(Aggregation)))


def broadcast_credit(credit: Tensor, token_mask: Tensor, turn_index: Tensor) -> Tensor:
    """Give every token the credit of its turn (own): A_i = A_{b,turn(i)}, detached, 0 outside the mask.

    Args:
        credit: A [B, n], floating.
        token_mask: [B, L] bool.
        turn_index: [B, L] integer, read only where ``token_mask`` is true.

    Returns:
        [B, L], in the dtype of ``credit``.

    Raises:
        ValueError: Shapes or dtypes that do not fit, a turn index outside [0, n), or a credit that is not
            finite at a token in the mask.
    """
    if not credit.is_floating_point():
        raise ValueError(f"expected a floating credit, got {credit.dtype}")
    turn = _turn(token_mask, turn_index, credit, "credit")
    per_token = credit.detach().to(token_mask.device).gather(1, turn).masked_fill(~token_mask, 0.0)
    broken = (~torch.isfinite(per_token)).nonzero()
    if len(broken):
        b, i = broken[0].tolist()
        raise ValueError(f"expected finite credit, got {per_token[b, i]} at [{b}, {int(turn[b, i])}]")
    return per_token


def turn_token_mask(token_mask: Tensor, turn_index: Tensor, valid: Tensor) -> Tensor:
    """Take the tokens of invalid turns out of the mask (own), so they enter no mean and no count.

    Args:
        token_mask: [B, L] bool.
        turn_index: [B, L] integer, read only where ``token_mask`` is true.
        valid: [B, n] bool, true where the turn was played and judged.

    Returns:
        [B, L] bool.

    Raises:
        ValueError: Shapes or dtypes that do not fit, or a turn index outside [0, n).
    """
    if valid.dtype != torch.bool:
        raise ValueError(f"expected boolean valid, got {valid.dtype}")
    turn = _turn(token_mask, turn_index, valid, "valid")
    return token_mask & valid.to(token_mask.device).gather(1, turn)


def _check(name: str, tensor: Tensor, token_mask: Tensor, *, floating: bool) -> None:
    if token_mask.ndim != 2 or token_mask.dtype != torch.bool:
        raise ValueError(f"expected boolean token_mask [B, L], got {token_mask.dtype} {list(token_mask.shape)}")
    kind = tensor.is_floating_point() if floating else not tensor.is_floating_point()
    if tensor.shape != token_mask.shape or not kind:
        raise ValueError(
            f"expected {'floating' if floating else 'integer'} {name} of token_mask's shape "
            f"{list(token_mask.shape)}, got {tensor.dtype} {list(tensor.shape)}"
        )


def constant_per_token(name: str, tensor: Tensor, token_mask: Tensor) -> Tensor:
    """Return the tensor [B, L] without gradient and 0 outside the mask, after checking it for NaN inside.

    Raises:
        ValueError: Shapes or dtypes that do not fit, or NaN in the mask.
    """
    _check(name, tensor, token_mask, floating=True)
    constant = tensor.detach().masked_fill(~token_mask, 0.0)
    if bool(constant.isnan().any()):
        b, i = constant.isnan().nonzero()[0].tolist()
        raise ValueError(f"expected a number for {name} at every sampled token, got {math.nan} at [{b}, {i}]")
    return constant


def _turn(token_mask: Tensor, turn_index: Tensor, per_turn: Tensor, name: str) -> Tensor:
    """Return every token's turn, checked against ``per_turn`` [B, n]; 0 outside the mask."""
    _check("turn_index", turn_index, token_mask, floating=False)
    if per_turn.ndim != 2 or per_turn.shape[0] != token_mask.shape[0] or per_turn.shape[1] == 0:
        raise ValueError(f"expected {name} of shape [{token_mask.shape[0]}, n], got {list(per_turn.shape)}")
    turn = turn_index.long().masked_fill(~token_mask, 0)
    broken = ((turn < 0) | (turn >= per_turn.shape[1])).nonzero()
    if len(broken):
        b, i = broken[0].tolist()
        raise ValueError(
            f"expected turn indices in [0, {per_turn.shape[1]}), the turns of {name}, got "
            f"{int(turn[b, i])} at [{b}, {i}] (conversation, token)"
        )
    return turn


def tokens_per_turn(token_mask: Tensor, turn_index: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of tokens in the mask per turn [B, n], and every token's turn [B, L]."""
    turn = turn_index.long().masked_fill(~token_mask, 0)
    turns = int(turn.max()) + 1 if turn.numel() else 1
    zeros = torch.zeros(token_mask.shape[0], turns, dtype=torch.long, device=token_mask.device)
    return zeros.scatter_add(1, turn, token_mask.long()), turn
