"""Partners are the other speaker: which ones there are, and how one is made from its name and plain options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from ppg_gym import plugins
from ppg_gym.conversation import Conversation

PARTNERS = {
    "scripted": "ppg_gym.partners.scripted:ScriptedPartner",
    "llm": "ppg_gym.partners.llm:LLMPartner",
    "console": "ppg_gym.partners.console:ConsolePartner",
}


ENDED = "ended"  # the status when a person who plays the partner stops: no fault


class Said(NamedTuple):
    """A partner's line and its status.

    Any status but ``ok`` truncates the conversation: the text is empty, the status says how the partner failed, and the
    reason why, in a sentence or by the line that had the fault.
    """

    text: str
    status: str = "ok"
    reason: str = ""


class PartnerFailureRateError(RuntimeError):
    """Too many of the partner's lines are missing; the message shows examples."""


class Partner(Protocol):
    """Speaks the next line of many conversations at once, and keeps nothing between calls.

    An attribute ``waits = True`` says that it spends its time waiting for a server, ``hears_verdicts = True`` that it
    needs the verdict on the last reply. A partner with connections has a method ``close()``; one that waits may have
    ``abandon()``, which is called from another thread to end a ``speak`` that is waiting.
    """

    def speak(self, conversations: Sequence[Conversation], rngs: Sequence[np.random.Generator]) -> list[Said]:
        """Return one line per conversation, drawn from that conversation's generator only."""
        ...


def make(name: str, domain: str, options: Mapping[str, Any]) -> Partner:
    """Return a partner by name: one of ``PARTNERS``, or your own as ``package.module:Class``.

    Raises:
        ValueError: An unknown name (the message offers the nearest one), or an option that the partner does not take.
        ModuleNotFoundError: The partner's extra is not installed; the message has the install command.
    """
    made: Partner = plugins.make("partner", name, PARTNERS, domain, options)
    return made
