"""How many turns a conversation of a comparison has: asked of the environment, through Gymnasium's API alone."""

from __future__ import annotations

from ppg_agents.compare.plan import Plan, worlds
from ppg_agents.config.settings import ConfigError
from ppg_agents.rollout.environment import make_envs, planned_turns


def turns_of(plan: Plan) -> dict[str, int]:
    """Return the turns of a conversation, by domain, or by the id of the plan's own environment.

    Raises:
        ConfigError: A wrong setting, or an environment whose conversations have no planned end.
    """
    turns_by_world: dict[str, int] = {}
    for world, config in worlds(plan).items():
        envs = make_envs(config, 1, config.personas)
        try:
            turns = planned_turns(envs, config)
        finally:
            envs.close()
        if turns is None:
            raise ConfigError(f"{world}: expected a planned number of turns, got none; set settings.env.max_turns")
        turns_by_world[world] = turns
    return turns_by_world
