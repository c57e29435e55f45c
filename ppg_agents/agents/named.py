"""Agents by their names, for entry points: ``named:dr_grpo`` makes the agent ``dr-grpo``.

``-`` is written ``_``, and ``++`` ``_plus_plus``: an entry point's attribute is an identifier.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ppg_agents.agents.alternative import AlternativeAgent
from ppg_agents.agents.methods import METHODS
from ppg_agents.agents.pairs import PairAgent
from ppg_agents.agents.value_head import ValueHeadAgent


def __getattr__(attribute: str) -> Callable[..., AlternativeAgent]:
    """Return what makes the agent of a name."""
    name = attribute.replace("_plus_plus", "++").replace("_", "-")
    if name not in METHODS:
        raise AttributeError(f"expected the attribute of an agent out of {', '.join(METHODS)}, got {attribute!r}")
    return partial(_KINDS.get(name, AlternativeAgent), name, METHODS[name])


_KINDS: dict[str, type[AlternativeAgent]] = {
    **dict.fromkeys(("ppo", "bi-level-gae", "a-lol"), ValueHeadAgent),
    **dict.fromkeys(("p3o", "copg", "refuel"), PairAgent),
}
