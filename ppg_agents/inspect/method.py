"""How a run's agent uses the policy class's credit, in words, going by its settings alone."""

from __future__ import annotations

from ppg_agents.agents.methods import METHODS
from ppg_agents.config.settings import TrainConfig
from ppg_agents.group_advantage import PER_TURN


def reads_credit(config: TrainConfig) -> bool:
    """Return whether the run's agent learns from the policy class's credit."""
    method = METHODS.get(config.agent)
    return method is None or (method.learns and method.credit)


def baseline(config: TrainConfig) -> str | None:
    """Return the baseline subtracted from the credit; None if the agent does not use the run's."""
    method = METHODS.get(config.agent)
    if method is None or "baseline" not in method.takes:
        return None
    return "none" if config.offline.files and config.baseline not in PER_TURN else config.baseline


def note(config: TrainConfig) -> str:
    """Return a note on an agent that does more than subtract a baseline from the credit; "" otherwise."""
    name, method = config.agent, METHODS.get(config.agent)
    if method is None:
        return f"The agent {name} forms its own advantage from this credit, or instead of it (docs/agents.md)."
    if not reads_credit(config):
        return f"The agent {name} reads no credit (docs/agents.md): this run did not learn from what is shown."
    if method.full_only(method.fill(name, config.agent_options)):
        return f"The agent {name} forms its own advantage from the rewards, instead of this credit (docs/agents.md)."
    if "baseline" not in method.takes:
        return f"The agent {name} forms its own advantage from this credit (docs/agents.md)."
    if method.advantage:
        return f"The agent {name} forms its own advantage from this credit less the baseline (docs/agents.md)."
    return ""
