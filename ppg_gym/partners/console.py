"""A person at the terminal plays the partner, one line of standard input per turn."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ppg_gym.conversation import Conversation
from ppg_gym.options import wrong
from ppg_gym.partners import ENDED, Said
from ppg_gym.plugins import refuse_options


class ConsolePartner:
    """Reads the partner's line from standard input, and prints the verdict on the reply before it.

    An empty line or end of input ends the conversation.

    Args:
        domain: Not used.
        options: ``show_persona``: whether to print, before the first line and on standard error, whom the policy
            plays. Off by default, as a partner usually meets a stranger.

    Raises:
        ValueError: Another option, or a value that is not true or false.
    """

    hears_verdicts = True

    def __init__(self, domain: str, options: Mapping[str, Any] | None = None) -> None:
        others = dict(options or {})
        show = others.pop("show_persona", False)
        refuse_options("console partner", others)
        if not isinstance(show, bool):
            raise wrong("partner_options", "show_persona", "true or false", show)
        self._show = show

    def speak(self, conversations: Sequence[Conversation], rngs: Sequence[np.random.Generator]) -> list[Said]:
        """Ask for one line per conversation."""
        lines = []
        for conversation in conversations:
            if self._show and not conversation.lines:
                print(f"[{conversation.persona.id}] {conversation.persona.instruction}", file=sys.stderr, flush=True)
            if conversation.verdicts:
                verdict = conversation.verdicts[-1]
                score = verdict.status if verdict.score is None else f"{verdict.score:.2f}"
                print(f"    ({score}) {verdict.rationale}")
            try:
                text = input("you> ").strip()
            except EOFError:
                print()  # so that the next output begins on a new line
                text = ""
            lines.append(Said(text) if text else Said("", ENDED))
        return lines
