"""The other speaker: who it can be, and how one is made from its name and plain options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple, Protocol

import numpy as np

from ppg_gym.conversation import Conversation

PARTNERS = ("scripted", "console")


class Said(NamedTuple):
    """A partner's line and how it came about; any status but ``ok`` truncates the conversation."""

    text: str
    status: str = "ok"


class Partner(Protocol):
    """Speaks the next line of many conversations at once. Holds no state of its own."""

    def speak(self, conversations: Sequence[Conversation], rngs: Sequence[np.random.Generator]) -> list[Said]:
        """Return one line per conversation, drawing only from that conversation's generator."""
        ...


def make(name: str, domain: str, options: Mapping[str, Any]) -> Partner:
    """Return a partner by name.

    Raises:
        ValueError: An unknown name (the nearest one is offered), or an option that the partner does not take.
    """
    from ppg_gym.partners.console import ConsolePartner
    from ppg_gym.partners.scripted import ScriptedPartner

    if name not in PARTNERS:
        near = get_close_matches(str(name), PARTNERS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"expected a partner out of {', '.join(PARTNERS)}, got {name!r}{hint}")
    if options:
        raise ValueError(f"expected no partner_options for the {name} partner, got {sorted(options)}")
    return ScriptedPartner(domain) if name == "scripted" else ConsolePartner()
