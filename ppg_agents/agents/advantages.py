"""The advantages per turn and the choice of conversations that rows of `methods` name.

The formulas are in `ppg_agents.alternatives`. Arrays cover the whole batch of all processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppg_agents import alternatives as alt
from ppg_agents import baselines
from ppg_agents.agents.gradient import Array, Whole, trained_tokens
from ppg_agents.agents.methods import Options
from ppg_agents.batch import Batch
from ppg_agents.distributed import Workers
from ppg_agents.missing import Credits


@dataclass(frozen=True)
class Turns:
    """The whole batch per turn, [B, n]; values at invalid turns are ignored.

    Attributes:
        credits: The policy class's credit, for any baseline.
        credit: It without a baseline.
        baselined: The credit less the run's baseline.
        valid: Played and judged.
        groups: B labels, equal for conversations that share a persona.
        lengths: Tokens of each reply.
        entropy: Mean token entropy of each reply when it was sampled, nats; 0 unless the method asks for it.
    """

    credits: Credits
    credit: Tensor
    baselined: Tensor
    valid: Tensor
    groups: list[Any]
    lengths: Tensor
    entropy: Tensor


def turns_of(data: Batch, whole: Whole, baselined: Array, entropy: Tensor | None, workers: Workers) -> Turns:
    """Return what an advantage function reads.

    Args:
        data: This process's conversations.
        whole: The batch of all processes.
        baselined: [B, n], the credit less the run's baseline.
        entropy: [N], of this process's trained tokens, row by row; None if the method does not use it.
        workers: The processes that learn together.
    """
    mask, valid = trained_tokens(data), torch.from_numpy(whole.valid)
    lengths = alt.turn_sum(mask.double(), mask, data.turn_index, valid.shape[1])
    of_turns = torch.zeros_like(lengths)
    if entropy is not None:
        per_token = torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, entropy.cpu().double())
        of_turns = alt.turn_mean(per_token, mask, data.turn_index, valid.shape[1])
    parts = workers.gather([(lengths.numpy(), of_turns.numpy())])
    everywhere = [torch.from_numpy(np.concatenate(part)) for part in zip(*parts, strict=True)]
    credit = torch.from_numpy(whole.credit)
    return Turns(whole.credits, credit, torch.from_numpy(baselined), valid, whole.groups, *everywhere)


def rloo(turns: Turns, options: Options) -> Tensor:
    """Return the credit less the mean of the group's others."""
    return torch.from_numpy(turns.credits.against(partial(baselines.leave_one_out, groups=turns.groups)))


def grpo(turns: Turns, options: Options) -> Tensor:
    """Return the credit less the group's mean, over the group's standard deviation."""
    std = alt.group_std(turns.credit, turns.valid, turns.groups)
    scaled: Tensor = dr_grpo(turns, options) / (std + options["epsilon"])
    return scaled


def dr_grpo(turns: Turns, options: Options) -> Tensor:
    """Return the credit less the group's mean."""
    return torch.from_numpy(turns.credits.against(partial(baselines.group_mean, groups=turns.groups)))


def whitened(turns: Turns, options: Options) -> Tensor:
    """Return REINFORCE++'s advantage: whitened over turns or, as in its source, over tokens (weighted by length)."""
    credit = dr_grpo(turns, options) if options["group_mean"] else turns.credit
    if options["whiten"] == "turns":
        return alt.whiten(credit, turns.valid)
    lengths = (turns.lengths * turns.valid)[..., None]
    tokens = torch.arange(max(1, int(lengths.max())), device=lengths.device) < lengths
    return alt.whiten(credit[..., None].expand(tokens.shape).flatten(1), tokens.flatten(1)).view(tokens.shape)[..., 0]


def rebn(turns: Turns, options: Options) -> Tensor:
    """Return the credit, normalised over the batch."""
    return alt.rebn(turns.credit, turns.valid, epsilon=options["epsilon"])


def empg(turns: Turns, options: Options) -> Tensor:
    """Return the baselined credit, changed by the reply's entropy."""
    given = {key: options[key] for key in ("scale", "future_scale", "zeta")}
    return alt.empg(turns.baselined, turns.entropy, turns.valid, **given)


def imitated(turns: Turns, options: Options) -> Tensor:
    """Return 1 everywhere: kept conversations are imitated."""
    return torch.ones_like(turns.credit)


def with_spread(whole: Whole, options: Options) -> NDArray[np.bool_]:
    """Return the conversations of groups whose returns differ; all of them without dynamic sampling."""
    if not options["dynamic_sampling"]:
        return np.ones(len(whole.groups), dtype=np.bool_)
    returns = torch.from_numpy(whole.credits.filled_rewards().sum(1))
    kept: NDArray[np.bool_] = alt.groups_with_spread(returns, whole.groups).numpy()
    return kept


def best_share(whole: Whole, options: Options) -> NDArray[np.bool_]:
    """Return the best conversations by mean score, missing ones filled in; ties go to the earlier."""
    counts, judged = (whole.valid | whole.credits.missing).sum(1), whole.valid.any(1)
    mean = whole.credits.filled_rewards().sum(1) / np.maximum(counts, 1)
    order = np.argsort(np.where(judged, -mean, np.inf), kind="stable")
    kept = np.zeros(len(mean), dtype=np.bool_)
    kept[order[: int(np.ceil(options["keep"] * int(judged.sum())))]] = True
    return kept
