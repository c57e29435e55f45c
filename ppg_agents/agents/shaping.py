"""What some methods subtract from the rewards before credit is formed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ppg_agents import alternatives as alt
from ppg_agents.agents.gradient import trained_tokens
from ppg_agents.batch import Batch
from ppg_agents.distributed import Workers


def less_divergence(
    data: Batch, reference_log_probs: Tensor, beta: float, workers: Workers
) -> tuple[Batch, dict[str, float]]:
    """Subtract β times the log-ratio to the reference model from every turn's reward.

    Args:
        data: This process's conversations.
        reference_log_probs: [N], of the trained tokens, row by row.
        beta: ``kl_coefficient``, above 0.
        workers: The processes that learn together.

    Returns:
        The batch with the new rewards, and ``kl``, nats per judged turn over all processes.
    """
    mask = trained_tokens(data)
    measured = reference_log_probs.cpu().double()
    reference = torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, measured)
    arrays = (torch.from_numpy(data.rewards), data.sampling_log_probs.double(), reference, mask, data.turn_index)
    shaped = alt.kl_shaped_reward(*arrays, beta=beta).numpy()
    divergence = np.where(data.valid, data.rewards - shaped, 0.0).sum() / beta
    total, turns = (workers.sum_number(float(x)) for x in (divergence, data.valid.sum()))
    return replace(data, rewards=shaped), {"kl": total / max(1.0, turns)}


def less_overlong(data: Batch, longest: int, buffer: int) -> Batch:
    """Apply DAPO's soft penalty to replies within ``buffer`` tokens of the longest."""
    lengths = torch.from_numpy((data.spans[..., 2] - data.spans[..., 1]).astype(np.float64))
    penalty = alt.overlong_penalty(lengths, max_length=longest, buffer=buffer)
    return replace(data, rewards=data.rewards + penalty.numpy())
