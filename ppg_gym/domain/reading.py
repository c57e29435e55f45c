"""Reading: from the words of a reply to its kind in the domain's rule table.

The scripted partner and the facts judge both read replies here. Reading is deterministic and sees text only; it never
scores and never speaks. What has been read of a conversation is kept in its ``memo``, so that no turn is read twice.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

from ppg_gym.conversation import Conversation, Persona
from ppg_gym.domain.loading import UNASKED, Domain, load
from ppg_gym.domain.parsing import MOST_WORDS, Claim, Parsed, Parser, spoken

REPEAT_WINDOW = 6  # turns within which the same words are a repetition, unless they answer the question
MOST_LISTED = 5  # items of one enumeration
KNOWN_SHARE = 0.5  # below it, a reply is gibberish


class Reading(NamedTuple):
    """How one reply was understood.

    Attributes:
        state: The partner's state when the reply was given.
        kind: The reply's kind, or ``unasked``.
        slot: The slot that the partner asked about, or the one that the reply contradicts.
        claimed: The value that the reply claims for ``slot``, or "".
        fact: The persona's value for ``slot``, or "".
    """

    state: str
    kind: str
    slot: str
    claimed: str
    fact: str


class Track(NamedTuple):
    """Where a conversation stands after the lines read so far.

    Attributes:
        read: Number of lines read.
        state: The partner's present state.
        readings: One per reply.
        replies: The replies' words, oldest first.
        asked: Slots (or lesson keywords) that the partner has asked about, oldest first.
    """

    read: int
    state: str
    readings: tuple[Reading, ...] = ()
    replies: tuple[str, ...] = ()
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
        """Read the turns of a conversation that have not been read yet, and return where it stands."""
        known: Track | None = conversation.memo.get(self.domain.source)
        track = known or Track(0, self.domain.table.states[0])
        lines = conversation.lines
        while len(lines) - track.read >= 2:
            message, reply = lines[track.read].text, lines[track.read + 1].text
            track = self._advance(track, conversation.persona, message, reply)
        conversation.memo[self.domain.source] = track
        return track

    def _advance(self, track: Track, persona: Persona, message: str, reply: str) -> Track:
        question, answer = self.parse(message), self.parse(reply)
        reading = self.read(track, persona, question, answer)
        asked = question.cue or next(iter(question.points), "")  # a point of a lesson begins with its keyword
        return Track(
            track.read + 2,
            self.domain.table.next[track.state, reading.kind],
            (*track.readings, reading),
            (*track.replies, answer.text),
            (*track.asked, asked),
        )

    def read(self, track: Track, persona: Persona, message: Parsed, reply: Parsed) -> Reading:
        """Return the kind of a reply: tricks and contradictions first, then the domain's rules.

        The order decides. Control text comes first, so that nothing said around it can pay; a contradiction comes
        before gibberish and copying, because any sentence with a wrong fact in it is a slip. The domain's rules are
        only asked about a reply that no trick explains.
        """
        facts = persona.facts
        slot = message.cue or self._default_slot
        fact = facts.get(slot, "")
        claims = self._claims(message, reply, slot)
        if not reply.length:
            return Reading(track.state, "silence", slot, "", fact)
        if "meta" in reply.marks:
            return Reading(track.state, "meta", slot, "", fact)
        for claim in claims:
            true = facts.get(claim.slot)
            if claim.passing and claim.slot != slot:
                continue
            # Denying the true value (or that there is any) is a slip; so is claiming another one.
            if true is not None and (claim.value in (true, "")) == claim.negated:
                return Reading(track.state, "slip", claim.slot, "" if claim.negated else claim.value, true)
        if reply.known < KNOWN_SHARE:
            return Reading(track.state, "gibberish", slot, "", fact)
        copied = instruction_sentences(persona.instruction) if "you" in reply.text else ()
        if any(sentence in reply.text for sentence in copied):
            return Reading(track.state, "copying", slot, "", fact)
        named = {claim.slot for claim in claims if not claim.negated}
        answers = message.cue in named  # asked the same again, one may answer the same again
        if reply.text in track.replies[-REPEAT_WINDOW:] and not answers:
            return Reading(track.state, "repeating", slot, "", fact)
        others = len(named) - (slot in named)
        beside = len(set(reply.points) - set(message.points)) if reply.points else 0
        if others >= 2 or beside >= 2 or reply.length > MOST_WORDS or reply.listed > MOST_LISTED:
            return Reading(track.state, "listing", slot, "", fact)
        if reply.fault:
            return Reading(track.state, "garbled", slot, "", fact)
        if not self._asks(message):
            return Reading(track.state, UNASKED, slot, "", fact)
        shown = set(reply.marks)
        if reply.question:
            shown.add("question")
        if slot in named or (not slot and named):
            shown.add("fact")
        if len(reply.points) > beside:
            shown.add("point")
        if reply.length < 2 and "affirm" not in shown:
            return Reading(track.state, "vague", slot, "", fact)
        if reply.cue == slot and slot:
            shown.add("cue")
        if others:
            shown.add("other_fact")
        for rule in self.domain.rules:
            if rule.needs <= shown and not rule.without & shown:
                return Reading(track.state, rule.kind, slot, fact if "fact" in shown else "", fact)
        return Reading(track.state, "off_topic", slot, "", fact)

    def _asks(self, message: Parsed) -> bool:
        """Return whether a line of the partner is one that the domain's rules are about."""
        return bool(message.points if "points" in self.domain.lines else message.cue or self._default_slot)

    def _claims(self, message: Parsed, reply: Parsed, slot: str) -> list[Claim]:
        """Return what the reply claims about the speaker; a bare yes or no answers the value in the question."""
        claims = [
            claim
            for claim in reply.claims
            if (self._asking or not claim.asked) and (claim.slot == slot or claim.slot not in self.domain.asked_only)
        ]
        if any(claim.slot == slot and claim.value and not claim.negated for claim in claims):
            claims = [claim for claim in claims if claim.value]
        else:
            claims = [claim for claim in claims if claim.value or claim.slot == slot]
        if not self._yes_claims:
            return claims
        quoted = next((claim.value for claim in message.claims if claim.slot == slot), "")
        if quoted and not claims:
            negative = not reply.marks.isdisjoint(("deny", "negation"))
            if "affirm" in reply.marks and (not negative or reply.text.startswith("yes")):
                if reply.known == 1.0 and reply.at_home:  # unlike "Yes, it isas." and "Yes, still gaming."
                    claims.append(Claim(slot, quoted, False, False))
            elif negative:
                claims.append(Claim(slot, quoted, True, False))
        return claims


@functools.lru_cache(maxsize=4096)
def instruction_sentences(instruction: str) -> tuple[str, ...]:
    """Return the instruction's sentences that say "you", as words: nobody says those about themselves."""
    sentences = (spoken(sentence) for sentence in re.split(r"(?<=[.!?])\s+", instruction))
    addressed = (sentence for sentence in sentences if not {"you", "your"}.isdisjoint(sentence))
    return tuple(" ".join(sentence) for sentence in addressed)


def reader(name: str) -> Reader:
    """Return the reader of a domain, by what `ppg_gym.domain.loading.load` takes; one per process."""
    return _reader(load(name).source)


@functools.cache
def _reader(source: str) -> Reader:
    return Reader(load(source))
