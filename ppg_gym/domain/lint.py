"""Checks of a domain's words: is every line of the partner read as its question, and every template as its kind?

The files of a domain can be in order (:mod:`ppg_gym.domain.files`) and still not mean what their author thinks: a
question with the cue of another fact in it, a template that is read as evasion. Deterministic; a second per domain.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import cast

import numpy as np

from ppg_gym.conversation import Conversation, Persona
from ppg_gym.domain.loading import Domain
from ppg_gym.domain.reading import Reader, Track, instruction_sentences, reader
from ppg_gym.domain.saying import say

MOST_TEMPLATES = 5  # templates of a kind and slot that are tried


class _Always:
    """Stands in for a generator: every draw is the same fraction."""

    def __init__(self, fraction: float) -> None:
        self._fraction = fraction

    def random(self) -> float:
        return self._fraction


def faults(domain: Domain) -> Iterator[str]:
    """Yield one line per text of a domain that is read as something else than it is.

    Every line of the partner must be read with its topic, in every state and for every value of every fact; every
    template of a reply as its kind. The one exception is a copied statement that does not address the reader ("It began
    with the fire."): people say such things about themselves, too.

    Args:
        domain: From `ppg_gym.domain.loading.load`.

    Yields:
        ``FILE: …`` with the text, what it should be, and what it is read as; each fault once.
    """
    read = reader(domain.source)
    yield from dict.fromkeys((*_lines(domain, read), *_replies(domain, read)))


def everyone(domain: Domain) -> list[Persona]:
    """Return the fewest personas that between them have every value of every slot."""
    slots = {slot: list(values) for slot, values in domain.slots.items()}
    made = []
    for i in range(max(map(len, slots.values()))):
        facts = {slot: values[i % len(values)] for slot, values in slots.items()}
        made.append(Persona(f"p{i}", domain.instruct("Anna", facts), facts, domain.name, "Anna"))
    return made


def cores(domain: Domain, facts: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield (slot or keyword, line without its opening) for everything that the partner asks or tells."""
    lines = domain.lines
    if "points" in lines:
        yield from lines["points"][facts[domain.options["topic"]]].items()
        return
    for slot, texts in lines["ask"].items():
        yield from ((slot, text) for text in texts)
    for slot, texts in lines.get("recall", {}).items():
        yield from ((slot, text.format(value=facts[slot])) for text in texts)


def _lines(domain: Domain, read: Reader) -> Iterator[str]:
    values = [value for slot in domain.slots.values() for value in slot]
    for number, persona in enumerate(everyone(domain)):
        for state in domain.table.states:
            openings = domain.lines["prefix"][state] + domain.lines["start"].get(state, [])
            for opening, (topic, core) in itertools.product(openings, cores(domain, persona.facts)):
                quoted = values[(number * 7 + len(core)) % len(values)]
                line = f"{opening} {core}".strip().format(said=quoted, **persona.facts)
                parsed = read.parse(line)
                read_as = parsed.cue or next(iter(parsed.points), "")
                if read_as != topic:
                    yield f"{domain.file}: {line!r} is meant to be about {topic}, and read as {read_as or 'nothing'}"


def _replies(domain: Domain, read: Reader) -> Iterator[str]:
    states = itertools.cycle(domain.table.states)
    fractions = enumerate(np.arange(MOST_TEMPLATES) / MOST_TEMPLATES + 0.01)
    for persona, (number, fraction) in itertools.product(everyone(domain), fractions):
        rng = cast(np.random.Generator, _Always(float(fraction)))
        addressed = " ".join(instruction_sentences(persona.instruction))
        for _, core in cores(domain, persona.facts):
            state = next(states)
            openings = domain.lines["prefix"][state]
            line = f"{openings[number % len(openings)]} {core}".strip().format(said="otherwise", **persona.facts)
            if not read.parse(line).cue and not domain.options.get("default_slot"):
                continue  # `_lines` reports it
            conversation = Conversation(persona).add("partner", line)
            for kind in domain.table.kinds:
                if kind == "repeating":
                    continue  # there is no earlier reply to repeat
                reply = say(read, kind, conversation, rng)
                parsed = read.parse(reply)
                read_as = read.read(Track(0, state), persona, read.parse(line), parsed).kind
                if read_as != kind and not (kind == "copying" and parsed.text not in addressed):
                    yield f"{domain.file}: {reply!r} is meant to be {kind} and read as {read_as}, after {line!r}"
