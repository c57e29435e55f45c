"""Judges score replies: which ones there are, and how one is made from its name and plain options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ppg_gym import plugins
from ppg_gym.conversation import Conversation, Persona, Verdict

JUDGES = {
    "facts": "ppg_gym.judges.facts:FactsJudge",
    "llm": "ppg_gym.judges.llm:LLMJudge",
    "nli": "ppg_gym.judges.nli:NLIJudge",
}


class JudgeError(RuntimeError):
    """A judge gave a reply no score; ``verdict`` says why."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(
            f"expected a scored verdict, got status {verdict.status!r} ({verdict.rationale or 'no reason given'});"
            ' pass on_judge_failure="nan" to mask such turns, or "truncate" to end the conversation'
        )
        self.verdict = verdict


class FailureRateError(RuntimeError):
    """Too many replies have no score; the message shows examples."""


class Judge(Protocol):
    """Scores the newest reply of many conversations at once, and keeps nothing between calls.

    An attribute ``waits = True`` says that it spends its time waiting for a server; the partner then speaks at the same
    time. A judge with connections has a method ``close()``.
    """

    def check(self, persona: Persona) -> None:
        """Raise a ValueError when this judge cannot judge this persona's replies."""
        ...

    def judge(self, conversations: Sequence[Conversation]) -> list[Verdict]:
        """Return one verdict per conversation; each ends with a line of the policy."""
        ...


def make(name: str, domain: str, options: Mapping[str, Any]) -> Judge:
    """Return a judge by name: one of ``JUDGES``, or your own as ``package.module:Class``.

    Raises:
        ValueError: An unknown name (the message offers the nearest one), or an option that the judge does not take.
        ModuleNotFoundError: The judge's extra is not installed; the message has the install command.
    """
    made: Judge = plugins.make("judge", name, JUDGES, domain, options)
    return made
