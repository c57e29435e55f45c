"""The methods' losses per token, as `methods` names them: micro-batch, advantage, options in, [R, L'] out.

The formulas are in `ppg_agents.alternatives`; here they get their inputs. `token_loss` turns one into the loss of a
batch. Nothing here knows a model.
"""

from __future__ import annotations

import logging
from typing import Literal

import torch
from torch import Tensor

from ppg_agents import alternatives as alt
from ppg_agents.agents.gradient import Loss, Reduction, Scored
from ppg_agents.agents.methods import Method, Options, resolve
from ppg_agents.agents.sums import Ratios
from ppg_agents.alternatives.tokens import turn_share
from ppg_agents.losses import aggregate, token_policy_gradient, tokens_per_turn

log = logging.getLogger(__name__)

BoundPair = tuple[Tensor | float, Tensor | float]
EVERYTHING: BoundPair = (0.0, float("inf"))


def token_loss(method: Method, options: Options, advantage: Tensor, beta: float) -> Loss:
    """Return a batch's loss: the method's per token, its KL term, and their reduction to one number.

    Args:
        method: The method.
        options: Its options.
        advantage: [B, L], at every token.
        beta: Weight of the KL term, for methods that add one per token.
    """
    surrogate = resolve(method.loss)

    def loss(part: Scored, reduction: Reduction) -> tuple[Tensor, Ratios]:
        of_part = advantage[part.rows, : part.token_mask.shape[1]].to(part.log_probs)
        per_token = surrogate(part, of_part, options)
        if part.reference is not None and method.kl == "token":
            weighted = options["kl_weighted"]
            sampling = part.sampling if weighted else None
            arrays = (part.log_probs, part.reference, part.token_mask)
            per_token = per_token + beta * alt.kl_term(*arrays, sampling_log_probs=sampling, kl_weighted=weighted)
        reduced = aggregate(per_token, part.token_mask, part.turn_index, **reduction)
        return reduced, count_ratios(method, options, part, of_part)

    return loss


@torch.no_grad()
def count_ratios(method: Method, options: Options, part: Scored, advantage: Tensor) -> Ratios:
    """Return the statistics of w = π / π°, per reply where the loss uses the reply's ratio."""
    mask = part.token_mask
    if not method.ratio or not bool(mask.any()):
        return Ratios()
    log_ratios = alt.log_ratio(part.log_probs, part.sampling, mask)
    if method.pair_loss or options.get("ratio") == "reply":
        tokens, turn = tokens_per_turn(mask, part.turn_index)
        log_ratios = alt.turn_sum(log_ratios, mask, part.turn_index, tokens.shape[1]).gather(1, turn)
    w = log_ratios.exp()
    count, outside, bounded = int(mask.sum()), 0, 0
    if method.bounds:
        low, high = resolve(method.bounds)(advantage, options)
        outside, bounded = int((((w < low) | (w > high)) & mask).sum()), count
    return Ratios(float(w[mask].max()), count, bounded, outside)


def policy_gradient(part: Scored, advantage: Tensor, options: Options) -> Tensor:
    """Return −w·A·lp: the partial policy gradient before its sum over tokens; w are the run's importance weights."""
    return token_policy_gradient(part.log_probs, advantage, part.token_mask, part.weights)


def ppo_clip(part: Scored, advantage: Tensor, options: Options) -> Tensor:
    """Return PPO's clipped surrogate, with the ratio of the token or, with ``ratio = "reply"``, of the reply."""
    bounds = {name: options[name] for name in ("clip_low", "clip_high", "dual_clip", "ratio_cap") if name in options}
    mask, turn_index = part.token_mask, part.turn_index
    if options.get("ratio") != "reply":
        return alt.ppo_clip(part.log_probs, part.sampling, advantage, mask, **bounds)
    tokens, turn = tokens_per_turn(mask, turn_index)
    log_ratios = alt.turn_sum(alt.log_ratio(part.log_probs, part.sampling, mask), mask, turn_index, tokens.shape[1])
    of_turn = alt.turn_mean(advantage, mask, turn_index, tokens.shape[1])
    per_turn = alt.ppo_clip_turns(log_ratios, of_turn, tokens > 0, **bounds)
    # Spread a reply's loss over its tokens, so that the sum over tokens equals the sum over replies.
    return per_turn.gather(1, turn) * turn_share(mask, turn_index).to(per_turn)


def clip_bounds(advantage: Tensor, options: Options) -> BoundPair:
    """Return 1 − ε_lo and 1 + ε_hi."""
    return 1 - options["clip_low"], 1 + options["clip_high"]


def reply_bounds(advantage: Tensor, options: Options) -> BoundPair:
    """Return 1 ∓ ε of P3O; an ε of 0 is no bound."""
    return (1 - options["clip"], 1 + options["clip"]) if options["clip"] else EVERYTHING


def cispo(part: Scored, advantage: Tensor, options: Options) -> Tensor:
    """Return CISPO's loss."""
    return alt.cispo(part.log_probs, part.sampling, advantage, part.token_mask, max_weight=options["max_weight"])


def cispo_bounds(advantage: Tensor, options: Options) -> BoundPair:
    """Return 0 and the largest weight."""
    return 0.0, options["max_weight"]


def sapo(part: Scored, advantage: Tensor, options: Options) -> Tensor:
    """Return SAPO's loss."""
    return alt.sapo(part.log_probs, part.sampling, advantage, part.token_mask, **options)


def dispo(part: Scored, advantage: Tensor, options: Options) -> Tensor:
    """Return DISPO's loss."""
    return alt.dispo(part.log_probs, part.sampling, advantage, part.token_mask, **options)


def dispo_bounds(advantage: Tensor, options: Options) -> BoundPair:
    """Return DISPO's bounds, which differ between good and bad advantages."""
    good = advantage > 0
    low = torch.where(good, 1 - options["positive_low"], 1 - options["negative_low"])
    return low, torch.where(good, 1 + options["positive_high"], 1 + options["negative_high"])


def check_dispo(options: Options, settings: Options) -> None:
    """Warn when the bounds for negative advantages can never apply."""
    if settings["baseline"] == "none":
        log.warning("dispo: without a baseline no advantage is negative, so the bounds for negative ones never apply")


def rpg(part: Scored, advantage: Tensor, options: Options) -> Tensor:
    """Return RPG's loss in either form."""
    names = ("divergence", "beta", "clip", "clip_low", "clip_high", "dual_clip", "kl_to_go")
    given = {key: options[key] for key in names}
    form = alt.rpg_reinforce if options["form"] == "reinforce" else alt.rpg_differentiable
    level: Literal["token", "turn"] = "turn" if options["ratio"] == "reply" else "token"
    arrays = (part.log_probs, part.sampling, advantage, part.token_mask, part.turn_index)
    return form(*arrays, level=level, **given)


def rpg_bounds(advantage: Tensor, options: Options) -> BoundPair:
    """Return PPO's bounds, or none."""
    return EVERYTHING if options["clip"] == "none" else clip_bounds(advantage, options)


def a_lol(part: Scored, advantage: Tensor, options: Options) -> Tensor:
    """Return A-LoL's loss; without a reference, the policy's log-probs fill the unused argument."""
    reference = part.log_probs.detach() if part.reference is None else part.reference
    given = {key: options[key] for key in ("variant", "clip", "beta")}
    return alt.a_lol(part.log_probs, reference, advantage, part.token_mask, part.turn_index, **given)
