"""What is measured of a batch before its first optimiser step, without gradients: by the policy that sampled it.

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
"""Tokens, real ones, selected ones [R, L] in; a value, or a vector, for each selected one out: [N] or [N, …]."""


@torch.no_grad()
def measure(data: Batch, mask: Tensor, of: Measurement, *, budget: int, workers: Workers) -> Tensor:
    """Measure something of every token in a mask, one micro-batch at a time.

    Args:
        data: B conversations.
        mask: [B, L] bool, N tokens.
        of: What is measured. Where weights are split over processes, all of them measure equally often.
        budget: Tokens per micro-batch.
        workers: The processes that learn together.

    Returns:
        [N] or [N, …], row by row.
    """
    place = torch.zeros(mask.shape, dtype=torch.long)
    place[mask] = torch.arange(int(mask.sum()))
    found: Tensor | None = None
    own = packs(mask, budget)
    for rows, length in own:
        part = mask[rows, :length]
        values = of(data.ids[rows, :length], data.attention[rows, :length], part)
        found = values.new_zeros(int(mask.sum()), *values.shape[1:]) if found is None else found
        found[place[rows, :length][part].to(found.device)] = values
    for _ in range(max(passes(workers, len(own)), 1) - len(own)):
        every = torch.ones((1, 2), dtype=torch.bool)
        nothing = of(every.long(), every, torch.tensor([[False, True]]))
        found = nothing[:0] if found is None else found
    assert found is not None  # there was a pass
    return found


def entropies(policy: Policy, temperature: float) -> Measurement:
    """Return the entropy, in nats, of the distribution that each selected token was drawn from."""

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
    """Return the log-prob of each selected token under the reference model, the policy without its adapter."""

    def of(ids: Tensor, attention: Tensor, mask: Tensor) -> Tensor:
        log_probs = policy.reference_log_probs(ids, attention, mask, temperature=temperature)
        return log_probs[mask.to(log_probs.device)]

    return of


def states(policy: Policy) -> Measurement:
    """Return the hidden state that each selected token is predicted from, in float32."""
    return lambda ids, attention, mask: policy.states(ids, attention, mask).float()
