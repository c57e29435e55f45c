"""A person at the terminal plays the partner, one line of standard input per turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ppg_gym.conversation import Conversation
from ppg_gym.named import refuse_options
from ppg_gym.partners import Said


class ConsolePartner:
    """Reads the partner's line from standard input, and shows what the judge thought of the reply before it.

    An empty line or end of input ends the conversation.
    """

    hears_verdicts = True

    def __init__(self, domain: str, options: Mapping[str, Any] | None = None) -> None:
        refuse_options("console partner", options)

    def speak(self, conversations: Sequence[Conversation], rngs: Sequence[np.random.Generator]) -> list[Said]:
        """Ask for one line per conversation."""
        said = []
        for conversation in conversations:
            if conversation.verdicts:
                verdict = conversation.verdicts[-1]
                score = verdict.status if verdict.score is None else f"{verdict.score:.2f}"
                print(f"    ({score}) {verdict.rationale}")
            try:
                text = input("you> ").strip()
            except EOFError:
                text = ""
            said.append(Said(text) if text else Said("", "ended"))
        return said
