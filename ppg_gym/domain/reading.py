"""Reading: from the words of a reply to its kind in the domain's rule table.

The scripted partner and the facts judge both need to know what was said. They read through this module,
which is deterministic and sees text only; it never scores and never speaks. What has been understood of a
conversation is kept in its ``memo``, so that every turn is read once.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

from ppg_gym.conversation import Conversation, Persona
from ppg_gym.domain.loading import Domain, load
from ppg_gym.domain.parsing import Claim, Parsed, Parser, spoken

REPEAT_WINDOW = 6  # own lines; the same words within so many turns are a repetition, unless they answer
MOST_WORDS = 60
MOST_LISTED = 5  # items of one enumeration
KNOWN_SHARE = 0.5  # below it, a reply is gibberish


class Reading(NamedTuple):
    """How one reply was understood.

    Attributes:
        state: The partner's state when the reply was given.
        kind: The reply's kind.
        slot: The slot that the partner asked about, or the one that the reply contradicts.
        said: The value that the reply claims for ``slot``, or "".
        fact: The persona's value for ``slot``, or "".
    """

    state: str
    kind: str
    slot: str
    said: str
    fact: str


class Track(NamedTuple):
    """Where a conversation stands after the lines read so far.

    Attributes:
        read: Number of lines consumed.
        state: The partner's present state.
        readings: One per reply.
        own: Normalised own lines, oldest first.
        asked: Slots (or lesson keywords) that the partner has asked about, oldest first.
    """

    read: int
    state: str
    readings: tuple[Reading, ...] = ()
    own: tuple[str, ...] = ()
    asked: tuple[str, ...] = ()


class Reader:
    """Reads one domain's replies."""

    def __init__(self, domain: Domain) -> None:
        self.domain = domain
        self._default_slot = str(domain.options.get("default_slot", ""))
        self._asking = bool(domain.options.get("questions_claim", False))
        self._yes_claims = bool(domain.options.get("yes_claims", False))
        self.parse = functools.lru_cache(maxsize=16384)(Parser(domain).parse)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return reader, (self.domain.source,)

    def track(self, conversation: Conversation) -> Track:
        """Read whatever of a conversation has not been read yet and return where it stands."""
        known: Track | None = conversation.memo.get(self.domain.source)
        track = known or Track(0, self.domain.table.states[0])
        lines = conversation.lines
        while len(lines) - track.read >= 2:
            message, reply = lines[track.read].text, lines[track.read + 1].text
            track = self._advance(track, conversation.persona, message, reply)
        conversation.memo[self.domain.source] = track
        return track

    def _advance(self, track: Track, persona: Persona, message: str, reply: str) -> Track:
        heard, said = self.parse(message), self.parse(reply)
        reading = self.read(track, persona, heard, said)
        asked = heard.cue or next(iter(heard.points), "")  # a point begins with its keyword
        return Track(
            track.read + 2,
            self.domain.table.next[track.state, reading.kind],
            (*track.readings, reading),
            (*track.own, said.text),
            (*track.asked, asked),
        )

    def read(self, track: Track, persona: Persona, heard: Parsed, said: Parsed) -> Reading:
        """Return the kind of a reply: tricks and contradictions first, then the domain's own rules."""
        facts = persona.facts
        slot = heard.cue or self._default_slot
        fact = facts.get(slot, "")
        claims = self._claims(heard, said, slot)
        if not said.length:
            return Reading(track.state, "silence", slot, "", fact)
        if "meta" in said.marks:
            return Reading(track.state, "meta", slot, "", fact)
        for claim in claims:
            own = facts.get(claim.slot)
            if claim.passing and claim.slot != slot:
                continue
            if own is not None and (claim.value in (own, "")) == claim.negated:
                return Reading(track.state, "slip", claim.slot, "" if claim.negated else claim.value, own)
        if said.known < KNOWN_SHARE:
            return Reading(track.state, "gibberish", slot, "", fact)
        copied = instruction_sentences(persona.instruction) if "you" in said.text else ()
        if any(sentence in said.text for sentence in copied):
            return Reading(track.state, "copying", slot, "", fact)
        named = {claim.slot for claim in claims if not claim.negated}
        answers = heard.cue in named  # who is asked again may say it again
        if said.text in track.own[-REPEAT_WINDOW:] and not answers:
            return Reading(track.state, "repeating", slot, "", fact)
        others = len(named) - (slot in named)
        beside = len(set(said.points) - set(heard.points)) if said.points else 0
        if others >= 2 or beside >= 2 or said.length > MOST_WORDS or said.listed > MOST_LISTED:
            return Reading(track.state, "listing", slot, "", fact)
        shown = set(said.marks)
        if said.question:
            shown.add("question")
        if slot in named or (not slot and named):
            shown.add("fact")
        if len(said.points) > beside:
            shown.add("point")
        if said.length < 2 and "affirm" not in shown:
            return Reading(track.state, "vague", slot, "", fact)
        if said.cue == slot and slot:
            shown.add("cue")
        if others:
            shown.add("other_fact")
        for rule in self.domain.rules:
            if rule.needs <= shown and not rule.without & shown:
                return Reading(track.state, rule.kind, slot, fact if "fact" in shown else "", fact)
        return Reading(track.state, "off_topic", slot, "", fact)

    def _claims(self, heard: Parsed, said: Parsed, slot: str) -> list[Claim]:
        """Return what the reply claims of the speaker; a bare yes or no answers the value that was quoted."""
        claims = [
            claim
            for claim in said.claims
            if (self._asking or not claim.asked) and (claim.slot == slot or claim.slot not in self.domain.asked_only)
        ]
        if any(claim.slot == slot and claim.value and not claim.negated for claim in claims):
            claims = [claim for claim in claims if claim.value]
        else:
            claims = [claim for claim in claims if claim.value or claim.slot == slot]
        if not self._yes_claims:
            return claims
        quoted = next((claim.value for claim in heard.claims if claim.slot == slot), "")
        if quoted and not claims:
            negative = not said.marks.isdisjoint(("deny", "negation"))
            if "affirm" in said.marks and (not negative or said.text.startswith("yes")):
                claims.append(Claim(slot, quoted, False, False))
            elif negative:
                claims.append(Claim(slot, quoted, True, False))
        return claims


@functools.lru_cache(maxsize=4096)
def instruction_sentences(instruction: str) -> tuple[str, ...]:
    """Return the instruction's sentences that address the reader, as words: nobody says those of themselves."""
    sentences = (spoken(sentence) for sentence in re.split(r"(?<=[.!?])\s+", instruction))
    addressed = (sentence for sentence in sentences if not {"you", "your"}.isdisjoint(sentence))
    return tuple(" ".join(sentence) for sentence in addressed)


def reader(name: str) -> Reader:
    """Return the reader of a domain, by what `ppg_gym.domain.loading.load` takes; one per process."""
    return _reader(load(name).source)


@functools.cache
def _reader(source: str) -> Reader:
    return Reader(load(source))
