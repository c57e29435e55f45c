"""Shared by the losses of this package: ratios, sums over a turn, where turns end. Tensors in, tensors out.

Shapes as in ``ppg_agents.losses``: B conversations, L tokens, n turns. Nothing here may read a config, log, or keep
state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ppg_agents.losses import broadcast_credit, constant_per_token, tokens_per_turn

LOG_RATIO_LIMIT = 20.0


def checked(log_probs: Tensor, token_mask: Tensor) -> Tensor:
    """Return log-probs with their gradient, 0 outside the mask.

    Args:
        log_probs: [B, L], floating.
        token_mask: [B, L] bool.

    Raises:
        ValueError: Shapes or dtypes that do not fit, or NaN in the mask.
    """
    constant_per_token("log_probs", log_probs, token_mask)
    return log_probs.masked_fill(~token_mask, 0.0)


def token_advantage(advantage: Tensor, log_probs: Tensor, token_mask: Tensor) -> Tensor:
    """Return the advantage per token without gradient, in the dtype of ``log_probs``, 0 outside the mask.

    Args:
        advantage: A [B, L]; ``losses.broadcast_credit`` spreads a credit per turn over its tokens.
        log_probs: [B, L].
        token_mask: [B, L] bool.

    Raises:
        ValueError: Shapes or dtypes that do not fit, or NaN in the mask.
    """
    if advantage.shape != token_mask.shape:
        raise ValueError(
            f"expected an advantage per token {list(token_mask.shape)}, got {list(advantage.shape)}; spread one per "
            "turn over its tokens with ppg_agents.losses.broadcast_credit"
        )
    return constant_per_token("advantage", advantage, token_mask).to(log_probs)


def log_ratio(log_probs: Tensor, other_log_probs: Tensor, token_mask: Tensor) -> Tensor:
    """Return lp − lp° per token [B, L], with the gradient of lp only; 0 outside the mask.

    Args:
        log_probs: lp [B, L], floating, carries the gradient.
        other_log_probs: lp° [B, L], of the sampling or of the reference policy.
        token_mask: [B, L] bool.

    Raises:
        ValueError: Shapes or dtypes that do not fit, or NaN in the mask.
    """
    return checked(log_probs, token_mask) - constant_per_token("other_log_probs", other_log_probs, token_mask).to(
        log_probs
    )


def ratio(log_ratios: Tensor) -> Tensor:
    """Return w = exp(log-ratio), with the log-ratio clamped to ±20 (own): beyond that w is constant, without gradient.

    The clamp keeps w finite in float32 and bfloat16, so no gradient is 0 · ∞.

    Args:
        log_ratios: Any shape, per token or summed over a reply.
    """
    return log_ratios.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def turn_sum(per_token: Tensor, token_mask: Tensor, turn_index: Tensor, turns: int) -> Tensor:
    """Sum a value per token over each turn, gradient included.

    Args:
        per_token: [B, L], floating; ignored outside the mask.
        token_mask: [B, L] bool.
        turn_index: [B, L] integer, from 0.
        turns: n.

    Returns:
        [B, n], 0 where a turn has no token in the mask.

    Raises:
        ValueError: A turn is outside [0, n).
    """
    turn = _turn(token_mask, turn_index, turns)
    zeros = per_token.new_zeros(token_mask.shape[0], turns)
    return zeros.scatter_add(1, turn, per_token.masked_fill(~token_mask, 0.0))


def turn_mean(per_token: Tensor, token_mask: Tensor, turn_index: Tensor, turns: int) -> Tensor:
    """Mean over each turn's tokens, [B, n]; 0 where a turn has none. Arguments and errors as ``turn_sum``."""
    count = turn_sum(torch.ones_like(per_token), token_mask, turn_index, turns)
    return turn_sum(per_token, token_mask, turn_index, turns) / count.clamp(min=1.0)


def turn_share(token_mask: Tensor, turn_index: Tensor) -> Tensor:
    """Return 1/m_t at every token of a turn of m_t tokens in the mask, [B, L] float64, 0 outside the mask.

    Splitting a reply's loss over its tokens in these shares keeps its sum.

    Args:
        token_mask: [B, L] bool.
        turn_index: [B, L] integer, from 0.
    """
    tokens, turn = tokens_per_turn(token_mask, turn_index)
    return tokens.double().clamp(min=1.0).reciprocal().gather(1, turn).masked_fill(~token_mask, 0.0)


def to_go(per_token: Tensor, token_mask: Tensor, turn_index: Tensor) -> Tensor:
    """Sum from every token to the end of its turn, the token itself included.

    Args:
        per_token: [B, L], floating.
        token_mask: [B, L] bool; the tokens of a turn follow those of the turn before.
        turn_index: [B, L] integer, from 0.

    Returns:
        [B, L], 0 outside the mask.
    """
    tokens, turn = tokens_per_turn(token_mask, turn_index)
    values = per_token.masked_fill(~token_mask, 0.0)
    per_turn = values.new_zeros(tokens.shape).scatter_add(1, turn, values)
    later_turns = per_turn.flip(1).cumsum(1).flip(1) - per_turn
    return (values.flip(1).cumsum(1).flip(1) - later_turns.gather(1, turn)).masked_fill(~token_mask, 0.0)


def turn_bounds(token_mask: Tensor, turn_index: Tensor, turns: int) -> tuple[Tensor, Tensor]:
    """Return the positions of every turn's first and last token, each [B, n] integer, −1 where it has none.

    Args:
        token_mask: [B, L] bool.
        turn_index: [B, L] integer, from 0.
        turns: n.

    Raises:
        ValueError: A turn is outside [0, n).
    """
    turn = _turn(token_mask, turn_index, turns)
    size, length = token_mask.shape
    position = torch.arange(length, device=token_mask.device).expand(size, length)
    empty = torch.full((size, turns), -1, device=token_mask.device)
    last = empty.scatter_reduce(1, turn, position.masked_fill(~token_mask, -1), "amax")
    beyond = torch.full_like(empty, length)
    first = beyond.scatter_reduce(1, turn, position.masked_fill(~token_mask, length), "amin")
    return first.masked_fill(first == length, -1), last


def turn_ends(token_mask: Tensor, turn_index: Tensor, turns: int) -> Tensor:
    """Return a mask [B, L] of the last token of every turn. Arguments and errors as ``turn_bounds``."""
    last = turn_bounds(token_mask, turn_index, turns)[1]
    ends = torch.zeros(token_mask.shape[0], token_mask.shape[1] + 1, dtype=torch.bool, device=token_mask.device)
    return ends.scatter(1, last + 1, True)[:, 1:] & token_mask


def at_turn_ends(rewards: Tensor, token_mask: Tensor, turn_index: Tensor) -> Tensor:
    """Put every turn's reward on its last token: rewards per token for ``gae``.

    Args:
        rewards: r [B, n], floating; not read where a turn has no token in the mask.
        token_mask: [B, L] bool.
        turn_index: [B, L] integer, from 0.

    Returns:
        [B, L], 0 elsewhere.

    Raises:
        ValueError: As ``losses.broadcast_credit``.
    """
    per_token = broadcast_credit(rewards, token_mask, turn_index)
    return per_token.masked_fill(~turn_ends(token_mask, turn_index, rewards.shape[1]), 0.0)


def _turn(token_mask: Tensor, turn_index: Tensor, turns: int) -> Tensor:
    """Return the turn of every token in the mask, checked, and 0 elsewhere."""
    turn = turn_index.long().masked_fill(~token_mask, 0)
    if turn.numel() and not 0 <= int(turn.min()) <= int(turn.max()) < turns:
        raise ValueError(f"expected turn indices in [0, {turns}), got {int(turn.min())} to {int(turn.max())}")
    return turn
