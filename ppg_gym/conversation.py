"""What a conversation is made of: frozen data, no behaviour beyond validation.

Everything here is plain Python, so that a judge, a partner, an importer and a learner can share it without importing
one another. Nothing here may talk to a model or draw a random number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

Status = Literal["scored", "unparsed", "timeout", "refused", "error"]
Speaker = Literal["partner", "policy"]
STATUSES = frozenset(get_args(Status))


@dataclass(frozen=True)
class Persona:
    """Who the policy plays.

    Attributes:
        id: Unique within its file.
        instruction: The role-play instruction that the policy reads.
        facts: Structured facts, slot -> value; empty for personas that are prose only.
        domain: The domain the persona was made for.
        name: What the partner may call the persona.
    """

    id: str
    instruction: str
    facts: Mapping[str, str] = field(default_factory=dict)
    domain: str = ""
    name: str = ""


@dataclass(frozen=True)
class Verdict:
    """What a judge says about one reply: a score, or the reason why there is none.

    Attributes:
        status: ``scored``, or how judging failed.
        score: In [0, 1] when scored, else None. A failed verdict is never a number.
        rationale: One sentence.
        kind: The reply kind in the domain's rule table; empty when the judge has none.
        raw: What a judging model wrote, before parsing; empty when no model was asked.

    Raises:
        ValueError: A scored verdict without a score in [0, 1], or a failed verdict with a score.
    """

    status: Status
    score: float | None
    rationale: str = ""
    kind: str = ""
    raw: str = ""

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"expected a verdict status out of {sorted(STATUSES)}, got {self.status!r}")
        if self.status == "scored":
            if self.score is None or not math.isfinite(self.score) or not 0.0 <= self.score <= 1.0:
                raise ValueError(f"expected a score in [0, 1] for a scored verdict, got {self.score!r}")
        elif self.score is not None:
            raise ValueError(f"expected no score for a verdict with status {self.status!r}, got {self.score!r}")

    def to_dict(self) -> dict[str, Any]:
        """Return the plain dict that goes into ``info["verdict"]``."""
        return {"status": self.status, "score": self.score, "rationale": self.rationale, "kind": self.kind}


class Line(NamedTuple):
    """One utterance."""

    speaker: Speaker
    text: str


@dataclass(frozen=True)
class Conversation:
    """A conversation so far.

    Attributes:
        persona: Who the policy plays.
        lines: Alternating utterances; the partner opens.
        verdicts: One per line of the policy, in order.
        memo: What readers have already worked out about it, so that no line is read twice; never compared.
    """

    persona: Persona
    lines: tuple[Line, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    memo: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def add(self, speaker: Speaker, text: str) -> Conversation:
        """Return the conversation with one more line and a copy of the memo."""
        return Conversation(self.persona, (*self.lines, Line(speaker, text)), self.verdicts, self.memo.copy())

    def judged(self, verdict: Verdict) -> Conversation:
        """Return the conversation with a verdict on its newest reply."""
        return Conversation(self.persona, self.lines, (*self.verdicts, verdict), self.memo.copy())

    def said(self) -> tuple[str, ...]:
        """Return the policy's lines, oldest first."""
        return tuple(line.text for line in self.lines if line.speaker == "policy")
