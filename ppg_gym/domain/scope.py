"""Scope: what is denied, asked, or not about the speaker here and now, word by word through a sentence.

Deterministic; knows function words alone, no facts.
"""

from __future__ import annotations

REACH = 2  # full words between a negation and what it denies: "do not really work as a nurse"


def word_set(text: str) -> frozenset[str]:
    """Return the words of a text."""
    return frozenset(text.split())


PAUSES = frozenset(",:()\u2013\u2014")
SELF = word_set("i my me we")  # the speaker is the subject again
_ASKING = word_set(
    "do does did is are was were have has can could would will should may what which who whom where when why how"
)
_ADDRESSED = word_set("you your u ur")  # as the subject of a statement, it is about the other one
# After these, it is not: "You could say that I am a nurse."
_SPOKEN_TO = word_set("can could may might would will should know see guess guessed bet got wo mean")
_LIGHT = word_set("a an the as in of to my any be being with for at i am is are was it and or")
_HAVING = word_set("have own do play keep got any a an one real")
_ONES_OWN = word_set("my being working having doing that when how it to")  # "I hate being a nurse" denies nothing


class Scope:
    """What holds at each word of a sentence: whether it is denied, asked, or not about the speaker here and now.

    A sentence is walked once from left to right. A negation reaches a few full words ahead and is used up by the value
    it denies; words about somebody else, the past or a wish set values aside until the speaker is the subject again.
    Pauses, "and" and "but" end or renew these, which is what most of the branches below are about.
    """

    def __init__(self, tokens: list[str], asked: bool) -> None:
        self._tokens = tokens
        self._question = asked
        self._last = -1
        if asked:
            self._last = max((i for i, token in enumerate(tokens) if token in PAUSES), default=-1)
        self.asked = asked and (self._last < 0 or tokens[0] in _ASKING)
        self._whole = self.asked
        self._denied = -1  # where the last negation ends
        self._used = False  # whether it has denied something
        self._aside = -1  # the last word that is not about the speaker here and now
        self._other = False  # whether that is because it is about somebody else
        self._self = False  # whether the speaker has been a subject of the sentence
        if tokens[0] in _ADDRESSED and (len(tokens) == 1 or tokens[1] not in _SPOKEN_TO):  # "You live in Oslo."
            self._aside, self._other = len(tokens), True

    def word(self, at: int) -> None:
        """Move on to a word: pauses and a new subject end what was in force."""
        token, tokens = self._tokens[at], self._tokens
        if token in PAUSES:
            if self._used:
                self._denied = -1
            if self._aside < len(tokens) or self._tokens[0] in _ADDRESSED:
                self._aside = -1
            if self._question and not self._whole:
                first = tokens[at + 1] if at + 1 < len(tokens) else ""
                self.asked = at == self._last or first in _ASKING
        elif token in SELF:
            if self._used or (at and tokens[at - 1] in PAUSES):
                self._denied = -1
            self._aside, self._self = -1, self._self or token in ("i", "we")
        elif token in ("and", "or"):
            goes_on = at + 1 < len(tokens) and tokens[at + 1] not in SELF
            if self._used and goes_on:
                self._denied, self._used = at, False
            if self._other and self._aside < len(tokens):
                self._aside = -1
        elif token in ("who", "that") and self._other and self._aside >= at:
            self._aside = len(tokens)

    def mark(self, name: str, at: int, end: int) -> None:
        """Take in a marker that spans the words ``at`` to ``end``."""
        tokens = self._tokens
        if name == "contrast":
            self._denied = self._aside = -1
        elif name == "negation":
            follows = tokens[at + 1] if at + 1 < len(tokens) else ","
            if tokens[at] == "no" and (follows in PAUSES or follows in SELF or follows in ("it", "not", "that")):
                return  # "no" as an answer, not as a denial of what comes next
            # "I can't live without tea": a second negation takes back one that is not used up.
            undone = tokens[at] == "without" and self._denied >= 0 and not self._used
            self._denied, self._used = -1 if undone else end, False
        elif name == "dislike":
            if end + 1 < len(tokens) and tokens[end + 1] not in _ONES_OWN:
                undone = self._denied >= 0 and not self._used  # "I don't hate painters"
                self._denied, self._used = -1 if undone else end, False
        else:
            self._other = name == "other_person"
            self._aside = len(tokens) if self._other and not self._self else end + 1 + REACH

    def aside(self, at: int) -> bool:
        """Return whether a word is not about the speaker here and now."""
        return at <= self._aside

    def claims(self, at: int, end: int) -> bool:
        """Return whether a value named here is a claim about the speaker."""
        if at > self._aside:
            return True
        if not self._other:  # "from Lima to Oslo": the first value only, unless the next is joined to it
            follows = self._tokens[end + 1] if end + 1 < len(self._tokens) else ""
            self._aside = end + 1 + REACH if follows in ("and", "or") else -1
        return False

    def denies(self, at: int) -> bool:
        """Return whether a value named here is denied."""
        if self._denied < 0:
            return False
        if sum(token not in _LIGHT for token in self._tokens[self._denied + 1 : at]) > REACH:
            return False
        self._used = True
        return True

    def lacks(self, at: int) -> bool:
        """Return whether the text says that there is none of a topic named here: "no pet", "not have a pet"."""
        if self._denied < 0 or self._used:
            return False
        between = self._tokens[self._denied + 1 : at]
        return all(w in _HAVING for w in between) if between else self._tokens[self._denied] == "no"
