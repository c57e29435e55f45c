"""What a learner looks like from outside, and how to get one by name.

A third party adds a learner through the entry-point group ``ppg_agents.agents``; one's own is named
``package.module:Class``. Nothing heavy is imported before an agent is made.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from ppg_agents.trajectory import Trajectory

GROUP = "ppg_agents.agents"

AGENTS = {
    "ppg": "ppg_agents.agents.ppg:PPGAgent",
}
"""The agents with a class of their own."""
ALTERNATIVES = (
    *("base", "best-of-n", "sft", "reinforce", "rloo", "grpo", "dr-grpo", "dapo", "reinforce++", "cispo", "rpg"),
    *("rpg-forward", "rpg-forward-u", "rpg-reverse", "rpg-reverse-u"),
    *("rpg-forward-reinforce", "rpg-forward-u-reinforce", "rpg-reverse-reinforce", "rpg-reverse-u-reinforce"),
    *("sapo", "dispo", "empg", "rebn", "ppo", "bi-level-gae", "a-lol", "p3o", "copg", "refuel"),
)
"""The names of ``methods.METHODS``, which says what they are: here once more, so that no name needs torch."""

_OWN = {
    name: EntryPoint(name, target, GROUP)
    for name, target in (
        *AGENTS.items(),
        *((n, f"ppg_agents.agents.named:{n.replace('++', '_plus_plus').replace('-', '_')}") for n in ALTERNATIVES),
    )
}


class Agent(Protocol):
    """Speaks, learns from judged conversations, and can be saved."""

    def start(self, n: int, seed: int = 0) -> None:
        """Begin n new conversations."""

    def act(self, observations: Mapping[str, Sequence[str]]) -> list[str]:
        """Answer a batch of observations ``{"instruction": [n], "message": [n]}``."""

    def learn(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """Learn from a batch of conversations; return metrics."""

    def save(self, folder: str | Path) -> None:
        """Write all that is needed to go on."""

    def load(self, folder: str | Path) -> None:
        """Read back what `save` wrote."""


def agents() -> dict[str, EntryPoint]:
    """Return the agents that are installed, by name.

    Raises:
        ValueError: Another package gives a name that is taken: a run's settings would not say which agent it had.
    """
    found = dict(_OWN)
    for point in entry_points(group=GROUP):
        taken = found.get(point.name)
        if taken is not None and taken.value != point.value:
            raise ValueError(
                f"expected one agent named {point.name!r}, got {taken.value} and {point.value}, an entry point of "
                f"{point.dist.name if point.dist else 'another package'}; rename it there"
            )
        found[point.name] = point
    return found


def make_agent(name: str, *args: Any, **options: Any) -> Agent:
    """Make an agent.

    Args:
        name: A name out of `agents`, or ``package.module:Class``.
        *args: Passed on to the agent.
        **options: Passed on to the agent.

    Raises:
        ValueError: No agent of that name is installed, or nothing can be imported there.
    """
    known = agents()
    if name not in known and ":" in name:
        try:
            found = EntryPoint(name, name, GROUP).load()
        except (ImportError, AttributeError) as error:
            raise ValueError(f"expected an agent at {name!r}, got {type(error).__name__}: {error}") from error
        return cast(Agent, found(*args, **options))
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        every = f"{', '.join(sorted(known))}, or your own as 'package.module:Class'"
        raise ValueError(f"expected an agent out of {every}, got {name!r}{hint}")
    return cast(Agent, known[name].load()(*args, **options))


__all__ = ["AGENTS", "ALTERNATIVES", "Agent", "agents", "make_agent"]
