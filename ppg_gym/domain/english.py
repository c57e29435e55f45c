"""Whether words in a row are a sentence that somebody might say: a small language model of ordinary English.

Every word has one or more classes (a noun, "a", a verb's -ing form, …); the table says how much likelier or less likely
a class is after two others than anywhere. The reading of a sentence that surprises least counts. Words that the table
lacks are taken by their endings, so that rare words and misspelt ones pass, and their order still matters. The table is
``envs/english.npz``, made by ``scripts/build_english.py``. Deterministic.
"""

from __future__ import annotations

import functools
import importlib.resources
import io
from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

_ENDINGS = {
    "ly": ("ADV", "LATE", "MID", "ADJ"),
    "ing": ("VG", "NM", "N", "ADJ"),
    "ed": ("VD", "VN", "ADJ"),
    "ness": ("NM",), "ment": ("NM", "N"), "tion": ("NM", "N"), "sion": ("NM", "N"), "ity": ("NM", "N"),
    "ous": ("ADJ",), "ful": ("ADJ",), "able": ("ADJ",), "ible": ("ADJ",), "ive": ("ADJ", "N"), "less": ("ADJ",),
    "ish": ("ADJ",),
    "ss": ("N", "NM", "NAME"), "us": ("N", "NM", "NAME"), "is": ("N", "NM", "NAME"),
    "s": ("NS", "VZ", "NAME", "NM"),
    "ology": ("NM",), "ist": ("N",), "er": ("N", "NM", "NAME"), "or": ("N", "NAME"),
}  # fmt: skip
_OPEN = ("N", "NS", "NM", "NAME", "ADJ", "V", "VZ", "VD", "VN", "VG")
_UNKNOWN = ("N", "NM", "NAME", "ADJ", "V")
BEAM = 7.0  # nats: a reading that surprises so much more than another one is given up
_LONGEST_ENDING = max(map(len, _ENDINGS))
_PUNCTUATION = {"?": "QUESTION", **dict.fromkeys(".!;\n", "END"), **dict.fromkeys(",:()\u2013\u2014", "COMMA")}


class English:
    """The table, and what it says of sentences."""

    def __init__(
        self, classes: Sequence[str], words: Mapping[str, Sequence[str]], surprise: np.typing.NDArray[np.floating]
    ) -> None:
        self._index = {name: i for i, name in enumerate(classes)}
        self._size = len(classes)
        self._table = array("f", surprise.astype(np.float32).tobytes())  # one number is read faster than from numpy
        self.words = {word: self._numbers(tags) for word, tags in words.items()}
        self._unknown = {ending: self._numbers(tags) for ending, tags in _ENDINGS.items()}
        self._any = self._numbers(_UNKNOWN)
        self._open = frozenset(self._numbers(_OPEN))
        self._number = self._numbers(("NUM",))
        self._marks = {sign: self._numbers((name,)) for sign, name in _PUNCTUATION.items()}

    def _numbers(self, tags: Iterable[str]) -> tuple[int, ...]:
        return tuple(self._index[tag] for tag in tags)

    def classes(self, word: str) -> tuple[int, ...]:
        """Return the classes that a word or sign can have, as positions in the table."""
        if found := self._marks.get(word) or self.words.get(word):
            return found
        if word.isdigit():
            return self._number
        for length in range(min(_LONGEST_ENDING, len(word) - 2), 0, -1):
            if ending := self._unknown.get(word[-length:]):
                return ending
        return self._any

    def is_open(self, number: int) -> bool:
        """Return whether a class is one of full words: nouns, verbs, adjectives and their forms."""
        return number in self._open

    def only(self, word: str, tags: Iterable[str]) -> bool:
        """Return whether a word has no other classes than these; True for a word that the table lacks."""
        return word not in self._marks and set(self.words.get(word, ())) <= set(self._numbers(tags))

    def surprises(self, tokens: Sequence[str], free: Collection[int] = ()) -> list[float]:
        """Return how little every token of one sentence is expected after the two before it, in nats, 0 where it is.

        Args:
            tokens: Of one sentence, its last sign included, as `ppg_gym.domain.parsing.words` returns them.
            free: Positions that surprise nobody, whatever their class.
        """
        size, table = self._size, self._table
        start = self._index["START"]
        # (class before, class) -> (surprise so far, surprises so far as a linked list)
        paths: dict[tuple[int, int], tuple[float, object]] = {(start, start): (0.0, None)}
        for at, token in enumerate(tokens):
            further: dict[tuple[int, int], tuple[float, object]] = {}
            options, expected = self.classes(token), at in free
            for (first, second), (total, link) in paths.items():
                row = (first * size + second) * size
                for tag in options:
                    here = 0.0 if expected else table[row + tag]
                    best = further.get((second, tag))
                    if best is None or total + here < best[0]:
                        further[second, tag] = (total + here, (here, link))
            most = min(total for total, _ in further.values()) + BEAM
            paths = {pair: path for pair, path in further.items() if path[0] <= most}
        _, link = min(paths.values(), key=lambda path: path[0])
        found: list[float] = []
        while link is not None:
            here, link = link  # type: ignore[misc]
            found.append(here)
        return found[::-1]


@functools.cache
def english() -> English:
    """Return the table; read once per process."""
    data = (importlib.resources.files("ppg_gym.domains") / "english.npz").read_bytes()
    with np.load(io.BytesIO(data)) as table:
        lines = table["words"].tobytes().decode().splitlines()
        words = {word: tags for word, *tags in (line.split(" ") for line in lines)}
        return English([str(name) for name in table["classes"]], words, table["surprise"])
