"""Whether a reply is made of sentences that somebody might say: what no rule about facts can see.

Word order is measured with ordinary English (:mod:`ppg_gym.domain.english`); three words in a row that occur in the
domain's own lines and replies are always in order. Words said twice are found by rule. Deterministic.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from string import Formatter
from typing import Any

from ppg_gym.domain.english import english
from ppg_gym.domain.loading import Domain
from ppg_gym.domain.scope import PAUSES, word_set

UNLIKELY = 1.8  # nats of surprise, summed and divided by length ** LENGTH: above it, words in a row are no sentence
IMPOSSIBLE = 8.5  # nats of surprise at a single word: it cannot stand there, however long the rest
LENGTH = 0.7  # between a sum, which long sentences fail, and a mean, in which one broken place is lost
OFTEN = 3  # as many of one full word in a reply are too many when they are a quarter of the words; two, when half
SHORT_PHRASE = 2  # a sentence or clause of as many words or more is not said twice in one reply
LONGEST_STUTTER = 6  # words

# What people say twice in a row.
_TWICE = word_set("very really so no yes yeah ha haha hi hey bye that had many long knock ok okay")
_NO_STAMMER = word_set("iphone ipad ipod imac iran ion ions irate ideal ideally")
_JOINTS = PAUSES | {"and", "but", "or", "because"}
_SIGNS = PAUSES | frozenset(".!?;\n")


class Sentences:
    """Tells sentences from words in a row, for one domain.

    Args:
        domain: Its own lines and replies are in order by definition.
        split: `ppg_gym.domain.parsing.words`.
    """

    def __init__(self, domain: Domain, split: Any) -> None:
        self._english = english()
        self._vocabulary = {word for text in domain.words() for word in split(text)} - {""}
        self._own: set[tuple[str, str, str]] = set()
        for text in own_texts(domain):
            for sentence in sentences(split(text)):
                self._own.update(_threes(sentence))

    def _stammers(self, word: str) -> bool:
        """Return whether a word is an "I" said many times, or run together with the next word: "iii", "iperhaps"."""
        if not word.startswith("i") or self.knows(word) or word in _NO_STAMMER or word in self._vocabulary:
            return False
        many = len(word) - len(word.lstrip("i"))
        return many == len(word) or any(self._word(word[at:]) for at in range(1, many + 1))

    def _word(self, word: str) -> bool:
        return word in self._vocabulary or self.knows(word)

    def knows(self, word: str) -> bool:
        """Return whether a word is in the table of ordinary English."""
        return word in self._english.words

    def names(self, word: str, *, thing: bool) -> bool:
        """Return whether a word can only be a name, or a noun where a ``thing`` may be named; an unknown one can."""
        return self._english.only(word, ("N", "NS", "NM", "NAME") if thing else ("NAME",))

    def surprise(self, sentence: Sequence[str]) -> float:
        """Return how unlikely the order of one sentence's words is: above `UNLIKELY`, it is no sentence.

        That is the sum of the words' surprises in nats, divided by length to the power of `LENGTH`; or a single word's,
        where that is worse.

        Args:
            sentence: Words and signs, as `sentences` yields them.
        """
        free = {at for at, three in enumerate(_threes(sentence)) if three in self._own}
        if 1 not in free:  # a first word alone is in nobody's words: "Of course, cheese." does not allow "Of cheese."
            free.discard(0)
        surprises = self._english.surprises(sentence, free)
        spread: float = len(sentence) ** LENGTH
        return max(sum(surprises) / spread, max(surprises) * UNLIKELY / IMPOSSIBLE)

    def fault(self, tokens: Sequence[str]) -> str:
        """Return what is wrong with a reply's words: ``repeats``, ``order``, or nothing.

        Args:
            tokens: All of a reply, as `ppg_gym.domain.parsing.words` returns them.
        """
        if repeats(tokens) or any(map(self._stammers, tokens)):
            return "repeats"
        longer = (sentence for sentence in sentences(tokens) if len(sentence) > 2)  # a word by itself has no order
        return "order" if any(self.surprise(sentence) > UNLIKELY for sentence in longer) else ""


def sentences(tokens: Sequence[str]) -> Iterator[list[str]]:
    """Yield the sentences of a text that hold a word, each with its last sign: ``.`` or ``?``."""
    sentence: list[str] = []
    for token in (*tokens, "."):
        if token not in ".!?;\n":
            sentence.append(token)
        elif any(word not in _SIGNS for word in sentence):
            while sentence[-1] in _SIGNS:
                sentence.pop()
            yield [*sentence, "?" if token == "?" else "."]
            sentence = []
        else:
            sentence = []


def repeats(tokens: Sequence[str]) -> bool:
    """Return whether somebody says the same again and again: a word, a few words, a clause, a whole sentence."""
    spoken = [token for token in tokens if token not in _SIGNS]
    for length in range(1, min(LONGEST_STUTTER, len(spoken) // 2) + 1):
        for at in range(len(spoken) - 2 * length + 1):
            said = spoken[at : at + length]
            if said == spoken[at + length : at + 2 * length] and not _TWICE.issuperset(said):
                return True
    table = english().words
    full = Counter(word for word in spoken if word not in table or not _closed(word))
    if any((times >= OFTEN and times * 4 >= len(spoken)) or times * 2 >= len(spoken) > 2 for times in full.values()):
        return True
    clauses = Counter(tuple(clause) for clause in _clauses(tokens) if len(clause) >= SHORT_PHRASE)
    return any(times > 1 for times in clauses.values())


def _closed(word: str) -> bool:
    return any(not english().is_open(number) for number in english().words.get(word, ()))


def _clauses(tokens: Sequence[str]) -> Iterator[list[str]]:
    clause: list[str] = []
    for token in (*tokens, "."):
        if token in _JOINTS or token in _SIGNS:
            yield clause
            clause = []
        else:
            clause.append(token)


def _threes(sentence: Sequence[str]) -> list[tuple[str, str, str]]:
    padded = ["", "", *sentence]
    return [(a, b, c) for (a, b), c in zip(pairwise(padded), padded[2:], strict=False)]


def own_texts(domain: Domain) -> Iterator[str]:
    """Yield the domain's own lines and replies, each with every value of every fact once."""
    values = {slot: list(entry) for slot, entry in domain.slots.items()}
    rounds = max(map(len, values.values()), default=1)
    points = [item for table in domain.lines.get("points", {}).values() for item in table.items()]
    replies = {kind: entry for kind, entry in domain.replies.items() if kind not in ("gibberish", "garbled", "meta")}
    for text, slot in (*_templates(replies), *_templates(domain.lines)):
        named = {name for _, name, _, _ in Formatter().parse(text) if name}
        if named & {"previous", "statement", "points"}:
            continue
        for i in range(max(rounds, len(points)) if named & {"key", "text"} else rounds if named else 1):
            key, point = points[i % len(points)] if points else ("", "")
            facts = {name: choices[i % len(choices)] for name, choices in values.items()}
            every = values.get(slot) or values.get(str(domain.options.get("default_slot", ""))) or [""]
            value = every[i % len(every)]
            if named == {"value"} and slot not in values:
                for choices in values.values():
                    yield text.format(value=choices[i % len(choices)])
                continue
            yield text.format(value=value, key=key, text=point.rstrip("."), said=value, **facts)


def _templates(table: Any, slot: str = "") -> Iterator[tuple[str, str]]:
    """Yield (text, the innermost key above it) of nested tables of texts."""
    if isinstance(table, str):
        yield table, slot
    elif isinstance(table, dict):
        for key, entry in table.items():
            yield from _templates(entry, key)
    else:
        for entry in table:
            yield from _templates(entry, slot)
