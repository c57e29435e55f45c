"""How many turns a domain's conversations have: asked of the environment, through Gymnasium's API alone."""

from __future__ import annotations

from ppg_agents.compare.plan import Plan
from ppg_agents.config import settings as configs
from ppg_agents.config.settings import ConfigError
from ppg_agents.rollout.environment import make_envs, planned_turns


def turns_of(plan: Plan) -> dict[str, int]:
    """Return the turns of a conversation, by domain.

    Raises:
        ConfigError: A wrong setting, or an environment whose conversations have no planned end.
    """
    found: dict[str, int] = {}
    given = configs.flatten(plan.settings)
    for domain in plan.domains:
        config = configs.load(None, {**given, "domain": domain})
        envs = make_envs(config, 1, config.personas)
        try:
            turns = planned_turns(envs, config)
        finally:
            envs.close()
        if turns is None:
            raise ConfigError(f"domain {domain}: expected a planned number of turns; set settings.env.max_turns")
        found[domain] = turns
    return found
