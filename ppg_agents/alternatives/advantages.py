"""Advantages per turn without a value network: RLOO, GRPO, Dr. GRPO, REINFORCE++, and DAPO's two extras.

Each takes a credit c [B, n], the policy class's Σ_{ℓ ∈ R_t} r_ℓ (the original methods have one reward per completion;
a credit per turn, and statistics per turn index, are ours). ``losses.broadcast_credit`` spreads the result over tokens.
Invalid turns enter no mean, deviation or count; their entries are never read. Every function needs the whole batch: a
micro-batch has other statistics.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from ppg_agents.alternatives.tokens import turn_sum
from ppg_agents.baselines import group_mean, leave_one_out
from ppg_agents.losses import constant_per_token


def rloo(credit: Tensor, valid: Tensor, groups: Sequence[Hashable]) -> Tensor:
    """RLOO (2402.14740): subtract the mean of the *other* conversations of the group.

        A_{b,t} = c_{b,t} − (1/(K_t − 1)) Σ_{k ≠ b} c_{k,t}  =  K_t/(K_t − 1) · (c_{b,t} − mean_t)

    over the K_t conversations of the group with a valid turn t. Unbiased. If only one conversation reached turn t, its
    baseline is that of ``baselines.leave_one_out``, which this is.

    Args:
        credit: c [B, n].
        valid: [B, n] bool.
        groups: B labels, equal for conversations that share a persona.

    Returns:
        A [B, n], 0 at invalid turns.

    Raises:
        ValueError: Shapes or dtypes that do not fit, or a group of only one conversation.
    """
    alone = [label for label, size in Counter(groups).items() if size == 1]
    if alone:
        raise ValueError(f"expected at least 2 conversations in every group, got 1 of {alone[0]!r}; sample K >= 2")
    credits = constant_per_token("credit", credit, valid).double().cpu().numpy()
    others = leave_one_out(credits, valid.cpu().numpy(), groups)
    return torch.from_numpy(credits - others).to(credit).masked_fill(~valid, 0.0)


def grpo(
    credit: Tensor,
    valid: Tensor,
    groups: Sequence[Hashable],
    *,
    scale_by_std: bool = True,
    epsilon: float = 1e-4,
) -> Tensor:
    """GRPO (2402.03300) and, without dividing by the deviation, Dr. GRPO (2503.20783).

        A_{b,t} = (c_{b,t} − mean_t) / (std_t + δ),   mean and unbiased std over the group's valid turns t

    The mean includes the conversation's own credit: without the deviation, A is (K − 1)/K times RLOO's. Dividing by
    the deviation makes A independent of the credit's scale and gives every group the same weight, which is a bias.
    δ = 1e-4 is TRL's. A turn that only one conversation of the group reached gets 0 (ours; verl keeps the raw score).

    Args:
        credit: c [B, n].
        valid: [B, n] bool.
        groups: B labels, equal for conversations that share a persona.
        scale_by_std: False gives Dr. GRPO.
        epsilon: δ > 0, in the unit of the credit.

    Returns:
        A [B, n], 0 at invalid turns and where the group's credits are equal.

    Raises:
        ValueError: Shapes or dtypes that do not fit, or δ not positive.
    """
    if not epsilon > 0:
        raise ValueError(f"expected epsilon > 0, got {epsilon}")
    credits = constant_per_token("credit", credit, valid).double().cpu().numpy()
    deviation = torch.from_numpy(credits - group_mean(credits, valid.cpu().numpy(), groups)).to(credit)
    deviation = deviation.masked_fill(~valid, 0.0)
    return deviation / (group_std(credit, valid, groups) + epsilon) if scale_by_std else deviation


def group_std(credit: Tensor, valid: Tensor, groups: Sequence[Hashable]) -> Tensor:
    """Return the deviation that ``grpo`` divides by [B, n]: unbiased, over the group's valid turns t, 0 for one alone.

    Raises:
        ValueError: Shapes or dtypes that do not fit.
    """
    credits = constant_per_token("credit", credit, valid)
    index, size = _index(groups, len(credits), credits.device)

    def total(per_turn: Tensor) -> Tensor:
        return credits.new_zeros(size, credits.shape[1]).index_add(0, index, per_turn.to(credits))[index]

    count = total(valid)
    deviation = (credits - total(credits) / count.clamp(min=1.0)).masked_fill(~valid, 0.0)
    return (total(deviation.square()) / (count - 1).clamp(min=1.0)).sqrt()


def groups_with_spread(returns: Tensor, groups: Sequence[Hashable], *, tolerance: float = 1e-9) -> Tensor:
    """DAPO's dynamic sampling (2503.14476): keep the groups whose returns differ.

    They resample until the batch is full; here the caller drops the other groups and reports how many (ours: on the
    conversation's full return, per persona). This changes the distribution of personas trained on.

    Args:
        returns: [B], one score per conversation.
        groups: B labels.
        tolerance: Largest spread, max − min, that counts as none.

    Returns:
        [B] bool, true in the groups to keep.

    Raises:
        ValueError: Not one label per conversation.
    """
    index, size = _index(groups, len(returns), returns.device)
    largest = returns.new_full((size,), -torch.inf).scatter_reduce(0, index, returns, "amax")
    smallest = returns.new_full((size,), torch.inf).scatter_reduce(0, index, returns, "amin")
    return (largest - smallest > tolerance)[index]


def overlong_penalty(lengths: Tensor, *, max_length: int, buffer: int) -> Tensor:
    """DAPO's soft overlong punishment (2503.14476; the form is from memory), added to the reward.

        0 up to max − buffer,   (max − buffer − length)/buffer up to max,   −1 beyond

    Args:
        lengths: Tokens of each reply, any shape.
        max_length: Tokens at which the penalty reaches −1.
        buffer: Tokens over which it grows, in [1, max_length].

    Returns:
        Penalty in [−1, 0], of the shape of ``lengths``, float64.

    Raises:
        ValueError: ``buffer`` is outside [1, max_length].
    """
    if not 1 <= buffer <= max_length:
        raise ValueError(f"expected a buffer in [1, max_length = {max_length}], got {buffer}")
    return ((max_length - buffer - lengths.double()) / buffer).clamp(-1.0, 0.0)


def whiten(advantage: Tensor, mask: Tensor, *, epsilon: float = 1e-8) -> Tensor:
    """Whiten over the batch as in REINFORCE++ (2501.03262): (A − mean) / √(var + ε), unbiased var.

    Theirs is over all tokens of the batch: pass A [B, L] and the token mask. Long turns then weigh more; ours is over
    valid turns: A [B, n] and ``valid``. The "-baseline" form first subtracts the group's mean (``grpo`` without
    scaling). Biased: mean and var include the entry itself and mix turn indices.

    Args:
        advantage: A, [B, L] or [B, n].
        mask: Same shape, bool.
        epsilon: ε > 0, in the unit of A².

    Returns:
        Same shape, 0 outside the mask and when all entries are equal or there is only one.

    Raises:
        ValueError: Shapes or dtypes that do not fit, or NaN in the mask.
    """
    constant = constant_per_token("advantage", advantage, mask)
    count = int(mask.sum())
    if count == 0:
        return constant
    deviation = (constant - constant.sum() / count).masked_fill(~mask, 0.0)
    variance = deviation.square().sum() / max(count - 1, 1)
    return deviation * (variance + epsilon).rsqrt()


def kl_shaped_reward(
    rewards: Tensor,
    sampling_log_probs: Tensor,
    reference_log_probs: Tensor,
    token_mask: Tensor,
    turn_index: Tensor,
    *,
    beta: float,
) -> Tensor:
    """Subtract the reply's log-ratio from the reward, as TRL's RLOO and P3O (2310.00212) do.

        r'_t = r_t − β·Σ_j (lp°_j − lpʳ_j)

    k1 estimates the reply's KL(π ‖ π_ref) given its history. Done before the credit is formed, so later turns'
    penalties enter it as their rewards do (ours).

    Args:
        rewards: r [B, n].
        sampling_log_probs: lp° [B, L].
        reference_log_probs: lpʳ [B, L].
        token_mask: [B, L] bool.
        turn_index: [B, L] integer, from 0.
        beta: β ≥ 0; TRL's default for RLOO is 0.05.

    Returns:
        [B, n], NaN where ``rewards`` is.

    Raises:
        ValueError: Shapes or dtypes that do not fit, or NaN in the mask.
    """
    k1 = _k1(sampling_log_probs, reference_log_probs, token_mask)
    return rewards.detach() - beta * turn_sum(k1, token_mask, turn_index, rewards.shape[1]).to(rewards)


def _index(groups: Sequence[Hashable], size: int, device: torch.device) -> tuple[Tensor, int]:
    if len(groups) != size:
        raise ValueError(f"expected one group label for each of {size} conversations, got {len(groups)}")
    first: dict[Hashable, int] = {}
    index = [first.setdefault(label, len(first)) for label in groups]
    return torch.tensor(index, dtype=torch.long, device=device), len(first)


def _k1(sampling_log_probs: Tensor, reference_log_probs: Tensor, token_mask: Tensor) -> Tensor:
    sampling = constant_per_token("sampling_log_probs", sampling_log_probs, token_mask)
    return sampling - constant_per_token("reference_log_probs", reference_log_probs, token_mask).to(sampling)
