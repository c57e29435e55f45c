"""Saying a reply of a given kind, in the domain's words: the opposite of reading.

For uses that need replies of a known kind: the data that the embedded model is pretrained on, the check of language
against the twin, and the tests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ppg_gym.conversation import Conversation
from ppg_gym.domain.reading import Reader
from ppg_gym.partners.scripted import pick


def say(reader: Reader, kind: str, conversation: Conversation, rng: np.random.Generator) -> str:
    """Return a reply of a kind to the partner's newest line.

    Args:
        reader: The domain's reader.
        kind: A kind of the domain's rule table.
        conversation: Ends with a line of the partner.
        rng: Draws the template and, for a slip, the wrong value.

    Raises:
        ValueError: The line asks about no fact, or about one that the persona lacks.
    """
    domain, facts = reader.domain, conversation.persona.facts
    heard = reader.parse(conversation.lines[-1].text)
    slot = heard.cue or domain.options.get("default_slot", "")
    if slot not in facts:
        got = f"a persona without {slot!r}" if slot else "none in it"
        raise ValueError(
            f"expected a line of the partner that asks about a fact of the persona, got {got}: "
            f"{conversation.lines[-1].text!r}; ask about one of {', '.join(facts) or 'its facts (it has none)'}"
        )
    value = facts[slot]
    entry = domain.replies[kind]
    if kind == "slip":
        entry = domain.replies[entry["like"]]
        value = pick([v for v in domain.slots[slot] if v != value], rng)
    earlier = conversation.said()
    if kind == "repeating" and not earlier:
        entry = domain.replies["copying"]
    template = pick(_templates(entry, slot, recall=any(c.value == facts[slot] for c in heard.claims)), rng)
    points = domain.lines.get("points", {}).get(facts.get(domain.options.get("topic", ""), ""), {})
    key = next((k for k in points if k in heard.points and points[k] in conversation.lines[-1].text), "")
    return template.format(
        value=value,
        key=key,
        text=points.get(key, "").rstrip("."),
        points=", ".join(list(points)[:4]).capitalize(),
        statement=domain.statements[slot].format(**facts),
        previous=pick(earlier[-3:], rng) if earlier else "",
        **facts,
    )


def _templates(entry: Mapping[str, Sequence[str]], slot: str, *, recall: bool) -> Sequence[str]:
    """Return a kind's templates for a slot; a kind may have others for a fact that was told before."""
    if "ask" in entry:
        entry = entry["recall" if recall else "ask"]  # type: ignore[assignment]
    return entry.get(slot) or entry["any"]
