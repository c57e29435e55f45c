"""Alternatives to the partial policy gradient: their losses and advantages as pure functions.

Tensors in, tensors out; no config, no logging, no state. ``docs/alternatives.md`` lists names, formulas, sources, and
what is ours. Any advantage [B, n] or [B, L] goes with any loss: ``losses.broadcast_credit`` spreads a policy class's
credit per turn over the tokens, and a loss returns L [B, L] for ``losses.aggregate`` (or per turn [B, n] for
``aggregate_turns``).

- ``clipped``: PPO's clip with the settings of GRPO, DAPO and RLOO, CISPO, the KL term.
- ``advantages``: RLOO, GRPO and Dr. GRPO, REINFORCE++, DAPO's extras.
- ``value``: GAE and the value loss.
- ``regularised``: the eight RPG variants.
- ``others``: SAPO, DISPO, CoPG, P3O, A-LoL, EMPG, the high-entropy mask.
- ``turn_level``: REFUEL, ReBN, bi-level GAE.
- ``tokens``: ratios, sums over a turn, where turns end.
"""

from ppg_agents.alternatives.advantages import (
    group_std,
    groups_with_spread,
    grpo,
    kl_shaped_reward,
    overlong_penalty,
    rloo,
    whiten,
)
from ppg_agents.alternatives.clipped import cispo, kl_term, ppo_clip, ppo_clip_turns
from ppg_agents.alternatives.others import a_lol, copg, dispo, empg, high_entropy_mask, p3o, sapo
from ppg_agents.alternatives.regularised import rpg_differentiable, rpg_reinforce
from ppg_agents.alternatives.tokens import at_turn_ends, log_ratio, turn_mean, turn_sum
from ppg_agents.alternatives.turn_level import bi_level_gae, rebn, refuel
from ppg_agents.alternatives.value import GAE, gae, value_loss

__all__ = [
    "GAE",
    "a_lol",
    "at_turn_ends",
    "bi_level_gae",
    "cispo",
    "copg",
    "dispo",
    "empg",
    "gae",
    "group_std",
    "groups_with_spread",
    "grpo",
    "high_entropy_mask",
    "kl_shaped_reward",
    "kl_term",
    "log_ratio",
    "overlong_penalty",
    "p3o",
    "ppo_clip",
    "ppo_clip_turns",
    "rebn",
    "refuel",
    "rloo",
    "rpg_differentiable",
    "rpg_reinforce",
    "sapo",
    "turn_mean",
    "turn_sum",
    "value_loss",
    "whiten",
]
