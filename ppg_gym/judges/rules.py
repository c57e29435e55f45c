"""What a judge that reads meaning would call consistent and no listener would: verdicts by rule, no model asked.

Silence contradicts nothing, a copied persona sentence is entailed by the persona, and a line that was consistent
once is consistent every time. A judge that scores consistency alone asks here first. Deterministic, any domain,
any language that puts spaces between its words; nothing here knows facts.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

from ppg_gym.conversation import Conversation, Verdict
from ppg_gym.domain.parsing import spoken
from ppg_gym.domain.personas import role_play_instruction

LONG = 6  # words from which on a copy or a repetition is no coincidence
OWN = 12  # the same for a copied sentence in the first person: "I run a dog obedience school." is an answer
SHORT = 3  # words below which a line may come again as often as it likes: "Yes.", "I do."
REPEAT_WINDOW = 6  # own lines that a repetition is looked for in

_FIRST_PERSON = frozenset(("i", "my", "me", "we", "our"))
_BREAK = re.compile(r"(?<=[.!?])[\"')\]]*\s+|\s*\n\s*")
_WRAPPERS = tuple(role_play_instruction("", domain).strip() for domain in ("chatting", "education", "therapy", ""))

_cached_words = functools.lru_cache(maxsize=65536)(spoken)


def rule_verdict(conversation: Conversation) -> Verdict | None:
    """Return a verdict with score 0 when the newest reply is silence, a copy or a repetition, else None.

    - ``silence``: no letter and no digit.
    - ``copying``: holds a sentence of the instruction word for word, case and punctuation aside: of at least 6 words,
      or of 12 when the instruction itself speaks in the first person.
    - ``repeating``: 6 words or more that one of the 6 own lines before says word for word, or 3 to 5 words that two
      of them say: whoever is asked again may answer the same once, and with a word or two at any time.

    Args:
        conversation: Ends with a line of the policy.
    """
    own = conversation.said()
    said = _cached_words(own[-1])
    if not said:
        return Verdict("scored", 0.0, "The reply holds no words.", "silence")
    if len(said) >= LONG:
        flat = f" {' '.join(said)} "
        if any(sentence in flat for sentence in _long_sentences(conversation.persona.instruction)):
            return Verdict("scored", 0.0, "The reply copies a sentence of the persona's instruction.", "copying")
    if len(said) >= SHORT:
        before = sum(_cached_words(line) == said for line in own[-1 - REPEAT_WINDOW : -1])
        if before >= (1 if len(said) >= LONG else 2):
            why = "The reply repeats one of the persona's recent lines word for word."
            return Verdict("scored", 0.0, why, "repeating")
    return None


def apply_rules(conversations: Sequence[Conversation]) -> tuple[list[Verdict | None], list[int]]:
    """Return the verdict by rule of every conversation, and the positions that a model has to judge."""
    verdicts = [rule_verdict(conversation) for conversation in conversations]
    return verdicts, [i for i, verdict in enumerate(verdicts) if verdict is None]


@functools.lru_cache(maxsize=4096)
def sentences(text: str) -> tuple[str, ...]:
    """Return the sentences of a text; a line break ends one too. Whatever holds no words is dropped."""
    return tuple(part for part in (piece.strip() for piece in _BREAK.split(text)) if spoken(part))


@functools.lru_cache(maxsize=4096)
def persona_sentences(instruction: str) -> tuple[str, ...]:
    """Return the sentences about the persona: without those that only wrap it into a role play."""
    for wrapper in _WRAPPERS:
        if instruction.startswith(wrapper):
            return sentences(instruction.removeprefix(wrapper))
    return sentences(instruction)


@functools.lru_cache(maxsize=4096)
def _long_sentences(instruction: str) -> tuple[str, ...]:
    words = (spoken(sentence) for sentence in sentences(instruction))
    least = ((sentence, LONG if _FIRST_PERSON.isdisjoint(sentence) else OWN) for sentence in words)
    return tuple(f" {' '.join(sentence)} " for sentence, long in least if len(sentence) >= long)
