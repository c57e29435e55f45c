"""Agents by name: this project's methods, those that other packages install, and your own.

A third party adds an agent through the entry-point group ``ppg_agents.agents``; your own is named
``package.module:Class``. Heavy imports wait until an agent is made.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any

from ppg_agents.agents.methods import METHODS
from ppg_agents.agents.protocol import Agent
from ppg_agents.nearest import did_you_mean

GROUP = "ppg_agents.agents"
LEARNER = "ppg_agents.agents.learner:Learner"
GONE = {"reinforce": "ppg"}
"""Former names of agents -> their names now."""


def agents() -> dict[str, EntryPoint]:
    """Return the agents that are installed, by name.

    Raises:
        ValueError: Another package uses a name that is taken, so a run's settings would be ambiguous.
    """
    known = {name: EntryPoint(name, LEARNER, GROUP) for name in METHODS}
    for point in entry_points(group=GROUP):
        taken = known.get(point.name)
        if taken is not None and taken.value != point.value:
            raise ValueError(
                f"expected one agent named {point.name!r}, got {taken.value} and {point.value}, an entry point of "
                f"{point.dist.name if point.dist else 'another package'}; rename it there"
            )
        known[point.name] = point
    return known


def make_agent(name: str, *args: Any, **settings: Any) -> Agent:
    """Make an agent.

    Args:
        name: A name in `agents`, or ``package.module:Class``.
        *args: Passed on to the agent: the policy and the policy class.
        **settings: Passed on to the agent.

    Raises:
        ValueError: No agent with that name, nothing to import there, or an agent that lacks a method.
    """
    if name in METHODS:
        settings["method"] = name
    agent = load_agent(name)(*args, **settings)
    missing = [part for part in ("needs", "learn", "save", "load") if not hasattr(agent, part)]
    if missing:
        raise ValueError(
            f"expected an agent with learn, save, load and needs, got {type(agent).__name__} without "
            f"{', '.join(missing)}; derive it from ppg_agents.agents.Agent, which asks for nothing"
        )
    made: Agent = agent
    return made


def load_agent(name: str) -> Any:
    """Return the class or function that makes the named agent.

    Raises:
        ValueError: As `make_agent`.
    """
    known = agents()
    if name in known:
        return known[name].load()
    if ":" in name:
        try:
            return EntryPoint(name, name, GROUP).load()
        except (ImportError, AttributeError) as error:
            raise ValueError(f"expected an agent at {name!r}, got {type(error).__name__}: {error}") from error
    hint = f"; it is {GONE[name]!r} now" if name in GONE else did_you_mean(name, known)
    choices = f"{', '.join(sorted(known))}, or your own as 'package.module:Class'"
    raise ValueError(f"expected an agent out of {choices}, got {name!r}{hint}")
