"""Measurements on a batch before its first optimiser step, without gradients, by the policy that sampled it.

A measurement is a function of a micro-batch; nothing here knows what it is for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ppg_agents.agents.gradient import Whole, packs, trained_tokens
from ppg_agents.alternatives.tokens import turn_mean
from ppg_agents.batch import Batch
from ppg_agents.distributed import Workers, passes
from ppg_agents.policy.policy import Policy

Measurement = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Takes tokens, attention and mask [R, L]; returns a value or vector for each of the mask's N tokens."""


@torch.no_grad()
def measure(data: Batch, mask: Tensor, of: Measurement, *, budget: int, workers: Workers) -> Tensor:
    """Measure every token in a mask, one micro-batch at a time.

    Args:
        data: B conversations.
        mask: [B, L] bool, N tokens.
        of: The measurement. If weights are split over processes, all run it equally often.
        budget: Tokens per micro-batch.
        workers: The processes that learn together.

    Returns:
        [N] or [N, …], row by row.
    """
    place = torch.zeros(mask.shape, dtype=torch.long)
    place[mask] = torch.arange(int(mask.sum()))
    result: Tensor | None = None
    micro_batches = packs(mask, budget)
    for rows, length in micro_batches:
        part = mask[rows, :length]
        values = of(data.ids[rows, :length], data.attention[rows, :length], part)
        result = values.new_zeros(int(mask.sum()), *values.shape[1:]) if result is None else result
        result[place[rows, :length][part].to(result.device)] = values
    # Idle passes for split weights (see `gradient.accumulate`); with an empty mask one tells the result's shape.
    for _ in range(max(passes(workers, len(micro_batches)), 1) - len(micro_batches)):
        attention = torch.ones((1, 2), dtype=torch.bool)
        idle = of(attention.long(), attention, torch.tensor([[False, True]]))
        result = idle[:0] if result is None else result
    assert result is not None  # there was at least one pass
    return result


def entropies(policy: Policy, temperature: float) -> Measurement:
    """Measure the entropy, in nats, of the distribution each token was drawn from."""

    def of(ids: Tensor, attention: Tensor, mask: Tensor) -> Tensor:
        entropy = policy.log_probs_and_entropies(ids, attention, mask, temperature=temperature)[1]
        return entropy[mask.to(entropy.device)]

    return of


def references(policy: Policy, temperature: float) -> Measurement:
    """Measure each token's log-prob under the reference model, the policy without its adapter."""

    def of(ids: Tensor, attention: Tensor, mask: Tensor) -> Tensor:
        log_probs = policy.reference_log_probs(ids, attention, mask, temperature=temperature)
        return log_probs[mask.to(log_probs.device)]

    return of


def states(policy: Policy) -> Measurement:
    """Measure the hidden state that predicts each token, in float32."""
    return lambda ids, attention, mask: policy.states(ids, attention, mask).float()


def advantage_spread(
    advantage: Tensor, data: Batch, whole: Whole, workers: Workers, *, per_token: bool, pairs: bool
) -> dict[str, float]:
    """Return ``advantage_std``: the standard deviation of the turns' advantages over the batch of all processes.

    Args:
        advantage: [B, n] per turn, or [B, L] per token: then a turn's is the mean over its tokens.
        data: This process's conversations.
        whole: The batch of all processes.
        workers: The processes that learn together.
        per_token: Whether the advantage is per token.
        pairs: Whether the loss compares conversations two by two: then it is the spread of their credits' difference.
    """
    valid = torch.from_numpy(data.valid)
    if pairs:
        credit = torch.from_numpy(whole.credit[whole.own])
        advantage, valid = credit[::2] - credit[1::2], valid[::2] & valid[1::2]
    elif per_token:
        advantage = turn_mean(advantage, trained_tokens(data), data.turn_index, valid.shape[1])
    turns = torch.cat(workers.gather([advantage[valid].double()]))
    return {"advantage_std": float(turns.std(correction=0)) if len(turns) else 0.0}
