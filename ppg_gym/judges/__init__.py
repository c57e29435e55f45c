"""Judges: who can score a reply, and how one is made from its name and plain options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Protocol

from ppg_gym.conversation import Conversation, Persona, Verdict

JUDGES = ("facts",)


class JudgeError(RuntimeError):
    """A judge gave no score for a reply; carries the verdict."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(
            f"expected a scored verdict, got status {verdict.status!r} ({verdict.rationale or 'no reason given'});"
            ' pass on_judge_failure="nan" to mask such turns, or "truncate" to end the conversation'
        )
        self.verdict = verdict


class Judge(Protocol):
    """Scores the newest reply of many conversations at once. Holds no state of its own."""

    def check(self, persona: Persona) -> None:
        """Raise a ValueError when this judge can not judge replies of this persona."""
        ...

    def judge(self, conversations: Sequence[Conversation]) -> list[Verdict]:
        """Return one verdict per conversation; each ends with a line of the policy."""
        ...


def make(name: str, domain: str, options: Mapping[str, Any]) -> Judge:
    """Return a judge by name.

    Raises:
        ValueError: An unknown name (the nearest one is offered), or an option that the judge does not take.
    """
    from ppg_gym.judges.facts import FactsJudge

    if name not in JUDGES:
        near = get_close_matches(str(name), JUDGES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"expected a judge out of {', '.join(JUDGES)}, got {name!r}{hint}")
    if options:
        raise ValueError(f"expected no judge_options for the facts judge, got {sorted(options)}")
    return FactsJudge(domain)
