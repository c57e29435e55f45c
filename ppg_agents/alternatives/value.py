"""Value head: generalised advantage estimation over the policy's tokens, and the value loss.

``values[b, i]`` is V of the state *before* token i, so it does not depend on the token it judges.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ppg_agents.losses import constant_per_token


class GAE(NamedTuple):
    """Advantages and the value's targets, both without gradient and 0 outside the mask.

    Attributes:
        advantage: A, not whitened.
        target: G = A + V.
    """

    advantage: Tensor
    target: Tensor


def gae(
    rewards: Tensor,
    values: Tensor,
    token_mask: Tensor,
    *,
    discount: float = 1.0,
    lam: float = 1.0,
    bootstrap: Tensor | None = None,
    ends: Tensor | None = None,
) -> GAE:
    """Generalised advantage estimation (1506.02438).

        δ_k = r_k + γ·V_{k+1} − V_k,   A_k = δ_k + γλ·A_{k+1},   target G_k = A_k + V_k

    k + 1 is the next token *in the mask*: the partner's text is skipped. V after the last is 0, or ``bootstrap`` where
    a conversation was cut off (ours). λ = 1 gives the discounted return − V, λ = 0 gives δ. Whiten A only after the
    target is formed. GAE plans over the whole conversation; for a policy class's credit use ``value_at_turn_start``.

    Args:
        rewards: r [B, L], for instance from ``tokens.at_turn_ends``.
        values: V [B, L], no gradient is taken.
        token_mask: [B, L] bool. Also works per turn: [B, n] and ``valid``.
        discount: γ in [0, 1], per entry.
        lam: λ in [0, 1].
        bootstrap: V after the last entry [B], or None for 0.
        ends: [B, L] bool, entries after which the recursion starts afresh: next value and next advantage are 0.

    Raises:
        ValueError: Shapes or dtypes that do not fit, NaN in the mask, or γ or λ outside [0, 1].
    """
    if not 0 <= discount <= 1 or not 0 <= lam <= 1:
        raise ValueError(f"expected discount and lam in [0, 1], got {discount} and {lam}")
    reward = constant_per_token("rewards", rewards, token_mask)
    value = constant_per_token("values", values, token_mask).to(reward)
    next_value = reward.new_zeros(len(reward)) if bootstrap is None else bootstrap.detach().to(reward)
    next_advantage = reward.new_zeros(len(reward))
    advantages: list[Tensor] = []
    for i in reversed(range(reward.shape[1])):
        if ends is not None:
            next_value = next_value.masked_fill(ends[:, i], 0.0)
            next_advantage = next_advantage.masked_fill(ends[:, i], 0.0)
        here = token_mask[:, i]
        advantage = reward[:, i] + discount * next_value - value[:, i] + discount * lam * next_advantage
        advantages.append(advantage.masked_fill(~here, 0.0))
        next_value = torch.where(here, value[:, i], next_value)
        next_advantage = torch.where(here, advantage, next_advantage)
    result = torch.stack(advantages[::-1], 1) if advantages else torch.zeros_like(reward)
    return GAE(result, result + value)


def value_loss(
    values: Tensor,
    targets: Tensor,
    mask: Tensor,
    *,
    old_values: Tensor | None = None,
    clip: float | None = None,
) -> Tensor:
    """Value loss with PPO's value clip: ½·max((V − G)², (clip(V, V° − ε_v, V° + ε_v) − G)²); without clip ½·(V − G)².

    ε_v = 0.5 in verl. The clip comes from PPO's implementation, not its paper.

    Args:
        values: V, carries the gradient; [B, L], or [B, n] with ``valid``.
        targets: G, same shape.
        mask: Same shape, bool.
        old_values: V° at sampling; only with ``clip``.
        clip: ε_v > 0, or None.

    Returns:
        Same shape, 0 outside the mask.

    Raises:
        ValueError: Shapes or dtypes that do not fit, NaN in the mask, ``clip`` not positive, or one of ``clip`` and
            ``old_values`` without the other.
    """
    if (clip is None) != (old_values is None) or (clip is not None and not clip > 0):
        raise ValueError(f"expected clip > 0 together with old_values, got clip = {clip}")
    constant_per_token("values", values, mask)
    target = constant_per_token("targets", targets, mask).to(values)
    value = values.masked_fill(~mask, 0.0)
    loss = (value - target).square()
    if clip is not None and old_values is not None:
        old = constant_per_token("old_values", old_values, mask).to(values)
        loss = torch.maximum(loss, (value.clamp(old - clip, old + clip) - target).square())
    return loss / 2
