"""Candidate replies, and features of them: for learners that pick a reply instead of writing one.

A bank offers a few replies to the partner's newest line; features turn persona, conversation and candidates into an
array. Nothing here judges a reply, knows the rule table's scores, or needs more than numpy.
"""

from __future__ import annotations

import functools
import importlib
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ppg_gym.conversation import Conversation, Line
from ppg_gym.domain.parsing import spoken
from ppg_gym.domain.reading import reader
from ppg_gym.domain.saying import say
from ppg_gym.partners.scripted import pick

Array = NDArray[np.float32]
History = tuple[tuple[str, str], ...]
Propose = Callable[[str, str, History, np.random.Generator], Sequence[str]]

MOST_WORDS = 60
MOST_SHARED = 8
PASSES = 20  # times that all kinds of reply are tried, to find candidates that differ

# The words that hold a sentence together, no matter what it is about.
_FUNCTION_WORDS = """
    a about again all also am an and any are as at be been but by can could did do does for from had has have he
    her here his how i if in into is it its just let may me my no not now of on one or our she should so some
    such that the their them then there they this to too up us was we were what when where which who why will
    with would yes you your
    """
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())


class Scene(NamedTuple):
    """The input of features.

    Attributes:
        instruction: The role-play instruction.
        message: The partner's newest line; empty when the conversation is over.
        history: (partner's line, reply) of every turn played, oldest first.
        candidates: N replies on offer.
        progress: Turns played / turns planned, in [0, 1]; 0 where the plan is not known.
    """

    instruction: str
    message: str
    history: History
    candidates: tuple[str, ...]
    progress: float


class Features(Protocol):
    """Turns a scene into ``shared`` numbers and then ``each`` numbers per candidate, all in [0, 1]."""

    shared: int
    each: int

    def __call__(self, scene: Scene) -> Array:
        """Return float32 [shared + N * each]."""
        ...


class HashedWords:
    """Bags of hashed words, and how much a candidate shares with persona and conversation.

    Layout, with B = ``buckets`` (a word's bucket is its CRC-32 modulo B, the same in every process):

    ==================  ====================================================================
    [0]                 turns played / turns planned
    [1, 1+B)            1 where a word of the instruction falls
    [1+B, 1+2B)         1 where a word of the partner's newest line falls
    then per candidate  B entries for its words, then one entry for each of :attr:`NAMES`
    ==================  ====================================================================

    All zeros where there is nothing to choose from. Content words are those outside :data:`FUNCTION_WORDS`.

    Attributes:
        shared: 1 + 2B.
        each: B + 8.

    Args:
        candidates: N, at least 1.
        buckets: B, at least 1.

    Raises:
        ValueError: ``buckets`` is not a positive integer.
    """

    NAMES = (
        "in_persona",  # share of its content words that the instruction has
        "like_persona",  # share of all its words that the instruction has: a copied sentence has nearly all
        "spread",  # different content words it shares with the instruction, of 8
        "in_message",  # share of its content words that the partner's line has
        "covers_message",  # share of the line's content words that it has
        "repeats",  # largest overlap (Jaccard) with an earlier reply
        "length",  # words, of 60
        "question",  # it ends with a question mark
    )

    def __init__(self, candidates: int, buckets: int = 64) -> None:
        if type(buckets) is not int or buckets < 1:
            raise ValueError(f"expected buckets to be a positive integer, got {buckets!r}")
        self.buckets = buckets
        self.shared = 1 + 2 * buckets
        self.each = buckets + len(self.NAMES)
        self._n = candidates

    def __call__(self, scene: Scene) -> Array:
        """Return the array, laid out as in the class's description."""
        row = np.zeros(self.shared + self._n * self.each, dtype=np.float32)
        persona, message = bag(scene.instruction), bag(scene.message)
        heard = message - FUNCTION_WORDS
        earlier = [bag(reply) for _, reply in scene.history]
        row[0] = scene.progress
        row[1 + hashed(scene.instruction, self.buckets)] = 1
        row[1 + self.buckets + hashed(scene.message, self.buckets)] = 1
        for block, candidate in zip(row[self.shared :].reshape(self._n, self.each), scene.candidates, strict=True):
            words = bag(candidate)
            block[hashed(candidate, self.buckets)] = 1
            content = words - FUNCTION_WORDS
            block[self.buckets :] = (
                _share(content, persona),
                _share(words, persona),
                min(1.0, len(content & persona) / MOST_SHARED),
                _share(content, heard),
                _share(heard, content),
                max((len(words & line) / max(1, len(words | line)) for line in earlier), default=0.0),
                min(1.0, length(candidate) / MOST_WORDS),
                float(candidate.rstrip().endswith("?")),
            )
        return row


@functools.lru_cache(maxsize=8192)
def bag(text: str) -> frozenset[str]:
    """Return a text's different words, lower case, without accents and punctuation."""
    return frozenset(spoken(text))


@functools.lru_cache(maxsize=8192)
def length(text: str) -> int:
    """Return how many words a text has."""
    return len(spoken(text))


@functools.lru_cache(maxsize=8192)
def hashed(text: str, n: int) -> NDArray[np.int64]:
    """Return the buckets, 0 to n - 1, of a text's different words."""
    return np.array(sorted({zlib.crc32(word.encode()) % n for word in bag(text)}), dtype=np.int64)


def _share(part: frozenset[str], whole: frozenset[str]) -> float:
    return len(part & whole) / len(part) if part else 0.0


class DomainBank:
    """Replies of different kinds in the domain's words, drawn as the untrained embedded model would speak.

    The kinds are drawn without replacement, with the weights of the domain's mixture in the partner's present state,
    and shuffled, so that an index means nothing. All texts differ; a kind comes twice if the kinds give too few. A line
    that asks for nothing in the domain is answered as if it asked for a random fact.

    Args:
        domain: Name of an embedded domain.
        candidates: N.

    Raises:
        ValueError: More candidates than the domain has kinds of reply.
    """

    def __init__(self, domain: str, candidates: int) -> None:
        self._reader = reader(domain)
        self._n = candidates
        most = len(self._reader.domain.mix)
        if candidates > most:
            raise ValueError(f"expected at most {most} candidates from the bank of {domain!r}, got {candidates}")

    def __call__(self, conversation: Conversation, rng: np.random.Generator) -> tuple[str, ...]:
        """Return N different replies to the partner's newest line.

        Raises:
            ValueError: The persona lacks a fact that the domain speaks of.
        """
        domain = self._reader.domain
        missing = [slot for slot in domain.statements if slot not in conversation.persona.facts]
        if missing:
            raise ValueError(
                f"expected a persona with facts for the bank of {domain.name!r}, got {conversation.persona.id!r}"
                f" without {', '.join(missing)}; pass bank= with replies of your own"
            )
        mix = domain.mix_in(self._reader.track(conversation).state)
        kinds, weights = list(mix), np.array(list(mix.values()))
        order = np.argsort(rng.exponential(size=len(kinds)) / weights)  # each comes first as often as its weight says
        asked = self._asked(conversation, rng)
        replies: dict[str, None] = {}
        for kind in [kinds[i] for i in order] * PASSES:
            replies[say(self._reader, kind, asked, rng)] = None
            if len(replies) == self._n:
                texts = list(replies)
                return tuple(texts[i] for i in rng.permutation(self._n))
        raise RuntimeError(f"expected {self._n} different replies, got {len(replies)}; ask for fewer candidates")

    def _asked(self, conversation: Conversation, rng: np.random.Generator) -> Conversation:
        """Return the conversation; where the partner's line asks for no fact, a question replaces it."""
        domain, line = self._reader.domain, conversation.lines[-1]
        if domain.options.get("default_slot") or self._reader.parse(line.text).cue:
            return conversation
        questions: Any = domain.lines["ask"]
        question = pick(questions[pick(sorted(questions), rng)], rng)
        return Conversation(conversation.persona, (*conversation.lines[:-1], Line("partner", question)))


def named(thing: str | Callable[..., Any]) -> str:
    """Return the name of a callable, ``module:name``, which a spec can hold; a string is returned unchanged."""
    if isinstance(thing, str):
        return thing
    owner = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{owner.__module__}:{owner.__qualname__}"


def find(role: str, name: object, known: str) -> Callable[..., Any]:
    """Return the callable at ``package.module:name``.

    Raises:
        ValueError: There is none; ``known`` is named as the shipped one.
    """
    module, _, path = str(name).partition(":")
    try:
        if not path:
            raise ImportError("no module is named before a colon")
        target: Any = functools.reduce(getattr, path.split("."), importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"expected {role} to be {known!r}, a callable or its name as 'package.module:name', got {name!r}; {error}"
        ) from error
    if not callable(target):
        raise ValueError(f"expected {role} at {name!r} to be callable, got {type(target).__name__}")
    return target  # type: ignore[no-any-return]
