"""Parsing: what the words of a text hold, no matter who says them: values, topics, markers.

Knows words, not conversations: what a reply *is* depends on what was asked and said before, and
:mod:`ppg_gym.domain.reading` decides that. Deterministic; nothing here may score, speak or draw.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable
from typing import NamedTuple

from ppg_gym.domain.loading import Domain
from ppg_gym.domain.scope import PAUSES, SELF, Scope, word_set
from ppg_gym.domain.sentences import Sentences

MOST_LIKE = 4  # a text of this many words or more is gibberish unless over half of its words differ
MOST_WORDS = 60  # a longer text is a list of things, whatever its grammar
FEW_COMMAS = 4  # with fewer, nothing is an enumeration
ALIKE = 0.75  # a word this like a value is the value with a slip of the pen (a ratio of `difflib`)
CLAIM_WINDOW = 5  # words after "I live in" within which a value of the city says where
SHORT_PIECE = 3  # most words of an item of an enumeration

_TOKEN = re.compile(r"[a-z]+(?:'[a-z]+)?|[0-9]+|[.!?;\n,:()\u2013\u2014]|[^\W_]+")
_STOPS = frozenset(".!?;\n")
_CONTROL = re.compile(
    r"[<{\[][|/\\a-zA-Z\"'_ :]|\|>|\]\]|\"\s*:|###|```|^\s*(?:system|assistant|user)\s*:", re.M | re.I
)
_TURNS = PAUSES | SELF | word_set("and or who that")  # words at which a scope may change
_SCOPES = word_set("negation dislike contrast other_person unreal past")
_ENDINGS = {"m": "am", "re": "are", "ve": "have", "ll": "will", "d": "would"}
_IS = word_set("it that he she there what who how where here")  # "it's" holds a verb, "the cat's" does not
_SHORT = {
    "can't": "can not", "cannot": "can not", "won't": "will not", "ain't": "is not", "let's": "let us", "im": "i am",
    "ive": "i have", "dont": "do not", "doesnt": "does not", "didnt": "did not", "isnt": "is not", "cant": "can not",
}  # fmt: skip
_QUOTES = str.maketrans("\u2018\u2019\u02bc\u0060\u00b4", "'''''")


class Claim(NamedTuple):
    """A fact value named in a text.

    Attributes:
        slot: What it is a value of.
        value: The value; "" (negated) denies that there is any: "I do not have a pet".
        negated: The text denies it.
        asked: It stands inside a question.
        passing: An everyday word, which claims something only if the slot was asked for.
    """

    slot: str
    value: str
    negated: bool
    asked: bool
    passing: bool = False


class Parsed(NamedTuple):
    """What the words of a text hold.

    Attributes:
        text: Normalised words, joined by single spaces, punctuation dropped.
        length: Number of words.
        claims: Fact values named, in order.
        marks: Markers present.
        cue: The slot that the text's last cue phrase asks about, or "".
        points: Lesson keywords named, in order.
        known: Share of words in the domain's vocabulary or in ordinary English.
        at_home: All words are in the domain's vocabulary, or the speaker is the subject.
        question: The text ends as a question.
        listed: Items of the longest enumeration: short pieces in a row, whatever they are.
        fault: Why no person would say it: ``repeats`` itself, ``order`` of its words; "" where somebody might.
    """

    text: str
    length: int
    claims: tuple[Claim, ...]
    marks: frozenset[str]
    cue: str
    points: tuple[str, ...]
    known: float
    at_home: bool
    question: bool
    listed: int
    fault: str = ""


def _enumerated(tokens: list[str]) -> int:
    """Return the most pieces of up to ``SHORT_PIECE`` words in a row between commas; 0 with fewer than four commas."""
    longest = run = piece = 0
    if tokens.count(",") < FEW_COMMAS:
        return 0
    for token in [*tokens, "and"]:
        if token not in PAUSES and token not in _STOPS and token not in ("and", "or"):
            piece += 1
            continue
        if piece:
            run = run + 1 if piece <= SHORT_PIECE else 0
        longest, piece = max(longest, run), 0
    return longest


def words(text: str) -> list[str]:
    """Return lower-case words and punctuation, without accents and invisible characters, contractions spelled out."""
    if not text.isascii():
        text = unicodedata.normalize("NFKD", text.translate(_QUOTES))
        text = "".join(c for c in text if unicodedata.category(c) not in ("Cf", "Mn"))
    opened: list[str] = []
    for word in _TOKEN.findall(text.lower()):
        if word in _SHORT:
            opened += _SHORT[word].split(" ")
        elif "'" in word:
            opened += _open(word)
        else:
            opened.append(word)
    return opened


def _open(word: str) -> list[str]:
    """Return the words of a contraction such as "i'm", "don't", "it's"; a possessive loses its s."""
    base, _, end = word.partition("'")
    if end == "t" and base.endswith("n"):
        return [base[:-1], "not"] if base != "n" else ["not"]
    if end == "s":
        return [base, "is"] if base in _IS else [base]
    return [base, _ENDINGS[end]] if end in _ENDINGS else [word]


def spoken(text: str) -> list[str]:
    """Return the words of a text without its punctuation."""
    return [word for word in words(text) if word not in _STOPS and word not in PAUSES]


class _Phrase(NamedTuple):
    """A phrase's words after its first, and what it stands for."""

    rest: tuple[str, ...]
    tag: str
    name: str
    value: str
    passing: bool


class Parser:
    """Finds a domain's phrases in texts."""

    def __init__(self, domain: Domain) -> None:
        self._phrases: dict[str, list[_Phrase]] = {}
        ordinary = frozenset(domain.markers.get("ordinary", ()))
        for slot, values in domain.slots.items():
            for value, phrases in values.items():
                for phrase in phrases:
                    self._add((phrase,), "value", slot, value, phrase in ordinary)
        for slot, phrases in domain.cues.items():
            self._add(phrases, "cue", slot)
        for slot, phrases in domain.claims.items():
            self._add(phrases, "claim", slot)
        self._values = {
            slot: [spoken(phrase) for phrases in values.values() for phrase in phrases]
            for slot, values in domain.slots.items()
        }
        for mark, phrases in domain.markers.items():
            if mark != "ordinary":
                self._add(phrases, "scope" if mark in _SCOPES else "mark", mark)
        for points in domain.lines.get("points", {}).values():
            for key in points:
                self._add((key,), "point", key)
        for entries in self._phrases.values():
            entries.sort(key=lambda entry: -len(entry.rest))
        vocabulary = {w for text in domain.words() for w in words(text)}
        self._vocabulary = vocabulary | set(domain.options["common_words"])
        self._sentences = Sentences(domain, words) if domain.options.get("english", True) else None

    def _add(self, phrases: Iterable[str], tag: str, name: str, value: str = "", passing: bool = False) -> None:
        for phrase in phrases:
            first, *rest = spoken(phrase)
            self._phrases.setdefault(first, []).append(_Phrase(tuple(rest), tag, name, value, passing))

    def parse(self, text: str) -> Parsed:
        """Return what a text holds."""
        tokens = words(text)
        claims: list[Claim] = []
        marks, points = set[str](), dict[str, None]()
        spoken_words = [token for token in tokens if token not in _STOPS and token not in PAUSES]
        cue, start = "", 0
        if _CONTROL.search(text):
            marks.add("meta")
        last_question = False
        for end, token in enumerate([*tokens, "\n"]):
            if token not in _STOPS:
                continue
            if end > start:
                last_question = token == "?"
                cue = self._sentence(tokens[start:end], last_question, claims, marks, points) or cue
            start = end + 1
        known = sum(map(self._knows, spoken_words)) / max(len(spoken_words), 1)
        if len(spoken_words) >= MOST_LIKE and len(set(spoken_words)) * 2 <= len(spoken_words):
            known = 0.0  # the same few words again and again
        return Parsed(
            " ".join(spoken_words),
            len(spoken_words),
            tuple(claims),
            frozenset(marks),
            cue,
            tuple(points),
            known,
            not SELF.isdisjoint(spoken_words) or self._vocabulary.issuperset(spoken_words),
            last_question,
            _enumerated(tokens),
            self._sentences.fault(tokens) if self._sentences and len(spoken_words) <= MOST_WORDS else "",
        )

    def _knows(self, word: str) -> bool:
        return word in self._vocabulary or (self._sentences is not None and self._sentences.knows(word))

    def _claimed(self, slot: str, tokens: list[str], at: int, end: int) -> str:
        """Return what a phrase such as "I live in" names, where that is no value that the domain knows; else ""."""
        before = tokens[max(at - 2, 0) : at]
        own = not before or before[-1] in PAUSES or before[-1] == "and" or tokens[at] == "am"
        ahead = tokens[end + 1 : end + 1 + CLAIM_WINDOW]
        if not (own or SELF.intersection(before)) or not ahead or not self._sentences:
            return ""
        if not self._sentences.names(ahead[0], thing=tokens[end] in ("a", "an", "is")):
            return ""
        values = self._values[slot]
        known = any(ahead[i : i + len(value)] == value for value in values for i in range(len(ahead)))
        alike = (difflib.SequenceMatcher(None, " ".join(value), ahead[0]).ratio() for value in values)
        return "" if known or any(ratio >= ALIKE for ratio in alike) else ahead[0]

    def _sentence(
        self, tokens: list[str], asked: bool, claims: list[Claim], marks: set[str], points: dict[str, None]
    ) -> str:
        """Collect what one sentence holds; return the slot it asks about, or ""."""
        scope = Scope(tokens, asked)
        cues: list[str] = []
        begun = len(claims)
        at = 0
        while at < len(tokens):
            width = 1
            token = tokens[at]
            if token in _TURNS:
                scope.word(at)
            for rest, tag, name, value, passing in self._phrases.get(token, ()):
                if rest and tuple(tokens[at + 1 : at + 1 + len(rest)]) != rest:
                    continue
                if tag == "value":
                    if scope.claims(at, at + len(rest)):
                        claims.append(Claim(name, value, scope.denies(at), scope.asked, passing))
                elif tag == "claim":
                    cues.append(name)
                    if not scope.aside(at) and (value := self._claimed(name, tokens, at, at + len(rest))):
                        claims.append(Claim(name, value, scope.denies(at + len(rest)), scope.asked))
                elif tag == "cue":
                    cues.append(name)
                    if scope.lacks(at):
                        claims.append(Claim(name, "", True, scope.asked))
                elif tag == "point":
                    points[name] = None
                elif tag == "scope":
                    scope.mark(name, at, at + len(rest))
                    marks.add(name)
                else:
                    marks.add(name)
                if rest:  # the words of a phrase mean nothing on their own: skip them
                    width = 1 + len(rest)
                    break
            at += width
        if cues:
            for i in range(begun, len(claims)):
                if claims[i].passing and claims[i].slot in cues:
                    claims[i] = claims[i]._replace(passing=False)
        return cues[-1] if cues else ""
