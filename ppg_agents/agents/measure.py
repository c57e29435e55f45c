"""Measurements on a batch before its first optimiser step, without gradients, by the policy that sampled it.

A measurement is a function of a micro-batch; nothing here knows what it is for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ppg_agents.agents.gradient import packs
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
        states = policy.states(ids, attention, mask)
        size = max(1, 2**23 // policy.config.vocab_size)
        pieces = []
        for i in range(0, len(states), size):
            log_probs = (policy.logits(states[i : i + size]) / temperature).log_softmax(-1)
            pieces.append(-(log_probs.exp() * log_probs).sum(-1))
        return torch.cat(pieces)

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
