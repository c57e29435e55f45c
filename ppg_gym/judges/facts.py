"""The facts judge: scores a reply by the persona's structured facts and the domain's rule table.

Deterministic and offline. It knows the words of its domain's facts only: a truthful reply in other words is not
recognised.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from ppg_gym.conversation import Conversation, Persona, Verdict
from ppg_gym.domain.loading import load
from ppg_gym.domain.reading import Reading, reader
from ppg_gym.plugins import refuse_options

_WHY = {
    "silence": "The reply holds no words.",
    "gibberish": "Most of the reply is not in the domain's vocabulary.",
    "meta": "The reply talks to the judge or holds control text.",
    "garbled": "The reply is no sentence that a person would say: its words are out of order, cut off or repeated.",
    "unasked": "The partner asks about no fact; the reply contradicts none.",
    "copying": "The reply copies a sentence of the persona's instruction.",
    "repeating": "The reply repeats one of the persona's recent lines word for word.",
    "listing": "The reply lists facts that were not asked for.",
    "evasion": "The reply evades the question about {slot}.",
    "question_back": "The reply throws a question back instead of answering about {slot}.",
    "vague": "The reply stays vague: it does not name the {slot} ({fact}).",
    "off_topic": "The reply is not about {slot}.",
}
_OTHERWISE = "The reply is of the kind {kind} on the {slot} ({fact})."  # for a domain's kinds without [why]


class FactsJudge:
    """Judges by reading: contradiction 0, every trick low, the rest by the state of the conversation.

    Args:
        domain: Name of an embedded domain, or the path of your own.
        options: None are taken.
    """

    def __init__(self, domain: str, options: Mapping[str, Any] | None = None) -> None:
        refuse_options("facts judge", options)
        self._reader = reader(domain)

    def check(self, persona: Persona) -> None:
        """Refuse a persona whose facts are not this domain's.

        Raises:
            ValueError: A fact is missing, or has a value that the domain does not know.
        """
        slots = self._reader.domain.slots
        wrong = [s for s in slots if persona.facts.get(s) not in slots[s]]
        if wrong:
            raise ValueError(
                f"the facts judge of {self._reader.domain.name!r} expected a persona with a known value for each of"
                f" {', '.join(slots)}; persona {persona.id!r} has none for {', '.join(wrong)}."
                ' Judge personas that are prose with judge="llm" or judge="nli"'
            )

    def judge(self, conversations: Sequence[Conversation]) -> list[Verdict]:
        """Return a scored verdict for the newest reply of every conversation."""
        source = self._reader.domain.source
        return [_verdict(source, self._reader.track(c).readings[-1]) for c in conversations]


@functools.lru_cache(maxsize=16384)
def _verdict(source: str, reading: Reading) -> Verdict:
    domain = load(source)
    slot, fact = reading.slot or "question", reading.fact or "unknown"
    if reading.kind == "slip":
        says = f"claims {reading.claimed}" if reading.claimed else "denies it"
        why = f"The persona's {slot} is {fact}; the reply {says}."
    else:
        why = domain.why.get(reading.kind) or _WHY.get(reading.kind) or _OTHERWISE.replace("{kind}", reading.kind)
        why = why.format(slot=slot, fact=fact)
    score = domain.table.score[reading.state, reading.kind]
    return Verdict("scored", score, f"{why[:-1]}, in state {reading.state}.", reading.kind)
