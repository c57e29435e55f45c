"""From a conversation that ends with a reply to numbers: what the learned judge looks at.

Three kinds, in blocks. ``plain``: form of the reply, and what it shares with the persona, the partner's line and
the lines before. ``ngrams``: its words and characters, hashed by scikit-learn's stateless vectorizer, so that
nothing has to be learnt from a text. ``embeddings``: a sentence encoder's vectors of the reply and the persona.
No persona and no file is a feature.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ppg_gym.conversation import Conversation
from ppg_gym.extras import need
from ppg_gym.judges.rules import persona_sentences

PLAIN = (
    # form
    "length", "characters", "sentences", "questions", "exclamations", "word_length", "variety", "loop", "signs",
    "digits", "cut_off", "label", "brackets", "lower_start",
    # stance
    "first_person", "second_person", "negations", "hedges", "contrasts", "extremes", "meta", "thanks", "agrees",
    # persona and reply
    "known_words", "persona_covered", "best_sentence", "mean_sentence", "denied_known", "new_names", "known_names",
    "new_numbers", "known_numbers", "persona_length", "own_name",
    # the partner's line and reply
    "taken_up", "message_length", "message_asks", "ends_asking", "echo",
    # earlier lines and reply
    "position", "opens", "most_like_own", "most_like_other", "own_words_again", "length_change",
)  # fmt: skip
"""Names of the plain features, in the order of their columns."""

HASHED = 2**15
"""Columns of the word n-grams, and of the character n-grams."""

NGRAM_SCALE = 3.0
"""Length of a row of word n-grams, and of one of character n-grams: about that of ten standardised columns."""

RECENT = 8  # earlier lines per speaker that a reply is compared with

Floats = NDArray[np.float64]


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


_STOP = _set(
    "a an the and or but if so as of in on at to for from with by about into over it its this that these those there"
    " here i me my mine myself we us our you your yours he him his she her they them their who which what when where"
    " why how is am are was were be been being do does did have has had will would can could should may might must not"
    " no just very really too also more most much many some any all one than then out up down get got like know think"
    " feel make let go i'm i've i'd i'll it's that's don't can't you're"
)
_FIRST = _set("i me my mine myself we us our i'm i've i'd i'll")
_SECOND = _set("you your yours yourself you're you've you'll you'd")
_NEGATIONS = _set("not no never none nothing nobody neither nor without hardly barely cannot")
_HEDGES = _set("maybe perhaps might guess suppose somewhat possibly probably sometimes seems unsure kinda kind bit")
_CONTRASTS = _set("but however although though instead actually rather yet despite")
_EXTREMES = _set("never always every everything completely totally absolutely definitely")
_META = _set("prompt response persona character assistant model ai format submit moderator conversation dialogue")
_THANKS = _set("thank thanks appreciate grateful sorry")
_AGREES = _set("yes yeah sure absolutely exactly indeed right agree true certainly definitely course")
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")
_SENTENCE = re.compile(r"[.!?]+(?:\s|$)|\n")
_NAME = re.compile(r"(?<=[\w,;] )[A-Z][a-z]{2,}\b")
_CAPITAL = re.compile(r"\b[A-Z][a-z]{2,}\b")
_NUMBER = re.compile(r"\d+")
_LABEL = re.compile(r"^[ \t]*[A-Z][A-Za-z ]{1,20}:", re.M)
_SIGN = re.compile(r"[^\w\s.,;:!?'\"’“”()-]|_")


class _Text(NamedTuple):
    """A text as the features see it: words, stems that carry content, names inside sentences, numbers, log-length."""

    words: tuple[str, ...]
    content: frozenset[str]
    names: frozenset[str]
    numbers: frozenset[str]
    length: float


@functools.lru_cache(maxsize=65536)
def _read(text: str) -> _Text:
    words = tuple(_WORD.findall(text.replace("’", "'").lower()))
    content = frozenset(_stem(word) for word in words if word not in _STOP)
    names = frozenset(name.lower() for name in _NAME.findall(text))
    return _Text(words, content, names, frozenset(_NUMBER.findall(text)), math.log1p(len(words)))


@functools.lru_cache(maxsize=65536)
def _stem(word: str) -> str:
    for ending in ("ing", "ed", "es", "s", "ly"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word


@functools.lru_cache(maxsize=4096)
def _read_persona(instruction: str) -> tuple[_Text, tuple[frozenset[str], ...], frozenset[str]]:
    """Return the persona as a text, the content of each of its sentences, and its capitalised words."""
    parts = persona_sentences(instruction)
    whole = " ".join(parts)
    contents = tuple(content for content in (_read(part).content for part in parts) if content)
    return _read(whole), contents, frozenset(word.lower() for word in _CAPITAL.findall(whole))


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _alike(a: frozenset[str], b: frozenset[str]) -> float:
    common = len(a & b)
    return _share(common, len(a) + len(b) - common)


def _row(conversation: Conversation) -> list[float]:
    lines, persona = conversation.lines, conversation.persona
    reply = lines[-1].text
    said = _read(reply)
    words, content, n = said.words, said.content, len(said.words)
    message = lines[-2].text if len(lines) > 1 else ""
    heard = _read(message)
    own = [line.text for line in lines[:-1] if line.speaker == "policy"]
    other = [line.text for line in lines[:-1] if line.speaker == "partner"]
    return [
        *_form(reply, said),
        *_stance(words, n),
        *_with_persona(said, persona.name, reply, conversation),
        _share(len(content & heard.content), len(content)),
        heard.length,
        float("?" in message),
        float(reply.rstrip("\"'”’ ").endswith("?")),
        _alike(content, heard.content),
        math.log1p(len(own)),
        float(not other),
        max((_alike(content, _read(text).content) for text in own[-RECENT:]), default=0.0),
        max((_alike(content, _read(text).content) for text in other[-RECENT:-1]), default=0.0),
        _share(len(content & _union(own[-RECENT:])), len(content)),
        said.length - _share(sum(_read(text).length for text in own), len(own)) if own else 0.0,
    ]


def _form(reply: str, said: _Text) -> list[float]:
    words, n = said.words, len(said.words)
    fours = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    end = reply.rstrip("\"'”’)* ")[-1:]
    return [
        said.length,
        math.log1p(len(reply)),
        math.log1p(len(_SENTENCE.findall(reply))),
        float(min(reply.count("?"), 3)),
        float(min(reply.count("!"), 3)),
        _share(sum(map(len, words)), n),
        _share(len(set(words)), n),
        1.0 - _share(len(set(fours)), len(fours)) if fours else 0.0,
        _share(len(_SIGN.findall(reply)), len(reply)),
        _share(sum(word.isdigit() for word in words), n),
        float(end not in ".!?"),
        float(min(len(_LABEL.findall(reply)), 3)),
        float(any(sign in reply for sign in "[](){}<>|*")),
        float(reply[:1].islower()),
    ]


def _stance(words: Sequence[str], n: int) -> list[float]:
    counts = Counter(words)

    def share(vocabulary: frozenset[str]) -> float:
        return _share(sum(count for word, count in counts.items() if word in vocabulary), n)

    negations = sum(count for word, count in counts.items() if word in _NEGATIONS or word.endswith("n't"))
    return [
        share(_FIRST),
        share(_SECOND),
        _share(negations, n),
        share(_HEDGES),
        share(_CONTRASTS),
        share(_EXTREMES),
        share(_META),
        share(_THANKS),
        float(bool(words) and words[0] in _AGREES),
    ]


def _with_persona(said: _Text, name: str, reply: str, conversation: Conversation) -> list[float]:
    persona, parts, names = _read_persona(conversation.persona.instruction)
    content, words = said.content, said.words
    shared = content & persona.content
    fits = [len(content & part) / len(part) for part in parts]
    denied = 0
    for i, word in enumerate(words):
        if word in _NEGATIONS or word.endswith("n't"):
            denied += any(_stem(later) in shared for later in words[i + 1 : i + 5])
    told = names.union(*(_read(line.text).names for line in conversation.lines[-1 - RECENT : -1]))
    return [
        _share(len(shared), len(content)),
        _share(len(shared), len(persona.content)),
        max(fits, default=0.0),
        _share(sum(fits), len(fits)),
        float(min(denied, 3)),
        float(min(len(said.names - told), 4)),
        float(min(len(said.names & names), 4)),
        float(min(len(said.numbers - persona.numbers), 3)),
        float(min(len(said.numbers & persona.numbers), 3)),
        persona.length,
        float(bool(name) and name.lower() in reply.lower()),
    ]


def _union(texts: Sequence[str]) -> frozenset[str]:
    return frozenset().union(*(_read(text).content for text in texts))


def plain(conversations: Sequence[Conversation]) -> Floats:
    """Return the plain features [conversations, len(PLAIN)] of the newest replies."""
    rows = [_row(conversation) for conversation in conversations]
    return np.array(rows, dtype=np.float64).reshape(len(rows), len(PLAIN))


def ngrams(conversations: Sequence[Conversation]) -> Any:
    """Return hashed word 1-2-grams and character 3-4-grams of the newest replies: sparse [conversations, 2 * HASHED].

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    sparse = need("scipy.sparse", "learned")
    replies = [conversation.lines[-1].text for conversation in conversations]
    return sparse.hstack([vectorizer.transform(replies) * NGRAM_SCALE for vectorizer in _vectorizers()], format="csr")


@functools.cache
def _vectorizers() -> tuple[Any, Any]:
    make = need("sklearn.feature_extraction.text", "learned").HashingVectorizer
    common = {"n_features": HASHED, "alternate_sign": False, "binary": True, "norm": "l2"}
    return make(ngram_range=(1, 2), **common), make(analyzer="char_wb", ngram_range=(3, 4), **common)


class Encoder:
    """A sentence encoder by name, with the vectors of the texts that come again.

    Args:
        name: A folder or a hub name that ``sentence_transformers`` loads.

    Raises:
        ModuleNotFoundError: sentence-transformers is not installed.
    """

    _KEPT = 50_000

    def __init__(self, name: str) -> None:
        self._model = need("sentence_transformers", "embeddings").SentenceTransformer(name, trust_remote_code=False)
        self._kept: dict[str, Floats] = {}

    def vectors(self, texts: Sequence[str]) -> list[Floats]:
        """Return a unit vector per text; a text without length stays the zero vector."""
        if len(self._kept) > self._KEPT:
            self._kept.clear()
        fresh = sorted(set(texts) - self._kept.keys())
        if fresh:
            raw = np.asarray(self._model.encode(fresh), dtype=np.float64)
            norms = np.linalg.norm(raw, axis=1, keepdims=True)
            self._kept.update(zip(fresh, raw / np.where(norms == 0, 1, norms), strict=True))
        return [self._kept[text] for text in texts]


def embeddings(conversations: Sequence[Conversation], encoder: Encoder) -> Floats:
    """Return, per newest reply: its vector, its product with the persona's mean vector, and four cosines.

    The cosines are those with the persona's mean and its nearest sentence, the partner's line and the nearest of the
    recent own lines (0 where there is none).
    """
    parts = [persona_sentences(c.persona.instruction) for c in conversations]
    replies = [c.lines[-1].text for c in conversations]
    messages = [c.lines[-2].text if len(c.lines) > 1 else "" for c in conversations]
    own = [c.said()[-1 - RECENT : -1] for c in conversations]
    encoder.vectors([text for group in (*parts, replies, messages, *own) for text in group])  # in one batch
    rows = []
    for sentences, reply, message, earlier in zip(parts, replies, messages, own, strict=True):
        (said,) = encoder.vectors([reply])
        known = np.stack(encoder.vectors(sentences)) if sentences else np.zeros((1, said.size))
        mean = known.mean(axis=0)
        heard = float(said @ encoder.vectors([message])[0]) if message else 0.0
        again = max((float(said @ vector) for vector in encoder.vectors(earlier)), default=0.0)
        rows.append(np.concatenate([said, said * mean, [said @ mean, (known @ said).max(), heard, again]]))
    return np.stack(rows) if rows else np.zeros((0, 0))


def extract(conversations: Sequence[Conversation], blocks: Sequence[str], encoder: Encoder | None) -> dict[str, Any]:
    """Return the named blocks of features, each with one row per conversation; ``ngrams`` is sparse."""
    found: dict[str, Any] = {}
    for block in blocks:
        if block == "embeddings" and encoder is None:
            raise ValueError("expected an encoder for the embeddings block, got None")
        if block == "embeddings" and encoder is not None:
            found[block] = embeddings(conversations, encoder)
        else:
            found[block] = plain(conversations) if block == "plain" else ngrams(conversations)
    return found
