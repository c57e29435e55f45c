"""What a run's agent makes of the policy class's credit, in words, by its settings alone.

``agents.methods.METHODS`` decides; what is said here is a copy of it that needs no torch.
"""

from __future__ import annotations

from ppg_agents.agents import ALTERNATIVES
from ppg_agents.config.settings import TrainConfig

NO_CREDIT = frozenset({"base", "best-of-n", "sft"})
"""Agents that learn nothing, or from no credit."""
PLAIN = frozenset(
    {"ppg", "reinforce", "cispo", "sapo", "dispo", *(name for name in ALTERNATIVES if name.split("-")[0] == "rpg")}
)
"""Agents whose advantage is the credit less the run's baseline."""
BASELINED = PLAIN | {"empg"}
"""Agents that take the run's baseline."""
ESTIMATING = frozenset({"ppo", "bi-level-gae"})
"""Agents with a value head, which with ``credit = "gae"`` read rewards and no credit."""


def reads_credit(config: TrainConfig) -> bool:
    """Return whether the run's own policy class says anything about what it learns from."""
    return config.agent not in NO_CREDIT


def baseline(config: TrainConfig) -> str | None:
    """Return the baseline that is subtracted from the credit; None where the agent does not take the run's."""
    if config.agent not in BASELINED:
        return None
    return "none" if config.offline.files else config.baseline


def note(config: TrainConfig) -> str:
    """Return what is to be said of an agent that does otherwise than to subtract a baseline from the credit."""
    name = config.agent
    if name in PLAIN:
        return ""
    if name in NO_CREDIT:
        return f"The agent {name} reads no credit (docs/agents.md): what is shown is not what this run learned from."
    how = "from this credit, or instead of it"  # somebody else's agent
    if name in ESTIMATING:
        gae = config.agent_options.get("credit", "gae") == "gae"
        how = "from the rewards, instead of this credit" if gae else "from this credit"
    elif name in ALTERNATIVES:
        how = "from this credit less the baseline" if name in BASELINED else "from this credit"
    return f"The agent {name} forms its own advantage {how} (docs/agents.md)."
