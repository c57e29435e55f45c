"""The other speaker: who it can be, and how one is made from its name and plain options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from ppg_gym import plugins as named
from ppg_gym.conversation import Conversation

PARTNERS = {
    "scripted": "ppg_gym.partners.scripted:ScriptedPartner",
    "llm": "ppg_gym.partners.llm:LLMPartner",
    "console": "ppg_gym.partners.console:ConsolePartner",
}


class Said(NamedTuple):
    """A partner's line and how it came about.

    Any status but ``ok`` truncates the conversation: the text is empty, and the status names the partner's fault.
    """

    text: str
    status: str = "ok"


class Partner(Protocol):
    """Speaks the next line of many conversations at once. Holds nothing of a conversation.

    Attributes ``waits`` and ``hears_verdicts`` say that it spends its time waiting for a server, and that it
    must have the verdict on the last reply; both are False when they are missing. One that holds connections
    has a method ``close()``; one that waits may have ``abandon()``, called from another thread while ``speak`` waits.
    """

    def speak(self, conversations: Sequence[Conversation], rngs: Sequence[np.random.Generator]) -> list[Said]:
        """Return one line per conversation, drawing only from that conversation's generator."""
        ...


def make(name: str, domain: str, options: Mapping[str, Any]) -> Partner:
    """Return a partner by name: one of ``PARTNERS``, or anybody's own as ``package.module:Class``.

    Raises:
        ValueError: An unknown name (the nearest one is offered), or an option that the partner does not take.
        ModuleNotFoundError: The partner's extra is not installed; the message holds the install command.
    """
    made: Partner = named.make("partner", name, PARTNERS, domain, options)
    return made
