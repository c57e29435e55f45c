"""Losses that compare two conversations at a time: P3O, CoPG and REFUEL.

P3O takes any two with one persona, at every turn that is judged in both; CoPG and REFUEL take two that share a history
(see `ppg_agents.rollout.pairs`), at the turn where they part. Rows 2p and 2p + 1 of a process are a pair; the loss is
the mean over pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppg_agents import alternatives as alt
from ppg_agents.agents.gradient import Array, Loss, Reduction, Scored
from ppg_agents.agents.methods import Method, Options, resolve
from ppg_agents.agents.sums import Ratios
from ppg_agents.agents.surrogates import count_ratios
from ppg_agents.rollout.pairs import branch_point
from ppg_agents.trajectory import Trajectory


def p3o(one: Tensor, other: Tensor, credit: Tensor, other_credit: Tensor, valid: Tensor, options: Options) -> Tensor:
    """Return P3O's loss; 0 switches the clip off."""
    return alt.p3o(one, other, credit, other_credit, valid, clip=options["clip"] or None)


def copg(one: Tensor, other: Tensor, credit: Tensor, other_credit: Tensor, valid: Tensor, options: Options) -> Tensor:
    """Return CoPG's loss."""
    return alt.copg(one, other, credit, other_credit, valid, beta=options["beta"])


def refuel(one: Tensor, other: Tensor, credit: Tensor, other_credit: Tensor, valid: Tensor, options: Options) -> Tensor:
    """Return REFUEL's loss."""
    return alt.refuel(one, other, credit, other_credit, valid, eta=options["eta"])


def compared_turns(
    name: str, trajectories: Sequence[Trajectory], valid: NDArray[np.bool_], *, branch: bool
) -> NDArray[np.bool_]:
    """Return the turns [B, n] that both conversations of a pair learn from.

    Args:
        name: The method's, for messages.
        trajectories: This process's conversations, pair by pair.
        valid: [B, n], played and judged.
        branch: Whether only the turn at which a pair parts counts.

    Raises:
        ValueError: The conversations are not pairs with one persona.
    """
    pairs = list(zip(trajectories[::2], trajectories[1::2], strict=False))
    if len(trajectories) % 2 or any(one.instruction != other.instruction for one, other in pairs):
        raise ValueError(
            f"{name!r}: expected pairs of conversations with one persona, one after the other, got others; "
            "set --set group=2, and a batch that is a multiple of 2 × processes"
        )
    both: NDArray[np.bool_] = valid[::2] & valid[1::2]
    if branch:
        points = [branch_point(one, other) for one, other in pairs]
        parting = np.array([-1 if point is None else point for point in points])
        both &= np.arange(both.shape[1]) == parting[:, None]
    return both.repeat(2, axis=0)


def pair_loss(method: Method, options: Options, credit: Array, valid: NDArray[np.bool_]) -> Loss:
    """Return the loss of a micro-batch of whole pairs.

    Args:
        method: The method.
        options: Its options.
        credit: [B, n] of this process.
        valid: [B, n], the turns that are compared.
    """
    compare = resolve(method.pair_loss or "")
    credits, compared = torch.from_numpy(credit), torch.from_numpy(valid)

    def loss(part: Scored, reduction: Reduction) -> tuple[Tensor, Ratios]:
        mask, turn_index = part.token_mask, part.turn_index
        other = part.reference if part.reference is not None else part.sampling
        per_token = alt.log_ratio(part.log_probs, other, mask)
        log_ratios = alt.turn_sum(per_token, mask, turn_index, compared.shape[1])
        scores = credits[part.rows].to(log_ratios)
        both = compared[part.rows][::2].to(log_ratios.device)
        arrays = (log_ratios[::2], log_ratios[1::2], scores[::2], scores[1::2], both)
        total = compare(*arrays, options).sum()
        return total / (reduction["batch_size"] / 2), count_ratios(method, options, part, scores)

    return loss
