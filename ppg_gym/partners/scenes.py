"""The role that a language model plays opposite the persona: the ``[partner]`` table of a domain.

Reads and checks data. Of a persona, a scene tells the model only what a stranger may know.
"""

from __future__ import annotations

import re
from dataclasses import MISSING, dataclass, fields
from typing import Any

from ppg_gym.conversation import Persona
from ppg_gym.domain.loading import load
from ppg_gym.nearest import did_you_mean
from ppg_gym.partners.audit import Roles
from ppg_gym.sanitise import plain

_LONGEST = 80  # characters of a name or a topic


@dataclass(frozen=True)
class Scene:
    """The partner's role and the texts for it.

    Attributes:
        role: What the partner is: "therapist".
        counterpart: Whom it talks to: "the patient".
        labels: What the partner's lines may be labelled with, besides ``role``.
        counterparts: The same for the other speaker; the persona's name is always one of them.
        kinds: Nouns of the other speaker's role, which the partner never calls itself.
        flips: Regular expressions for what only the other speaker says.
        brief: The role in a few sentences.
        opening: The message that asks for the first line.
        silence: The message that stands in for an empty reply.
        with_name: Told when the persona has a name that the partner may know; holds ``{name}``.
        with_topic: Told when the persona's facts name the topic; holds ``{topic}``.
        without_topic: Told when they do not.
        topic: The slot whose value is the topic; from the domain's options.
    """

    role: str
    counterpart: str
    labels: tuple[str, ...]
    counterparts: tuple[str, ...]
    kinds: tuple[str, ...]
    flips: tuple[str, ...]
    brief: str
    opening: str
    silence: str
    with_name: str = ""
    with_topic: str = ""
    without_topic: str = ""
    topic: str = ""

    def known(self, persona: Persona) -> str:
        """Return what the partner knows about this meeting beyond its role, in sentences."""
        name = plain(persona.name, _LONGEST) if self.with_name else ""
        topic = plain(persona.facts.get(self.topic, ""), _LONGEST) if self.with_topic else ""
        sentences = (self.with_name.format(name=name) if name else "", self._lesson(topic))
        return " ".join(sentence for sentence in sentences if sentence)

    def _lesson(self, topic: str) -> str:
        return self.with_topic.format(topic=topic) if topic else self.without_topic

    def roles(self, persona: Persona) -> Roles:
        """Return who speaks to whom in a conversation with this persona."""
        names = tuple(dict.fromkeys(name for name in (persona.name, *persona.name.split()[:1]) if name.strip()))
        return Roles((self.role, *self.labels), (*self.counterparts, *names), self.kinds, names, self.flips)


_KEYS = tuple(field.name for field in fields(Scene) if field.default is MISSING)


def scene(domain: str) -> Scene:
    """Return the scene of a domain, by what `ppg_gym.domain.loading.load` takes.

    Raises:
        ValueError: There is no such domain, or its ``[partner]`` table is wrong; the message offers the nearest key.
    """
    loaded = load(domain)
    return parse(loaded.partner, loaded.file, topic=str(loaded.options.get("topic", "")))


def parse(table: Any, where: str, topic: str = "") -> Scene:
    """Return the scene that a ``[partner]`` table describes.

    Args:
        table: The table.
        where: The file, for messages.
        topic: The slot whose value is the conversation's topic, if there is one.

    Raises:
        ValueError: A key that is missing, unknown or of the wrong type, or a pattern that is no regular expression.
    """
    if not isinstance(table, dict):
        raise ValueError(f"{where}: expected a table [partner], got {table!r}; add one with {', '.join(_KEYS)}")
    kinds = {field.name: str(field.type) for field in fields(Scene) if field.name != "topic"}
    for key, value in table.items():
        if key not in kinds:
            raise ValueError(f"{where}: unknown key partner.{key}{did_you_mean(key, kinds)}")
        listed = kinds[key] != "str"
        if not (isinstance(value, list) and all(isinstance(v, str) for v in value) if listed else type(value) is str):
            raise ValueError(f"{where}: partner.{key}: expected {'a list of strings' if listed else 'a string'}")
    missing = [key for key in _KEYS if key not in table]
    if missing:
        raise ValueError(f"{where}: expected every key of [partner], missing {', '.join(missing)}")
    for pattern in table["flips"]:
        try:
            re.compile(pattern)
        except re.error as error:
            got = f"expected regular expressions, got {pattern!r} ({error})"
            raise ValueError(f"{where}: partner.flips: {got}") from error
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v.strip() for k, v in table.items()}
    return Scene(**given, topic=topic)
