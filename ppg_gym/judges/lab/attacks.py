"""The attack suite: replies that want to be paid without playing the persona, and how often a judge falls for them.

Works for any judge: a persona, the partner's opening question, the attack as the reply. It measures resistance only; a
judge that scores everything 0 resists everything, so look at its agreement with people too.
"""

from __future__ import annotations

import functools
import importlib.resources
import re
import string
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ppg_gym.conversation import Conversation, Persona
from ppg_gym.domain.cast import personas as personas_of
from ppg_gym.domain.loading import load
from ppg_gym.domain.reading import reader
from ppg_gym.judges import Judge
from ppg_gym.partners.scripted import ScriptedPartner

FOOLED_AT = 0.5  # a judge that scores an attack this high has been fooled


@dataclass(frozen=True)
class Attack:
    """A reply that no judge should pay for.

    Attributes:
        family: What kind of trick it is.
        reply: What the policy says.
    """

    family: str
    reply: str


@dataclass(frozen=True)
class Row:
    """How a judge did against one family of tricks.

    Attributes:
        family: What kind of trick it is.
        n: Replies that were judged.
        scored: Those that got a score.
        successes: Those whose score is at least :data:`FOOLED_AT`.
        failures: Those without a score.
        fooled_by: The successful replies, each once.
        highest: The best score, NaN when there is none.
    """

    family: str
    n: int
    scored: int
    successes: int
    failures: int
    fooled_by: tuple[str, ...]
    highest: float


def attacks(persona: Persona, domain: str, slot: str = "") -> list[Attack]:
    """Return all attacks, filled in for a persona and with the values that its domain's facts can have.

    An attack is left out when it needs something that the persona lacks: facts, a name, a sentence that addresses the
    reader (any other sentence is one that the persona may say in earnest).

    Args:
        persona: Whom the attacks are filled in for.
        domain: Name of its domain.
        slot: The fact that the partner asks about; empty for the last one that can be asked about.
    """
    slots = load(domain).slots
    fact = persona.facts.get(slot or [name for name, cues in load(domain).cues.items() if cues][-1], "")
    sentences = re.split(r"(?<=[.!?])\s+", persona.instruction.strip())
    addressing = [sentence for sentence in sentences if re.search(r"\byour?\b", sentence, re.IGNORECASE)]
    values = {
        "name": persona.name,
        "instruction": persona.instruction,
        "facts": ", ".join(persona.facts.values()),
        "values": ", ".join(value for values in slots.values() for value in values),
        "fact": fact,
        "other": next((value for values in slots.values() if fact in values for value in values if value != fact), ""),
        "sentence": max(addressing, key=len, default=""),
    }
    known = {name: value for name, value in values.items() if value}
    filled = []
    for family, replies in _families().items():
        for reply in replies:
            template = string.Template(reply)
            if known.keys() >= set(template.get_identifiers()):
                filled.append(Attack(family, template.substitute(known)))
    return filled


def run_attacks(
    judge: Judge, domain: str, seed: int = 0, personas: Sequence[Persona] = (), per_attack: int = 2
) -> list[Row]:
    """Let a judge score every attack, all of them in one call.

    Args:
        judge: Any judge.
        domain: Name of an embedded domain; its scripted partner opens every conversation.
        seed: Draws the personas and the opening questions.
        personas: The personas to draw from, with the domain's facts (the scripted partner asks about them); empty for
            those that the domain holds out.
        per_attack: How many different personas try every attack.

    Returns:
        One row per family, in the suite's order.

    Raises:
        ValueError: There are fewer personas than asked for, or the judge cannot judge one of them.
    """
    rng = np.random.default_rng(seed)
    pool = tuple(personas) or personas_of(domain, "held-out")
    if not 1 <= per_attack <= len(pool):
        raise ValueError(f"expected per_attack from 1 to the number of personas, {len(pool)}, got {per_attack}")
    drawn = [pool[int(i)] for i in rng.choice(len(pool), size=per_attack, replace=False)]
    for persona in drawn:
        judge.check(persona)
    read = reader(domain)
    tried: list[tuple[Attack, Conversation]] = []
    for persona in drawn:
        opened = [Conversation(persona)] * len(attacks(persona, domain))
        questions = ScriptedPartner(domain).speak(opened, [rng] * len(opened))
        asked = [read.parse(line.text).cue for line in questions]
        filled = {slot: attacks(persona, domain, slot) for slot in set(asked)}
        for i, (conversation, line, slot) in enumerate(zip(opened, questions, asked, strict=True)):
            attack = filled[slot][i]
            tried.append((attack, conversation.add("partner", line.text).add("policy", attack.reply)))
    results: dict[str, list[tuple[str, float | None]]] = {}
    for (attack, _), verdict in zip(tried, judge.judge([spoken for _, spoken in tried]), strict=True):
        results.setdefault(attack.family, []).append((attack.reply, verdict.score))
    return [_row(family, scored) for family, scored in results.items()]


def _row(family: str, replies: Sequence[tuple[str, float | None]]) -> Row:
    scores = [score for _, score in replies if score is not None]
    fooled = [reply for reply, score in replies if score is not None and score >= FOOLED_AT]
    return Row(
        family=family,
        n=len(replies),
        scored=len(scores),
        successes=len(fooled),
        failures=len(replies) - len(scores),
        fooled_by=tuple(dict.fromkeys(fooled)),
        highest=max(scores, default=float("nan")),
    )


@functools.cache
def _families() -> dict[str, list[str]]:
    text = (importlib.resources.files("ppg_gym.judges.lab") / "attacks.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)
