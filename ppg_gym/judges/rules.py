"""Verdicts by rule on replies that are consistent and still bad, without asking a model.

Silence contradicts nothing, a copied persona sentence follows from the persona, and a line that was consistent once is
so every time. A judge that scores consistency alone asks here first. Deterministic, for any domain and any language
with spaces between its words; nothing here knows facts.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

from ppg_gym.conversation import Conversation, Verdict
from ppg_gym.domain.parsing import spoken
from ppg_gym.domain.personas import role_play_instruction

LONG = 6  # a copy or repetition of this many words or more is no coincidence
FIRST_PERSON = 12  # the same for a copied sentence in the first person: "I run a dog obedience school." is an answer
SHORT = 3  # a line of fewer words may come again as often as it likes: "Yes.", "I do."
REPEAT_WINDOW = 6  # how many of the persona's last lines are searched for a repetition

_I = frozenset(("i", "my", "me", "we", "our"))
_BREAK = re.compile(r"(?<=[.!?])[\"')\]]*\s+|\s*\n\s*")
_WRAPPERS = tuple(role_play_instruction("", domain).strip() for domain in ("chatting", "education", "therapy", ""))

_cached_words = functools.lru_cache(maxsize=65536)(spoken)


def rule_verdict(conversation: Conversation) -> Verdict | None:
    """Return a verdict with score 0 when the newest reply is silence, a copy or a repetition, else None.

    - ``silence``: no letter and no digit.
    - ``copying``: holds a sentence of the instruction word for word, case and punctuation aside: one of at least 6
      words, or of 12 when the sentence speaks in the first person.
    - ``repeating``: 6 words or more that are one of the persona's last 6 lines word for word, or 3 to 5 words that are
      two of them. Asked the same again, one may answer the same once, and with a word or two at any time.

    Args:
        conversation: Ends with a line of the policy.
    """
    *earlier, reply = conversation.said()
    words = _cached_words(reply)
    if not words:
        return Verdict("scored", 0.0, "The reply holds no words.", "silence")
    if len(words) >= LONG:
        flat = f" {' '.join(words)} "
        if any(sentence in flat for sentence in _long_sentences(conversation.persona.instruction)):
            return Verdict("scored", 0.0, "The reply copies a sentence of the persona's instruction.", "copying")
    if len(words) >= SHORT:
        before = sum(_cached_words(line) == words for line in earlier[-REPEAT_WINDOW:])
        if before >= (1 if len(words) >= LONG else 2):
            why = "The reply repeats one of the persona's recent lines word for word."
            return Verdict("scored", 0.0, why, "repeating")
    return None


def apply_rules(conversations: Sequence[Conversation]) -> tuple[list[Verdict | None], list[int]]:
    """Return the verdict by rule of every conversation, and the positions that a model has to judge."""
    verdicts = [rule_verdict(conversation) for conversation in conversations]
    return verdicts, [i for i, verdict in enumerate(verdicts) if verdict is None]


@functools.lru_cache(maxsize=4096)
def sentences(text: str) -> tuple[str, ...]:
    """Return the sentences of a text that hold words; a line break ends a sentence too."""
    return tuple(part for part in (piece.strip() for piece in _BREAK.split(text)) if spoken(part))


@functools.lru_cache(maxsize=4096)
def persona_sentences(instruction: str) -> tuple[str, ...]:
    """Return the sentences about the persona, without those that wrap it into a role play."""
    for wrapper in _WRAPPERS:
        if instruction.startswith(wrapper):
            return sentences(instruction.removeprefix(wrapper))
    return sentences(instruction)


@functools.lru_cache(maxsize=4096)
def _long_sentences(instruction: str) -> tuple[str, ...]:
    words = (spoken(sentence) for sentence in sentences(instruction))
    least = ((sentence, LONG if _I.isdisjoint(sentence) else FIRST_PERSON) for sentence in words)
    return tuple(f" {' '.join(sentence)} " for sentence, long in least if len(sentence) >= long)
