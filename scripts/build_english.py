"""Make ``envs/english.npz``, the table of ordinary English, from ``scripts/english.toml``.

    python scripts/build_english.py           # half a minute on one core; the same file every time

Sentences are drawn from the hand-written grammar; what is kept of them is how little a class of words is expected after
the two before it, and which classes each word of the lexicon can have. `ppg_gym.domain.english` reads the table.
"""

from __future__ import annotations

import argparse
import tomllib
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SOURCE, TABLE = ROOT / "scripts" / "english.toml", ROOT / "envs" / "english.npz"
OPEN = ("N", "NS", "NM", "NAME", "ADJ", "V", "VZ", "VD", "VN", "VG")
MARKS = ("START", "END", "QUESTION", "COMMA")
DEEPEST = 9  # of nested lines; below it only the first words of a line are drawn
OPTIONAL = 0.35
NEVER = 6.0  # nats more for what [never], [never_first] and [never_last] list
SLACK = 1.0  # nats by which a class has to be likelier than anywhere, to surprise nobody
SHARES = (0.85, 0.135, 0.015)  # of the counts of three classes, of two, of one
VOWELS = "aeiou"

Grammar = Mapping[str, list[tuple[float, list[str]]]]


def lexicon(data: Mapping[str, Mapping[str, str]]) -> dict[str, list[str]]:
    """Return the classes that every word can have, the likely ones first."""
    classes: dict[str, dict[str, None]] = {}

    def add(tag: str, *words: str) -> None:
        for word in words:
            classes.setdefault(word, {})[tag] = None

    for tag, text in data["closed"].items():
        add(tag, *text.split())
    open_ = data["open"]
    for entry in open_["nouns"].split():
        one, _, many = entry.partition("/")
        add("N", one)
        add("NS", many or plural(one))
    for tag, key in (("NM", "mass"), ("NAME", "names"), ("ADJ", "adjectives")):
        add(tag, *open_[key].split())
    for entry in open_["verbs"].split():
        base, past, participle = [*entry.split("/"), "", ""][:3]
        past = past or regular_past(base)
        add("V", base)
        add("VZ", plural(base))
        add("VD", past)
        add("VN", participle or past)
        add("VG", ing(base))
        if ing(base) not in classes or "NM" not in classes[ing(base)]:
            add("NM", ing(base))
    return {word: list(tags) for word, tags in sorted(classes.items())}


def plural(word: str) -> str:
    """Return a word with the s of a plural, or of the third person."""
    if word.endswith(("s", "x", "z", "ch", "sh", "o")) and not word.endswith(("oo", "io", "eo")):
        return word + "es"
    return word[:-1] + "ies" if word.endswith("y") and word[-2] not in VOWELS else word + "s"


def doubles(word: str) -> bool:
    """Return whether a verb doubles its last letter: stop, run, jog."""
    short = len(word) >= 3 and word[-1] not in VOWELS + "wxy" and word[-2] in VOWELS and word[-3] not in VOWELS
    return short and sum(letter in VOWELS for letter in word) == 1


def regular_past(word: str) -> str:
    """Return the regular past of a verb."""
    if word.endswith("e"):
        return word + "d"
    if word.endswith("y") and word[-2] not in VOWELS:
        return word[:-1] + "ied"
    return word + (word[-1] if doubles(word) else "") + "ed"


def ing(word: str) -> str:
    """Return the -ing form of a verb."""
    if word.endswith("ie"):
        return word[:-2] + "ying"
    if word.endswith("e") and not word.endswith(("ee", "be")):
        return word[:-1] + "ing"
    return word + (word[-1] if doubles(word) else "") + "ing"


def grammar(data: Mapping[str, str]) -> Grammar:
    """Return name -> [(weight, symbols)]."""
    rules = {}
    for name, text in data.items():
        lines = [line.split() for line in text.strip().splitlines()]
        rules[name] = [(float(weight), symbols) for weight, *symbols in lines]
    return rules


class Sentences:
    """Draws sentences of the grammar, as classes of words.

    Raises:
        ValueError: The grammar names something that is neither a class nor a line.
    """

    def __init__(self, rules: Grammar, classes: frozenset[str], rng: np.random.Generator) -> None:
        self._rules, self._classes, self._rng = rules, classes, rng
        self._totals = {name: list(accumulate(weight for weight, _ in lines)) for name, lines in rules.items()}
        named = {symbol.rstrip("?") for lines in rules.values() for _, symbols in lines for symbol in symbols}
        if unknown := sorted(named - {*classes, *rules}):
            raise ValueError(f"{SOURCE.name}: expected classes of words or lines of [grammar], got {unknown}")

    def draw(self, name: str = "sentence", depth: int = 0) -> Iterator[str]:
        """Yield the classes of one sentence, or of one line of the grammar."""
        if name.endswith("?"):
            if self._rng.random() >= OPTIONAL:
                return
            name = name[:-1]
        if name in self._classes:
            yield name
            return
        totals = self._totals[name]
        at = 0 if depth > DEEPEST else bisect_right(totals, self._rng.random() * totals[-1])
        for symbol in self._rules[name][at][1]:
            yield from self.draw(symbol, depth + 1)


def transitions(rules: Grammar, names: list[str], sentences: int, seed: int) -> np.ndarray:
    """Return [T, T, T] of float: how little a class is expected after two others, in nats, 0 where it is expected.

    The surprise is -log(p(class | two before) / p(class)) + SLACK, or 0; p(class | two before) mixes the counts of
    three classes, of two and of one (Jelinek-Mercer).
    """
    index, drawn = (
        {name: i for i, name in enumerate(names)},
        Sentences(rules, frozenset(names), np.random.default_rng(seed)),
    )
    three = np.zeros((len(names),) * 3)
    for _ in range(sentences):
        line = [index["START"], index["START"], *(index[tag] for tag in drawn.draw())]
        for window in zip(line, line[1:], line[2:], strict=False):
            three[window] += 1
    two = three.sum(axis=0)
    one = two.sum(axis=0)
    alone = (one + 1.0) / (one + 1.0).sum()
    after_two = three / np.maximum(three.sum(axis=2, keepdims=True), 1.0)
    after_one = two / np.maximum(two.sum(axis=1, keepdims=True), 1.0)
    unseen = three.sum(axis=2, keepdims=True) == 0  # two classes that never stand together tell nothing of a third
    trusted = np.where(unseen, 0.0, SHARES[0])
    mixed = trusted * after_two + (SHARES[0] - trusted + SHARES[1]) * after_one[None] + SHARES[2] * alone
    surprise: np.ndarray = np.maximum(0.0, SLACK - np.log(mixed / alone))
    return surprise


def main() -> None:
    """Read the grammar, draw sentences, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=int, default=500_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=TABLE)
    settings = parser.parse_args(namespace=SimpleNamespace())
    data = tomllib.loads(SOURCE.read_text(encoding="utf-8"))
    names = [*MARKS, *data["closed"], *OPEN]
    words = lexicon(data)
    table = transitions(grammar(data["grammar"]), names, settings.sentences, settings.seed)
    for name, text in data["never"].items():
        table[:, names.index(name), [names.index(other) for other in text.split()]] += NEVER
    for name, text in data["never_first"].items():
        table[names.index("START"), names.index(name), [names.index(other) for other in text.split()]] += NEVER
    for name, text in data["never_last"].items():
        table[[names.index(other) for other in text.split()], names.index(name), names.index("END")] += NEVER
    lines = "\n".join(f"{word} {' '.join(tags)}" for word, tags in words.items())
    np.savez_compressed(
        settings.out,
        classes=np.array(names),
        words=np.frombuffer(lines.encode(), dtype=np.uint8),
        surprise=table.astype(np.float16),
    )
    print(f"wrote {settings.out}: {len(words):,} words, {len(names)} classes, {settings.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
